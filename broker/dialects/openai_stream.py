"""Reads a runtime's chat stream: passes it on under our model's name and learns how the generation went.

The common chunk is never parsed. It carries `"finish_reason":null`, no usage and no error, and a search in its bytes
can prove that: inside a JSON string every quote is escaped, so `"finish_reason"` or `"model":"…"` with bare quotes
and a colon is a key, never something that the model wrote.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from broker.dialects import json_splice, sse
from broker.errors import BadRequest

MAX_COMPLAINT_CHARS = 300  # enough to know the cause; a runtime may quote the whole prompt

_CONTENT_KEYS = ("content", "reasoning_content", "reasoning", "thinking", "refusal", "tool_calls", "function_call")
_FAILED_REASONS = frozenset({"error", "abort"})  # the runtime broke off, whatever it has sent so far
_GONE = re.compile(
    r"\bmodel ['\"`][^'\"`\s]{1,256}['\"`] (not found|does not exist)|\bmodel is not (found|loaded)", re.IGNORECASE
)
_REQUEST_TO_BLAME = re.compile(
    r"^(image|audio|video) input is not supported|^Failed to parse \w+: |\bJinja Exception: "
)
_find_null = re.compile(rb'"finish_reason"\s*:\s*null').search
_find_model = re.compile(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"').search


@dataclass(frozen=True, slots=True)
class RuntimeComplaint:
    """What a runtime said went wrong: its words, its own type or code, its status if the body names one."""

    message: str
    kind: str
    status: int | None

    @property
    def context_overflow(self) -> bool:
        """Whether prompt plus answer were too long for the runtime's context."""
        return (
            self.kind in ("exceed_context_size_error", "context_length_exceeded")
            or "maximum context length" in self.message
            or "maximum model length" in self.message
            or "too large to process" in self.message  # llama-server's 500 for an input beyond its batch
            or "input length exceeds" in self.message  # Ollama's, for an embedding
        )

    @property
    def of_the_request(self) -> bool:
        """Whether the request is to blame, whatever the status: llama-server answers 500 to pictures for a model that
        cannot see, and to messages, tools or a template's objections that it finds while it writes the prompt."""
        return _REQUEST_TO_BLAME.search(self.message) is not None

    @property
    def model_gone(self) -> bool:
        """Whether the runtime says that it does not have the model, or not any more: no fault of the request, whose
        model name is ours."""
        return _GONE.search(self.message) is not None


def read_complaint(body: bytes) -> RuntimeComplaint:
    """Reads an error body of any runtime: OpenAI's object, a bare `{"error": "…"}`, or plain text."""
    text = body.decode(errors="replace").strip()
    try:
        value: Any = json.loads(text.removeprefix("error:"))
    except (ValueError, RecursionError):
        value = None
    return _complaint(value) if isinstance(value, dict) else RuntimeComplaint(_short(text), "", None)


class ChatReader:
    """Takes a runtime's bytes in, however they were split, and gives the client's bytes out, whole events only.

    Nothing comes out before the first content (role-only chunks wait with it), so a generation that fails early
    leaves no trace and may start again elsewhere; an answer without content comes out after a good `end`.
    Comments, the runtime's `[DONE]` and its errors never come out: how a stream ends is for the gateway to say.
    """

    def __init__(self, served_as: str, include_usage: bool, n: int = 1) -> None:
        self.has_content = False
        self.finish_reasons: dict[int, str] = {}
        self.usage: dict[str, int] | None = None
        self.timings: dict[str, Any] | None = None
        self.complaint: RuntimeComplaint | None = None
        self.prompt_read: tuple[int, int] | None = None  # prompt tokens read so far, and of how many
        self._new_model = json_splice.encode(served_as)
        self._include_usage = include_usage
        self._n = n
        self._cutter = sse.EventCutter()
        self._seen: set[int] = set()
        self._ready: list[bytes] = []
        self._held_bytes = 0
        self._ended = self._done = False
        self._totals: list[dict[str, Any]] = []  # usages of chunks without a choice, where several choices are made
        self._last_chunk = b""
        # How this runtime spells what the byte check looks for, learnt from the first content chunk.
        self._old_name = self._new_name = self._null = b""

    @property
    def error(self) -> str | None:
        """What went wrong, in the runtime's words or ours, or None."""
        return self.complaint.message if self.complaint else None

    @property
    def succeeded(self) -> bool:
        """Whether every choice has a finish reason and nothing went wrong; `[DONE]` or a clean end prove nothing.

        Choices may be made one after the other, so all those asked for must have come. Only `[DONE]` says that this
        runtime makes fewer.
        """
        all_came = len(self.finish_reasons) >= (1 if self._done else self._n)
        return self.complaint is None and all_came and self._seen <= self.finish_reasons.keys()

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""
        if self.complaint is not None or self._ended:
            return
        blob = self._cutter.cut(data)
        if blob:
            if not self._pass_plain(blob):
                self._read_blob(blob)
        if self._cutter.overflowed:
            self._fail("the runtime sent an event that is too long")

    def end(self) -> None:
        """Tells that the runtime closed the stream; afterwards it has either succeeded or an error."""
        if self._ended:
            return
        rest = self._cutter.rest()
        if rest and self.complaint is None:  # a last event without its blank line, or a proxy's last words
            self._read_event(rest)
        self._ended = True
        if not self.succeeded:
            self._fail("the runtime ended the stream without a finish reason")
        elif self._last_chunk:
            changes = {"model": self._new_model, **self._of_all_choices()}
            renamed = json_splice.splice(self._last_chunk, changes, finite=False)
            self._ready.append(b"data: " + renamed + b"\n\n")

    def take(self) -> bytes:
        """Gives the client's bytes that are ready and not taken yet."""
        if not self._ready or not (self.has_content or (self._ended and self.succeeded)):
            return b""
        taken = self._ready[0] if len(self._ready) == 1 else b"".join(self._ready)
        self._ready.clear()
        return taken

    def _pass_plain(self, blob: bytes) -> bool:
        """Renames and passes on a blob that holds nothing but one-line chunks of a running single choice.

        That is proven by counting bytes. Cutting at the model's name shows that each event names it once: then a line
        break lies in every piece between two names.
        """
        if not self._null or self._n != 1 or not blob.startswith(b"data: {") or len(blob) > sse.MAX_EVENT_BYTES:
            return False
        events = blob.count(self._null)
        if (
            blob.count(b"\n") != 2 * events
            or blob.count(b"\n\ndata: {") != events - 1
            or blob.count(b'"finish_reason"') != events
            or b'"error"' in blob
            or b'"prompt_progress"' in blob
            or (b'"usage"' in blob and blob.count(b'"usage"') != blob.count(b'"usage":null'))
        ):
            return False
        pieces = blob.split(self._old_name)
        if len(pieces) != events + 1 or not all(b"\n" in piece for piece in pieces[1:-1]):
            return False
        self._ready.append(self._new_name.join(pieces))
        return True

    def _read_blob(self, blob: bytes) -> None:
        """Reads a blob of which some must be understood: its plain run at once if there is one, else event by event."""
        at, run_tried = 0, False
        while at < len(blob) and self.complaint is None:
            if self._null and not run_tried:
                run_tried = True  # once: a blob of nothing but odd events is not searched again and again
                run_end = _end_of_event(blob, max(at, blob.rfind(self._null)))
                if self._pass_plain(blob[at:run_end]):
                    at = run_end
                    continue
            end = _end_of_event(blob, at)
            event = blob[at:end]
            at = end
            if not (self._null and self._pass_plain(event)):
                self._read_event(event.removesuffix(b"\n\n"))

    def _read_event(self, event: bytes) -> None:
        if len(event) > sse.MAX_EVENT_BYTES:
            return self._fail("the runtime sent an event that is too long")
        name, data, stray = sse.read_event(event)
        if stray:
            return self._complain(read_complaint(stray))
        if data is None or self._is_empty(data.strip()):
            self._done |= data is not None and data.strip() == b"[DONE]"
            return None
        payload = data.replace(b"\n", b" ")
        try:
            chunk = json.loads(payload.decode())
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            return self._fail("the runtime sent an event that is not a JSON object")
        if name == b"error" or chunk.get("error") or chunk.get("object") == "error":
            return self._complain(_complaint(chunk))
        return self._read_chunk(payload, chunk)

    def _read_chunk(self, payload: bytes, chunk: dict[str, Any]) -> None:
        choices = chunk.get("choices")
        content = finished = False
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                content |= self._has_content(choice)
                finished |= self._read_finish(choice)
        progress = chunk.get("prompt_progress")
        if isinstance(progress, dict):
            self._read_progress(progress)
            if not (content or finished):  # we asked for it: no client sees it, no first token
                return
        self._read_figures(chunk, last=finished or not choices)
        self.has_content |= content
        total = not choices and isinstance(chunk.get("usage"), dict)
        if total and self._n > 1 and self._include_usage:
            self._last_chunk = payload  # llama.cpp tells the usage of each choice when that ends; ours is of all
            return
        if (total and not self._include_usage) or not isinstance(choices, list) or self.complaint is not None:
            return
        self._pass_on(payload, chunk, learn=content and not finished)
        if not self.has_content:
            self._held_bytes += len(payload)
            if self._held_bytes > sse.MAX_EVENT_BYTES:
                self._fail("the runtime sent too much before its first content")

    def _pass_on(self, payload: bytes, chunk: dict[str, Any], *, learn: bool) -> None:
        """Puts our model's name into a parsed chunk, and learns the exact bytes to replace in the chunks to come."""
        found = None
        if isinstance(chunk.get("model"), str) and payload.count(b'"model"') == 1:
            found = _find_model(payload)
        if found is None:  # no name, or more than one: only the parser can tell which is the chunk's own
            try:
                renamed = json_splice.splice(payload, {"model": self._new_model}, finite=False)
            except BadRequest:
                return self._fail("the runtime sent an event that cannot be read")
        else:
            old, new = found.group(), found.group(1) + self._new_model
            renamed = payload[: found.start()] + new + payload[found.end() :]
            if learn and (null := _find_null(payload)):
                self._old_name, self._new_name, self._null = old, new, null.group()
        self._ready.append(b"data: " + renamed + b"\n\n")
        return None

    def _of_all_choices(self) -> dict[str, object]:
        """What changes in the last chunk, so that it tells of all choices."""
        return {"usage": _whole_usage(self._totals)} if len(self._totals) > 1 else {}

    def _has_content(self, choice: dict[str, Any]) -> bool:
        delta = choice.get("delta")
        return isinstance(delta, dict) and any(delta.get(key) for key in _CONTENT_KEYS)

    def _is_empty(self, data: bytes) -> bool:
        return data in (b"", b"[DONE]")

    def _read_finish(self, choice: dict[str, Any]) -> bool:
        index = choice.get("index", 0)
        if not isinstance(index, int):
            return False
        self._seen.add(index)
        reason = choice.get("finish_reason")
        if not isinstance(reason, str) or not reason:
            return False
        self.finish_reasons[index] = reason
        if reason in _FAILED_REASONS:
            self._fail(f"the runtime broke off the generation (finish reason {reason})")
        return True

    def _read_progress(self, progress: dict[str, Any]) -> None:
        done, total = progress.get("processed"), progress.get("total")
        if isinstance(done, int) and isinstance(total, int):
            self.prompt_read = done, total

    def _read_figures(self, chunk: dict[str, Any], *, last: bool) -> None:
        """Keeps usage and timings; those of a running choice may be on every chunk, and most chunks are not parsed."""
        timings = chunk.get("timings")
        if last and isinstance(timings, dict):
            self.timings = timings
            if self.usage is None:
                self.usage = _usage_of_timings(timings)
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            if self._n > 1 and not chunk.get("choices"):
                self._totals.append(usage)
                usage = _whole_usage(self._totals)
            self.usage = _usage(usage, self.timings or {})

    def _fail(self, sentence: str) -> None:
        self._complain(RuntimeComplaint(sentence, "", None))

    def _complain(self, complaint: RuntimeComplaint) -> None:
        if self.complaint is None:  # the first cause counts
            self.complaint = complaint


def _end_of_event(blob: bytes, at: int) -> int:
    end = blob.find(b"\n\n", at)
    return end + 2 if end >= 0 else len(blob)


def _whole_usage(totals: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes one usage of those that came without a choice: the prompt is counted once, what was made adds up."""
    whole = dict(totals[-1])
    made = [count for total in totals if isinstance(count := total.get("completion_tokens"), int)]
    if len(totals) > 1 and len(made) == len(totals):
        whole["completion_tokens"] = sum(made)
        if isinstance(whole.get("prompt_tokens"), int):
            whole["total_tokens"] = whole["prompt_tokens"] + sum(made)
    return whole


def _usage(usage: dict[str, Any], timings: dict[str, Any]) -> dict[str, int]:
    """Reduces a usage object to the figures that we count; llama.cpp may tell cached tokens only in its timings."""
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    figures = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "cached_tokens": cached if isinstance(cached, int) else timings.get("cache_n"),
    }
    return {key: value for key, value in figures.items() if isinstance(value, int)}


def _usage_of_timings(timings: dict[str, Any]) -> dict[str, int] | None:
    cached, fresh, made = (timings.get(key) for key in ("cache_n", "prompt_n", "predicted_n"))
    if not isinstance(fresh, int) or not isinstance(made, int):
        return None
    cached = cached if isinstance(cached, int) else 0
    return {"prompt_tokens": cached + fresh, "completion_tokens": made, "cached_tokens": cached}


def _complaint(value: dict[str, Any]) -> RuntimeComplaint:
    error = value.get("error") or value
    if not isinstance(error, dict):
        return RuntimeComplaint(_short(str(error)), "", None)
    message = error.get("message") or error.get("detail") or "the runtime reported an error without words"
    code = error.get("code")
    kind = error.get("type") or (code if isinstance(code, str) else "")
    status = code if isinstance(code, int) else None
    return RuntimeComplaint(_short(str(message)), str(kind), status)


def _short(text: str) -> str:
    return " ".join(text.split())[:MAX_COMPLAINT_CHARS] or "the runtime reported an error without words"
