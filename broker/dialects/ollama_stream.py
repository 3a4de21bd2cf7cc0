"""Reads a generation for a client of the Ollama dialect: an Ollama's own lines, or the stream of a chat endpoint.

Both readers take a runtime's bytes in, however they were split, and give whole lines of the dialect out. Nothing comes
out before the first content, so a generation that fails early leaves no trace and may start again elsewhere; the line
with `done` comes out after a good `end` only.
"""

import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

from broker.dialects import json_splice
from broker.dialects.ndjson import LineCutter
from broker.dialects.ollama_pieces import arguments_of, call_as_text, logprobs_of, merge_call
from broker.dialects.ollama_request import Shape
from broker.dialects.openai_stream import ChatReader, RuntimeComplaint, read_complaint
from broker.dialects.sse import MAX_EVENT_BYTES
from broker.dialects.through_chat import ThroughChat
from broker.errors import BadRequest

_REASONS = {"tool_calls": "stop", "function_call": "stop"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_RUNNING = b',"done":false}'
_plain_text = re.compile(rb'"(?:[ !#-\[\]-~]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))+"').fullmatch
_find_text = {
    key: re.compile(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % key.encode()).search for key in ("content", *_REASONING)
}


def instant(now_ns: int) -> str:
    """Writes an instant as the dialect does, in UTC."""
    seconds, rest = divmod(now_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06d}Z"


def line(shape: Shape, model: str, now_ns: int, said: dict[str, object] | None = None, **more: object) -> bytes:
    """Writes one line. ASCII throughout: clients also take U+2028 and its kin for the end of a line."""
    answer: dict[str, object] = {"model": model, "created_at": instant(now_ns)}
    if shape == "chat":
        answer["message"] = {"role": "assistant", "content": "", **(said or {})}
    else:
        spoken = dict(said or {})
        answer |= {"response": spoken.pop("content", ""), **spoken}
    return json_splice.encode({**answer, "done": False, **more}) + b"\n"


class NativeReader:
    """Passes an Ollama's lines on under our model's name.

    Success is a line with `done` and a reason: an Ollama that breaks off says neither, or writes a line with `error`
    under its 200.
    """

    def __init__(self, served_as: str) -> None:
        self.has_content = False
        self.usage: dict[str, int] | None = None
        self.timings: dict[str, Any] | None = None  # what it tells counts cached tokens in ways that differ
        self.complaint: RuntimeComplaint | None = None
        self.prompt_read: tuple[int, int] | None = None
        self._new_model = json_splice.encode(served_as)
        self._cutter = LineCutter()
        self._ready: list[bytes] = []
        self._last = b""  # the line with `done`, which waits for the end
        self._held_bytes = 0
        self._ended = False
        self._old_head = self._new_head = b""  # how this Ollama begins a line, learnt from the first content

    @property
    def error(self) -> str | None:
        """What went wrong, in the runtime's words or ours, or None."""
        return self.complaint.message if self.complaint else None

    @property
    def succeeded(self) -> bool:
        """Whether it said that it is done and why, and nothing went wrong."""
        return bool(self._last) and self.complaint is None

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""
        if self.complaint is not None or self._ended:
            return
        for found in self._cutter.cut(data):
            if self.complaint is None and not self._pass_plain(found):
                self._read(found)
        if self._cutter.overflowed:
            self._fail("the runtime sent a line that is too long")

    def end(self) -> None:
        """Tells that the runtime closed the answer; afterwards it has either succeeded or an error."""
        if self._ended:
            return
        rest = self._cutter.rest()
        if rest.strip() and self.complaint is None:
            self._read(rest)
        self._ended = True
        if self.succeeded:
            self._ready.append(self._last)
        elif self.complaint is None:
            self._fail("the runtime ended the answer without saying that it is done")

    def take(self) -> bytes:
        """Gives the client's bytes that are ready and not taken yet."""
        if not self._ready or not (self.has_content or (self._ended and self.succeeded)):
            return b""
        taken = b"".join(self._ready)
        self._ready.clear()
        return taken

    def _pass_plain(self, found: bytes) -> bool:
        """Renames and passes on a line of a running answer without parsing it.

        Inside a JSON string every quote is escaped, so a bare `"model"` or `"error"` is a key; and what stands before
        the last brace of a line is a member of its outermost object.
        """
        if (
            not self._old_head
            or self._last
            or not found.startswith(self._old_head)
            or not found.endswith(_RUNNING)
            or found.count(b'"model"') != 1
            or b'"error"' in found
        ):
            return False
        self._ready.append(self._new_head + found[len(self._old_head) :] + b"\n")
        return True

    def _read(self, found: bytes) -> None:
        try:
            members = json_splice.scan(found, finite=False)
        except BadRequest:
            return self._fail("the runtime sent a line that is not a JSON object")
        said = {member.key: member.value for member in members}
        if said.get("error"):
            self.complaint = read_complaint(found)
            return None
        if self._last:  # it has said that it is done
            return None
        self.has_content |= _says_something(said)
        renamed = json_splice.splice_members(found, members, {"model": self._new_model}) + b"\n"
        if said.get("done") is not True:
            self._ready.append(renamed)
            if self.has_content:
                self._learn(found, members)
            else:
                self._held_bytes += len(renamed)
                if self._held_bytes > MAX_EVENT_BYTES:
                    self._fail("the runtime sent too much before its first content")
            return None
        if not isinstance(said.get("done_reason"), str) or not said["done_reason"]:
            return self._fail("the runtime broke off the generation")
        self._last = renamed
        counts = {"prompt_tokens": said.get("prompt_eval_count"), "completion_tokens": said.get("eval_count")}
        self.usage = {key: value for key, value in counts.items() if isinstance(value, int)} or None
        return None

    def _learn(self, found: bytes, members: list[json_splice.Member]) -> None:
        first = members[0]
        if first.key == "model" and isinstance(first.value, str):
            self._old_head = found[: first.end] + b","
            self._new_head = found[: first.start] + self._new_model + b","

    def _fail(self, sentence: str) -> None:
        if self.complaint is None:  # the first cause counts
            self.complaint = RuntimeComplaint(sentence, "", None)


class FromChat(ThroughChat):
    """Translates a chat stream: text and reasoning as they come, tool calls whole once all of them are there.

    Most chunks differ from their neighbour in one string only. The bytes around it are remembered, and a string of
    plain ASCII goes over into the line as it is.
    """

    def __init__(
        self, served_as: str, *, shape: Shape, waited_ns: int = 0, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        super().__init__(ChatReader(served_as, include_usage=False))
        self._served_as = served_as
        self._shape = shape
        self._waited_ns = waited_ns
        self._now_ns = now_ns
        self._began = now_ns()
        self._first_content = self._last_content = 0
        self._calls: list[dict[str, Any]] = []
        self._spoke = False
        self._ready: list[bytes] = []
        self._ended = False
        self._around = b"", b""  # the text of a chunk
        self._before = self._behind = b""  # the text of its line, after the instant
        self._start = b'{"model":' + json_splice.encode(served_as) + b',"created_at":"'
        self._second, self._stamp = -1, b""

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""
        self._chat.feed(data)
        self._translate(self._chat.take())

    def end(self) -> None:
        """Tells that the runtime closed the stream; afterwards it has either succeeded or an error."""
        if self._ended:
            return
        self._ended = True
        self._chat.end()
        self._translate(self._chat.take())
        if self.succeeded:
            self._tell_calls()
            self._ready.append(self._done())

    def take(self) -> bytes:
        """Gives the client's bytes that are ready and not taken yet."""
        taken = b"".join(self._ready)
        self._ready.clear()
        return taken

    def _translate(self, events: bytes) -> None:
        head, tail = self._around
        for event in events.split(b"\n\n"):
            if not event or self._broken is not None:
                continue
            if head and event.startswith(head) and event.endswith(tail):
                text = event[len(head) : len(event) - len(tail)]
                if _plain_text(text):
                    self._pass_text(text)
                    continue
            try:
                chunk = json.loads(event.removeprefix(b"data: "))
                told = [self._read_choice(choice) for choice in chunk["choices"]]
                head, tail = self._around = self._learn(event, told[0] if len(told) == 1 else "")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self._breaks()

    def _pass_text(self, text: bytes) -> None:
        now = self._last_content = self._now_ns()
        seconds, rest = divmod(now, 1_000_000_000)
        if seconds != self._second:
            self._second, self._stamp = seconds, self._start + instant(now)[:20].encode()
        self._ready.append(b"%s%06d%s%s%s" % (self._stamp, rest // 1000, self._before, text, self._behind))

    def _learn(self, event: bytes, key: str) -> tuple[bytes, bytes]:
        """Gives the bytes around the only text of an event, and prepares those around it in its line."""
        found = _find_text[key](event) if key else None
        if found is None or event.count(b'"%s"' % key.encode()) != 1:
            return b"", b""
        mark = line(self._shape, "", 0, {"content" if key == "content" else "thinking": "x"})
        self._before, self._behind = mark[mark.index(b"Z") :].split(b'"x"')
        return event[: found.start(1)], event[found.end(1) :]

    def _read_choice(self, choice: dict[str, Any]) -> str:
        """Tells what a choice says; gives the key of its text, if that is all."""
        delta = choice.get("delta") or {}
        said: dict[str, object] = {}
        keys = []
        for key, name in (("content", "content"), ("refusal", "content"), *((key, "thinking") for key in _REASONING)):
            if isinstance(delta.get(key), str) and delta[key]:
                keys.append(key)
                said.setdefault(name, delta[key])  # some runtimes say their reasoning under two names
        fragments = delta.get("tool_calls") or []
        for fragment in fragments:
            merge_call(self._calls, fragment)
        more = {"logprobs": found} if (found := logprobs_of(choice.get("logprobs"))) else {}
        if said or fragments:
            self._last_content = self._now_ns()
            self._first_content = self._first_content or self._last_content
        if said or more or (fragments and not self._spoke):  # a call is a first token before it can be told
            self._spoke = True
            self._ready.append(line(self._shape, self._served_as, self._now_ns(), said, **more))
        if choice.get("finish_reason"):
            self._tell_calls()
            return ""
        return keys[0] if len(keys) == 1 and keys[0] in _find_text and not fragments and not more else ""

    def _tell_calls(self) -> None:
        """Tells the calls. One whose arguments are no object is none (the model was cut off, or erred): it is told as
        the text that it is, for a client would run it with what it has."""
        calls, self._calls = self._calls, []
        whole: list[dict[str, object]] = []
        text: list[str] = []
        for call in calls:
            name, arguments = call["name"], arguments_of(call["arguments"])
            if arguments is None or not name:
                text.append(call_as_text(name, call["arguments"]))
                continue
            told: dict[str, object] = {"id": call["id"]} if call["id"] else {}
            told["function"] = {"index": len(whole), "name": name, "arguments": arguments}
            whole.append(told)
        if text:
            self._ready.append(line(self._shape, self._served_as, self._now_ns(), {"content": "\n".join(text)}))
        if whole:
            self._ready.append(line(self._shape, self._served_as, self._now_ns(), {"tool_calls": whole}))

    def _done(self) -> bytes:
        now = self._now_ns()
        reason = next(iter(self._chat.finish_reasons.values()))
        usage, timings = self._chat.usage or {}, self._chat.timings or {}
        read_ns = max(0, (self._first_content or now) - self._began)
        wrote_ns = max(0, self._last_content - self._first_content)
        figures = {
            "done_reason": _REASONS.get(reason, reason),
            "total_duration": self._waited_ns + max(0, now - self._began),
            "load_duration": self._waited_ns,
            "prompt_eval_count": usage.get("prompt_tokens"),
            "prompt_eval_duration": _in_ns(timings.get("prompt_ms"), read_ns),
            "eval_count": usage.get("completion_tokens"),
            "eval_duration": _in_ns(timings.get("predicted_ms"), wrote_ns),
        }
        told = {key: value for key, value in figures.items() if value is not None}
        return line(self._shape, self._served_as, now, None, done=True, **told)


def _says_something(said: dict[str, Any]) -> bool:
    message = said.get("message")
    if isinstance(message, dict) and any(message.get(key) for key in ("content", "thinking", "tool_calls", "images")):
        return True
    return any(said.get(key) for key in ("response", "thinking", "tool_calls", "image"))


def _in_ns(told_ms: object, seen_ns: int) -> int:
    return int(told_ms * 1_000_000) if isinstance(told_ms, int | float) and math.isfinite(told_ms) else seen_ns
