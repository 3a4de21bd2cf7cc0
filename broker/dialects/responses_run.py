"""A run of chunks of text: most differ from their neighbour in one string only, and so do the events made of them.

The bytes around the string are remembered on either side. Between the same bytes a string goes over into the event as
it is where JSON writes it in one way only, else through a parser of its own; the result is the same to the byte.
"""

import json
import re
from typing import Any, Final

THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")

_STRING: Final = (
    rb'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*"'  # as JSON has it, nothing else
)
_is_plain = re.compile(rb'"[ !#-\[\]-~]+"').fullmatch
_find_string = {key: re.compile(rb'"%s"\s*:\s*(%s)' % (key.encode(), _STRING)).search for key in ("content", *THOUGHTS)}


class Run:
    """What the chunks of a run and the events made of them have in common."""

    def __init__(self, head: bytes, tail: bytes, model: bytes) -> None:
        """`head` and `tail` stand around the string of a chunk; `model` is the event of an empty one, with number 0."""
        self._head, self._tail = head, tail
        self._before, rest = model.split(b'"sequence_number":0', 1)
        self._before += b'"sequence_number":'
        self._between, self._after = rest.split(b'"delta":""', 1)
        self._between += b'"delta":'

    def string_of(self, chunk: bytes) -> tuple[bytes, str] | None:
        """Gives the string of a chunk of the run, as the event writes it and as it is; None for any other chunk."""
        if not (chunk.startswith(self._head) and chunk.endswith(self._tail)):
            return None
        told = chunk[len(self._head) : -len(self._tail)]
        if _is_plain(told):
            return told, told[1:-1].decode("ascii")
        try:
            text = json.loads(told.decode())
        except (ValueError, RecursionError):
            return None
        return (json.dumps(text).encode(), text) if isinstance(text, str) else None

    def event(self, number: int, told: bytes) -> bytes:
        """Writes the event of a string."""
        return b"%s%d%s%s%s" % (self._before, number, self._between, told, self._after)


def string_in(chunk: bytes, told: dict[str, Any]) -> tuple[str, int, int] | None:
    """Finds the one string that a chunk adds, and where it stands: its key, its begin, its end. None where the chunk
    says anything else."""
    choices = told.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    choice, delta = choices[0], choices[0].get("delta")
    if not isinstance(delta, dict) or choice.get("finish_reason") or choice.get("index", 0) != 0:
        return None
    said = [key for key, value in delta.items() if value and key != "role"]
    key = said[0] if len(said) == 1 else ""
    if key not in _find_string or chunk.count(b'"%s"' % key.encode()) != 1:
        return None
    found = _find_string[key](chunk)
    if found is None or json.loads(found[1].decode()) != delta[key]:
        return None
    return key, found.start(1), found.end(1)
