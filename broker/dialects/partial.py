"""What a client has been told of an answer so far, if that is plain text: read out of the frames that it was sent.

One function for each dialect: events in, `Partial` out, None where there is more than text (a thought, a call, a second
block or choice, figures of single tokens, a finish), so that no text alone could be gone on from.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_THINKS = re.compile(r"\s*(<think|<reasoning|\[THINK\]|<\|channel)", re.IGNORECASE)
"""How thoughts begin that a runtime did not take out of the text: what follows cannot be told from them."""


@dataclass(frozen=True, slots=True)
class Partial:
    """The text so far, in how many pieces it was told, and the names and numbers that its rest must carry on."""

    text: str = ""
    pieces: int = 0  # about its tokens: runtimes tell each token as it is made
    chunk_id: str = ""  # OpenAI's chunks: all of an answer have the same
    created: int = 0
    next_number: int = 0  # of a Responses event

    @property
    def asked(self) -> str:
        """What a runtime is asked to go on from. The space at its end is left to be written once more: some chat
        templates cut it off, and the rest would begin with a second one."""
        return self.text.rstrip()


class _NotPlain(Exception):
    """There is more than text."""


def chat(log: bytes) -> Partial | None:
    """OpenAI's chat."""
    return _of_chunks(log, _delta_text)


def completion(log: bytes) -> Partial | None:
    """OpenAI's older completions."""
    return _of_chunks(log, lambda choice: choice.get("text"))


def messages(log: bytes) -> Partial | None:
    """Anthropic's messages: one block of text that is open."""

    def read() -> Iterator[str]:
        for event in _events(log):
            kind, index = event.get("type"), event.get("index", 0)
            if kind in ("message_start", "ping"):
                continue
            part = event.get("content_block" if kind == "content_block_start" else "delta")
            if kind not in ("content_block_start", "content_block_delta") or index != 0 or not isinstance(part, dict):
                raise _NotPlain
            if part.get("type") not in ("text", "text_delta") or part.get("citations"):
                raise _NotPlain
            yield _text(part.get("text"))

    return _gathered(read)


def responses(log: bytes) -> Partial | None:
    """OpenAI's responses: one message that is open."""
    last = -1

    def read() -> Iterator[str]:
        nonlocal last
        for event in _events(log):
            last = max(last, event["sequence_number"])
            match event.get("type"):
                case "response.created" | "response.in_progress":
                    continue
                case "response.output_item.added" if event["item"]["type"] == "message":
                    continue
                case "response.content_part.added" if event["part"]["type"] == "output_text":
                    continue
                case "response.output_text.delta":
                    yield _text(event["delta"])
                case _:
                    raise _NotPlain

    return _gathered(read, lambda: {"next_number": last + 1})


def ollama(log: bytes) -> Partial | None:
    """An Ollama's chat and generate."""

    def read() -> Iterator[str]:
        for line in log.split(b"\n"):
            if not line:
                continue
            said = json.loads(line)
            message = said.get("message", said)
            more = ("thinking", "tool_calls", "images", "image")
            if said.get("done") or said.get("error") or said.get("logprobs") or any(message.get(key) for key in more):
                raise _NotPlain
            yield _text(message.get("content", message.get("response")))

    return _gathered(read)


def _of_chunks(log: bytes, text_of: Callable[[dict[str, Any]], Any]) -> Partial | None:
    names: dict[str, Any] = {}

    def read() -> Iterator[str]:
        for chunk in _events(log):
            if not names:
                names.update(chunk_id=_text(chunk.get("id")), created=int(chunk.get("created") or 0))
            for choice in chunk["choices"]:
                if choice.get("index", 0) != 0 or choice.get("finish_reason") or choice.get("logprobs"):
                    raise _NotPlain
                yield _text(text_of(choice))

    return _gathered(read, lambda: names)


def _delta_text(choice: dict[str, Any]) -> Any:
    delta = choice.get("delta") or {}
    if any(value for key, value in delta.items() if key not in ("role", "content")):
        raise _NotPlain
    return delta.get("content")


def _gathered(read: Callable[[], Iterator[str]], more: Callable[[], dict[str, Any]] = dict) -> Partial | None:
    try:
        pieces = [piece for piece in read() if piece]
    except (_NotPlain, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # or nothing that we know
        return None
    text = "".join(pieces)
    return None if _THINKS.match(text) else Partial(text=text, pieces=len(pieces), **more())


def _events(log: bytes) -> Iterator[dict[str, Any]]:
    for event in log.split(b"\n\n"):
        data = event[event.find(b"data: ") + 6 :] if b"data: " in event else b""
        if data:
            found = json.loads(data)
            if found.get("error"):
                raise _NotPlain
            yield found


def _text(value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise _NotPlain
    return value or ""
