"""How a runtime is asked to go on with a half-told answer, and how what it says is fitted to what was told.

It is asked with the text so far as the last message, which the model is to go on with: `continue_final_message` where
the runtime knows that, else a bare assistant message at the end. What comes out is made the rest of one answer: under
the same id, without a second role, and without the text so far where the runtime repeats it.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from broker.dialects import json_splice, sse
from broker.dialects.openai_stream import RuntimeComplaint
from broker.dialects.partial import Partial

ECHO_PIECES: Final = 3
"""A first piece that begins with all of the text so far is no echo while that text is as short as a token or two."""

_LIMITS: Final = ("max_tokens", "max_completion_tokens", "n_predict")
_FORMS: Final = (
    "grammar",
    "json_schema",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "format",
    "functions",
)
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
_FLAGS: Final[Mapping[str, object]] = {"continue_final_message": True, "add_generation_prompt": False}


def chat_may_go_on(request: Mapping[str, Any]) -> bool:
    """Whether the answer to a chat request can be gone on from in the middle: one answer, free text, begun by the model
    itself. A form that the answer must have (JSON, a grammar, a call that must come) begins anew in its middle."""
    messages = request.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") == "assistant":
        return False
    form = request.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        return False
    choice = request.get("tool_choice")
    return (
        request.get("n") in (None, 1)
        and choice in (None, "auto", "none")
        and not request.get("logprobs")
        and not any(request.get(key) for key in _FORMS)
    )


def completion_may_go_on(request: Mapping[str, Any]) -> bool:
    """Whether the answer to a request for a completion can be gone on from: one text behind one prompt."""
    more = ("suffix", "echo", "logprobs", "response_format", *_FORMS)
    return (
        isinstance(request.get("prompt"), str)
        and request.get("n") in (None, 1)
        and request.get("best_of") in (None, 1)
        and not any(request.get(key) for key in more)
    )


def ask_chat_on(body: bytes, partial: Partial, *, flags: bool) -> bytes:
    """Adds the text so far to a chat request that is ready for its runtime; every other byte stays as it is.

    `flags`: the runtime is told in its own words not to begin a new turn.
    """
    members = json_splice.scan(body)
    changes = _less(members, partial)
    if partial.asked:
        messages = next(member for member in reversed(members) if member.key == "messages")
        told = json_splice.encode({"role": "assistant", "content": partial.asked})
        changes["messages"] = body[messages.start : messages.end].removesuffix(b"]") + b"," + told + b"]"
        changes |= _FLAGS if flags else {}
    return json_splice.splice_members(body, members, changes)


def ask_completion_on(body: bytes, partial: Partial) -> bytes:
    """Puts the text so far behind the prompt: no template changes it, and the text goes on where the prompt ends."""
    members = json_splice.scan(body)
    prompt = next(member.value for member in reversed(members) if member.key == "prompt")
    return json_splice.splice_members(body, members, {**_less(members, partial), "prompt": prompt + partial.text})


def _less(members: list[json_splice.Member], partial: Partial) -> dict[str, object]:
    """The bound of the answer, less what of it was told."""
    limits = [m for m in members if m.key in _LIMITS and isinstance(m.value, int) and m.value > 0]
    return {m.key: max(1, m.value - partial.pieces) for m in limits}


class Rest:
    """Makes the chunks of a continued answer those of the answer that was broken off. Chunks in, chunks out.

    Figures are told for the whole: of the prompt, as if it had been asked once, and of all tokens that the client got.
    Those of earlier attempts are counted by their pieces.
    """

    def __init__(self, partial: Partial, *, echoes: bool, completion: bool = False) -> None:
        self.begun = False  # something new has come
        self.complaint: RuntimeComplaint | None = None
        self.prompt_read: tuple[int, int] | None = None
        self._partial = partial
        self._completion = completion
        self._echo = partial.asked.lstrip() if echoes or partial.pieces >= ECHO_PIECES else ""
        self._gap = partial.text[len(partial.asked) :]
        if completion:
            self._echo = self._gap = ""
        self._cutter = sse.EventCutter()

    def feed(self, data: bytes) -> bytes:
        """Takes what came from the network, and gives the chunks that are whole."""
        return b"".join(self._event(event) for event in self._cutter.cut(data).split(b"\n\n") if event)

    def rest(self) -> bytes:
        """Gives the last event, if it came without its end."""
        event = self._cutter.rest().strip(b"\n")
        return self._event(event) if event else b""

    def _event(self, event: bytes) -> bytes:
        data = sse.read_event(event).data
        try:
            chunk = json.loads(data.decode()) if data else None
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            return event + b"\n\n"  # an error, an end, a proxy's last words: whoever reads chunks knows them
        choices = [choice for choice in chunk["choices"] if isinstance(choice, dict)]
        told = [choice for choice in choices if self._choice(choice)]
        progress = chunk.pop("prompt_progress", None)
        if isinstance(progress, dict) and all(isinstance(progress.get(k), int) for k in ("processed", "total")):
            self.prompt_read = progress["processed"], progress["total"]
        chunk.pop("timings", None)  # of this part of the answer only
        if isinstance(chunk.get("usage"), dict):
            chunk["usage"] = self._whole(chunk["usage"])
        elif not told:
            return b""
        names = {"id": self._partial.chunk_id, "created": self._partial.created}
        chunk |= {key: value for key, value in names.items() if value}
        return b"data: " + json.dumps(chunk | {"choices": told}, separators=(",", ":")).encode() + b"\n\n"

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Fits one choice to what was told; gives whether it says anything."""
        place: dict[str, Any] = choice if self._completion else (choice.get("delta") or {})
        key = "text" if self._completion else "content"
        place.pop("role", None)
        if not self.begun and any(place.get(thought) for thought in _THOUGHTS):
            self.complaint = RuntimeComplaint("the runtime began a new turn instead of going on", "", None)
            return False
        if isinstance(place.get(key), str):
            place[key] = self._new(place[key])
        elif place.get(key, "") is None:
            del place[key]
        says = any(value for name, value in place.items() if name not in ("index", "finish_reason", "logprobs"))
        self.begun |= says
        return says or bool(choice.get("finish_reason"))

    def _new(self, piece: str) -> str:
        """Takes off what was told before: an echo of the text, and the space at its end."""
        if self.begun or not piece:
            return piece
        if self._echo and piece.lstrip().startswith(self._echo):
            piece = piece.lstrip()[len(self._echo) :]
        self._echo = ""  # an echo comes whole and first: later pieces that look so are the model's own
        same = 0
        while same < min(len(piece), len(self._gap)) and piece[same] == self._gap[same]:
            same += 1
        self._gap = self._gap[same:]
        return piece[same:]

    def _whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The figures of the whole answer, out of those of its last part, whose prompt held the text so far."""
        before = self._partial.pieces
        read, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not isinstance(read, int) or not isinstance(made, int):
            return usage
        read = max(0, read - before) if self._partial.asked else read
        told = usage | {"prompt_tokens": read, "completion_tokens": made + before, "total_tokens": read + made + before}
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            told["prompt_tokens_details"] = details | {"cached_tokens": min(read, details["cached_tokens"])}
        return told


def first_chunk(partial: Partial, model: str, *, completion: bool) -> bytes:
    """The text so far as one chunk, by which a reader comes to stand where the answer broke off."""
    place: dict[str, object] = (
        {"text": partial.text} if completion else {"delta": {"role": "assistant", "content": partial.text}}
    )
    chunk = {
        "id": partial.chunk_id,
        "object": "text_completion" if completion else "chat.completion.chunk",
        "created": partial.created,
        "model": model,
        "choices": [{"index": 0, **place, "finish_reason": None}],
    }
    return b"data: " + json_splice.encode(chunk) + b"\n\n"
