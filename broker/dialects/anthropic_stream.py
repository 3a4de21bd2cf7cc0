"""Reads a runtime's answer for an Anthropic client: its own events passed on, or a chat stream translated.

Both readers hold everything back until the first content, as `ChatReader` does, and say `message_stop` only when the
runtime has said how the generation ended.
"""

import json
import re
from typing import Any, Final

from broker.dialects import json_splice, sse
from broker.dialects.anthropic_blocks import Blocks
from broker.dialects.openai_stream import ChatReader, RuntimeComplaint, read_complaint
from broker.dialects.through_chat import ThroughChat

_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
_DELTA: Final = b'event: content_block_delta\ndata: {"type":"content_block_delta"'
_TEXTS: Final = ("text", "thinking", "partial_json")


_STRING: Final = (
    rb'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*"'  # as JSON has it, nothing else
)
_is_string = re.compile(_STRING).fullmatch
_KINDS: Final = {"content": ("text", "text")} | dict.fromkeys(_THOUGHTS, ("thinking", "thinking"))
_find_string = {key: re.compile(rb'"%s"\s*:\s*(%s)' % (key.encode(), _STRING)).search for key in _KINDS}


class TranslatingReader(ThroughChat):
    """Takes a chat stream in and gives Anthropic's events out.

    Most chunks differ from their neighbour in one string only. The bytes around it are remembered: between the same
    bytes a string goes over into the event as it is, unparsed.
    """

    def __init__(self, served_as: str, message_id: str = "") -> None:
        super().__init__(ChatReader(served_as, include_usage=True))
        self._served_as = served_as
        self._message_id = message_id
        self._ready: list[bytes] = []
        self._blocks = Blocks(self._say, message_id)
        self._started = self._ended = False
        self._reason = ""
        self._stopped_by: str | None = None
        self._head = self._tail = self._lead = b""  # around the string in a chunk, and before it in an event

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""
        self._chat.feed(data)
        self._translate()

    def end(self) -> None:
        """Tells that the runtime closed the stream; a good one ends here in the client's words, with its figures."""
        if self._ended:
            return
        self._ended = True
        self._chat.end()
        self._translate()
        if not self.succeeded:
            return
        self._start({})
        self._blocks.close()
        reason = _REASONS.get(self._reason, "end_turn")
        if self._blocks.called and reason == "end_turn":
            reason = "tool_use"
        if self._stopped_by is not None and reason == "end_turn":
            reason = "stop_sequence"
        delta = {"stop_reason": reason, "stop_sequence": self._stopped_by if reason == "stop_sequence" else None}
        self._say({"type": "message_delta", "delta": delta, "usage": _told_usage(self._chat.usage or {})})
        self._say({"type": "message_stop"})

    def take(self) -> bytes:
        """Gives the client's bytes that are ready and not taken yet."""
        taken = b"".join(self._ready)
        self._ready.clear()
        return taken

    def _say(self, event: dict[str, Any]) -> None:
        self._ready.append(_event(event))

    def _translate(self) -> None:
        for event in self._chat.take().split(b"\n\n"):
            if not event or self._broken is not None or self._pass_string(event):
                continue
            try:
                chunk = json.loads(event.removeprefix(b"data: ").decode())
                choices = [choice for choice in chunk["choices"] if isinstance(choice, dict)]
            except (ValueError, KeyError, TypeError, RecursionError):  # a chunk that chat passes on unparsed
                self._breaks()
                return
            self._start(chunk)
            for choice in choices:
                self._read_choice(choice)
            self._learn(event, choices)

    def _pass_string(self, event: bytes) -> bool:
        """Tells a chunk that is the last one but for its string."""
        if not (self._head and event.startswith(self._head) and event.endswith(self._tail)):
            return False
        text = event[len(self._head) : -len(self._tail)]
        if not _is_string(text) or not (text.isascii() or _is_utf8(text)):
            return False
        if text != b'""':
            self._ready.append(self._lead + text + b"}}\n\n")
        return True

    def _learn(self, event: bytes, choices: list[dict[str, Any]]) -> None:
        """Remembers the bytes around the one string of a chunk that adds to the open block and says nothing else."""
        self._head = b""
        delta = choices[0].get("delta") if len(choices) == 1 else None
        if not isinstance(delta, dict) or choices[0].get("finish_reason"):
            return
        said = [key for key, value in delta.items() if value and key != "role"]
        key = said[0] if len(said) == 1 else ""
        if key not in _KINDS or event.count(b'"%s"' % key.encode()) != 1:
            return
        kind, field = _KINDS[key]
        index, found = self._blocks.running(kind), _find_string[key](event)
        if index is None or found is None:
            return
        self._head, self._tail = event[: found.start(1)], event[found.end(1) :]
        start = {"type": "content_block_delta", "index": index, "delta": {"type": f"{kind}_delta", field: ""}}
        self._lead = _event(start).removesuffix(b'""}}\n\n')

    def _start(self, chunk: dict[str, Any]) -> None:
        if self._started:
            return
        self._started = True
        name = self._message_id or str(chunk.get("id") or "").removeprefix("chatcmpl-")
        prompt = self._chat.prompt_read[1] if self._chat.prompt_read else 0
        message: dict[str, Any] = {
            "id": f"msg_{name or 0}",
            "type": "message",
            "role": "assistant",
            "model": self._served_as,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # How the prompt divides is known at the end only: `message_delta` tells it.
            "usage": {"input_tokens": prompt, "output_tokens": 0},
        }
        self._say({"type": "message_start", "message": message})

    def _read_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        if isinstance(delta, dict):
            thought = next((delta[key] for key in _THOUGHTS if isinstance(delta.get(key), str) and delta[key]), "")
            if thought:
                self._blocks.think(thought)
            for key in ("content", "refusal"):
                if isinstance(delta.get(key), str) and delta[key]:
                    self._blocks.say(delta[key])
            calls = delta.get("tool_calls")
            for fragment in calls if isinstance(calls, list) else ():
                if isinstance(fragment, dict):
                    self._blocks.call(fragment)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self._reason = reason
            word = choice.get("stop_reason")  # vLLM's: the stop string that ended it
            self._stopped_by = word if isinstance(word, str) and word else None


class PassingReader:
    """Takes the events of a runtime that speaks the dialect and passes them on under our model's name.

    Its pings and comments never come out: how a wait sounds is for the gateway to say.
    """

    timings: dict[str, Any] | None = None  # nobody tells them here
    prompt_read: tuple[int, int] | None = None

    def __init__(self, served_as: str) -> None:
        self.has_content = False
        self.usage: dict[str, int] | None = None
        self.complaint: RuntimeComplaint | None = None
        self._served_as = served_as
        self._cutter = sse.EventCutter()
        self._ready: list[bytes] = []
        self._held_bytes = 0
        self._counts: dict[str, int] = {}
        self._stop_reason = self._stopped = self._ended = False

    @property
    def error(self) -> str | None:
        """What went wrong, in the runtime's words or ours, or None."""
        return self.complaint.message if self.complaint else None

    @property
    def succeeded(self) -> bool:
        """Whether the runtime told why it stopped, said `message_stop`, and nothing went wrong."""
        return self.complaint is None and self._stop_reason and self._stopped

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""
        if self.complaint is not None or self._ended:
            return
        for event in self._cutter.cut(data).split(b"\n\n"):
            if event and self.complaint is None and not self._stopped:
                self._read(event)
        if self._cutter.overflowed:
            self._fail("the runtime sent an event that is too long")

    def end(self) -> None:
        """Tells that the runtime closed the stream; afterwards it has either succeeded or an error."""
        if self._ended:
            return
        rest = self._cutter.rest()
        if rest and self.complaint is None and not self._stopped:
            self._read(rest)
        self._ended = True
        if not self.succeeded:
            self._fail("the runtime ended the stream without message_stop")

    def take(self) -> bytes:
        """Gives the client's bytes that are ready and not taken yet."""
        if not self._ready or not (self.has_content or (self._ended and self.succeeded)):
            return b""
        taken = b"".join(self._ready)
        self._ready.clear()
        return taken

    def _read(self, event: bytes) -> None:
        if self.has_content and event.startswith(_DELTA) and event.count(b"\n") == 1:
            self._ready.append(event + b"\n\n")
            return
        name, data, stray = sse.read_event(event)
        if stray:
            return self._complain(read_complaint(stray))
        if data is None:
            return
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            return self._fail("the runtime sent an event that is not a JSON object")
        kind = told.get("type")
        if name == b"error" or kind == "error" or told.get("error"):
            return self._complain(read_complaint(data))
        if kind == "ping":
            return
        if kind == "message_start" and isinstance(told.get("message"), dict):
            self._count(told["message"].get("usage"))
            renamed = json_splice.encode({**told["message"], "model": self._served_as})
            data = json_splice.splice(data, {"message": renamed}, finite=False)
        elif kind == "message_delta":
            self._count(told.get("usage"))
            delta = told.get("delta")
            self._stop_reason |= isinstance(delta, dict) and bool(delta.get("stop_reason"))
        elif kind == "message_stop":
            self._stopped = True
        self.has_content |= _holds_content(told)
        line = f"event: {kind}\n".encode() if isinstance(kind, str) and not name else b"event: " + name + b"\n"
        self._ready.append(line + b"data: " + data.replace(b"\n", b" ") + b"\n\n")
        if not self.has_content:
            self._held_bytes += len(data)
            if self._held_bytes > sse.MAX_EVENT_BYTES:
                self._fail("the runtime sent too much before its first content")

    def _count(self, usage: object) -> None:
        """Keeps the figures of the last event that tells them; the prompt's parts come apart and are added up."""
        if not isinstance(usage, dict):
            return
        self._counts |= {key: value for key, value in usage.items() if isinstance(value, int)}
        told = self._counts.get
        cached = told("cache_read_input_tokens", 0)
        self.usage = {
            "prompt_tokens": told("input_tokens", 0) + cached + told("cache_creation_input_tokens", 0),
            "completion_tokens": told("output_tokens", 0),
            "cached_tokens": cached,
        }

    def _fail(self, sentence: str) -> None:
        self._complain(RuntimeComplaint(sentence, "", None))

    def _complain(self, complaint: RuntimeComplaint) -> None:
        if self.complaint is None:  # the first cause counts
            self.complaint = complaint


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _holds_content(told: dict[str, Any]) -> bool:
    if told.get("type") == "content_block_start":
        block = told.get("content_block")
        return isinstance(block, dict) and (
            block.get("type") == "tool_use" or any(block.get(key) for key in ("text", "thinking"))
        )
    delta = told.get("delta")
    return told.get("type") == "content_block_delta" and isinstance(delta, dict) and any(delta.get(k) for k in _TEXTS)


def _told_usage(usage: dict[str, int]) -> dict[str, int]:
    """Writes the figures as this dialect counts them: the cached part of the prompt is none of its input."""
    cached = usage.get("cached_tokens", 0)
    return {
        "input_tokens": max(0, usage.get("prompt_tokens", 0) - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens", 0),
    }


def _event(told: dict[str, Any]) -> bytes:
    body = json_splice.encode(told)
    return b"event: %s\ndata: %s\n\n" % (told["type"].encode(), body)
