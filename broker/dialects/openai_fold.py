"""Folds a chat stream into the one object that a `stream:false` client waits for."""

import json
import re
from collections.abc import Iterable
from typing import Any

_QUIET_CHOICE_KEYS = frozenset({"index", "delta", "finish_reason", "logprobs"})
_find_text = {
    key: re.compile(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % key.encode()).search
    for key in ("content", "reasoning_content", "reasoning", "thinking")
}


def fold_chat(chunks: Iterable[bytes] | bytes) -> dict[str, Any]:
    """Makes one `chat.completion` of a stream in the client's dialect; comments and `[DONE]` are skipped.

    Raises ValueError where the stream carries an error: that is no answer.
    """
    stream = chunks if isinstance(chunks, bytes) else b"".join(chunks)
    fold = _Fold()
    head = tail = b""
    for event in stream.split(b"\n\n"):
        if head and event.startswith(head) and event.endswith(tail):
            fold.run.append(event[len(head) : -len(tail)])
        elif event.startswith(b"data: ") and event != b"data: [DONE]":
            head, tail = fold.add(event)
    return fold.result()


class _Fold:
    """The answer as far as it has been read.

    Most chunks differ from their neighbour in one string only. The bytes around that string are remembered, so that
    a run of such chunks costs one parse of all its strings together.
    """

    def __init__(self) -> None:
        self.run: list[bytes] = []  # what stood between head and tail in the events after the last parsed one
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._around = b"", b""
        self._place = 0, "content"

    def add(self, event: bytes) -> tuple[bytes, bytes]:
        """Parses an event and gives the bytes around its text; both are empty if it adds more than one text."""
        self._end_run()
        chunk = json.loads(event[6:].decode())  # of bytes, the parser would guess the encoding each time
        self._merge(chunk)
        self._around = self._learn(event, chunk)
        return self._around

    def result(self) -> dict[str, Any]:
        self._end_run()
        answer: dict[str, Any] = {key: self._top.pop(key) for key in ("id", "object", "created") if key in self._top}
        answer["object"] = "chat.completion"
        if "model" in self._top:
            answer["model"] = self._top.pop("model")
        answer["choices"] = [_close(self._choices[index]) for index in sorted(self._choices)]
        return answer | self._top

    def _learn(self, event: bytes, chunk: dict[str, Any]) -> tuple[bytes, bytes]:
        choices = chunk.get("choices")
        if not isinstance(choices, list) or len(choices) != 1:
            return b"", b""
        choice = choices[0]
        said = {key: value for key, value in (choice.get("delta") or {}).items() if value and key != "role"}
        key = next(iter(said), "")
        quiet = choice.get("finish_reason") is None and choice.get("logprobs") is None
        if len(said) != 1 or key not in _find_text or not quiet or not choice.keys() <= _QUIET_CHOICE_KEYS:
            return b"", b""
        found = _find_text[key](event)
        if not found or event.count(b'"%s"' % key.encode()) != 1:
            return b"", b""
        self._place = choice.get("index", 0), key
        return event[: found.start(1)], event[found.end(1) :]

    def _end_run(self) -> None:
        run, self.run = self.run, []
        if not run:
            return
        try:
            pieces = json.loads(b"[" + b",".join(run) + b"]")
        except ValueError:
            pieces = []
        if pieces and all(type(piece) is str for piece in pieces):
            index, key = self._place
            message = self._choices[index]["message"]
            message[key] = (message.get(key) or "") + "".join(pieces)
        else:  # the same bytes around, but more than one text between them
            head, tail = self._around
            for middle in run:
                self._merge(json.loads((head + middle + tail)[6:]))

    def _merge(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error"):
            raise ValueError("the stream carries an error")
        for key, value in chunk.items():
            if key != "choices" and (value is not None or key not in self._top):
                self._top[key] = value
        for part in chunk.get("choices") or ():
            choice = self._choices.setdefault(
                part.get("index", 0), {"index": part.get("index", 0), "message": {}, "finish_reason": None}
            )
            for key, value in part.items():
                if key == "delta":
                    _merge_delta(choice["message"], value or {})
                elif key == "logprobs":
                    choice["logprobs"] = extended(choice.get("logprobs"), value)
                elif isinstance(value, list) and isinstance(choice.get(key), list):
                    choice[key] = choice[key] + value
                elif value is not None or key not in choice:
                    choice[key] = value


def _merge_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds a delta: strings are pieces and follow each other, a role is said once, calls have rules of their own."""
    for key, value in delta.items():
        known = message.get(key)
        if key == "tool_calls":
            calls = message.setdefault(key, [])
            for fragment in value or ():
                _merge_call(calls, fragment)
        elif key == "function_call" and isinstance(value, dict):
            _merge_function(message.setdefault(key, {}), value)
        elif key != "role" and isinstance(known, str) and isinstance(value, str):
            message[key] = known + value
        elif isinstance(known, list) and isinstance(value, list):
            message[key] = known + value
        elif value is not None or key not in message:
            message[key] = value


def _merge_call(calls: list[dict[str, Any]], fragment: dict[str, Any]) -> None:
    """Finds the call that a fragment continues; a second id with a name at the same index is a call of its own.

    Some Ollama versions number every call 0.
    """
    index = fragment.get("index", len(calls))
    function = fragment.get("function") or {}
    call = next((known for known in reversed(calls) if known["index"] == index), None)
    if call is None or (function.get("name") and fragment.get("id") not in (None, "", call["id"])):
        call = {"index": index, "id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        calls.append(call)
    for key, value in fragment.items():
        if key == "function":
            _merge_function(call["function"], function)
        elif value not in (None, "") and key != "index":
            call[key] = value


def _merge_function(known: dict[str, Any], piece: dict[str, Any]) -> None:
    for key, value in piece.items():
        if key == "arguments" and isinstance(value, str):
            known[key] = (known.get(key) or "") + value
        elif value not in (None, "") or key not in known:
            known[key] = value


def extended(known: dict[str, Any] | None, more: dict[str, Any] | None) -> dict[str, Any] | None:
    """Joins the lists of two logprobs objects."""
    if known is None or more is None:
        return more if known is None else known
    joined = dict(known)
    for key, value in more.items():
        both_lists = isinstance(value, list) and isinstance(joined.get(key), list)
        joined[key] = joined[key] + value if both_lists else (value if value is not None else joined.get(key))
    return joined


def _close(choice: dict[str, Any]) -> dict[str, Any]:
    """Gives a choice its final form: a role, content that is null beside bare tool calls, calls without an index."""
    message = {"role": "assistant", "content": None} | choice["message"]
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    if not message["content"]:
        message["content"] = None if calls or message.get("function_call") else ""
    return choice | {"message": message}
