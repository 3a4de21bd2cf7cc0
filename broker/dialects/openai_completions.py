"""OpenAI's older completions, which editors use to finish a line: a prompt in, text out, no messages.

The request passes as chat does (`openai.rewrite_chat`), and so does the stream; only a chunk's text stands elsewhere.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from broker.dialects import json_splice
from broker.dialects.bounds import read_request
from broker.dialects.openai_fold import extended
from broker.dialects.openai_stream import ChatReader
from broker.errors import BadRequest

PATH: Final = "/v1/completions"
MAX_CHOICES = 32
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class CompletionFacts:
    """What admission must know of a request; suffix, echo, logprobs and the like are the runtime's business."""

    model: str
    stream: bool
    include_usage: bool
    prompts: int
    choices: int  # of all prompts together
    prompt_tokens: int  # of all prompts; an estimate for text: bytes / 4
    longest_tokens: int  # of the longest prompt, which alone must fit the model's context
    max_tokens: int | None
    session: str


def read_completion(body: bytes) -> CompletionFacts:
    """Reads a request, or says in one sentence what is wrong with it. Unknown keys are the runtime's to judge."""
    request = {member.key: member.value for member in read_request(body)}
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be the name of a model", "model")
    stream = request.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise BadRequest("stream must be true or false", "stream")
    options = request.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    n = _whole(request, "n") or 1
    if (_whole(request, "best_of") or n) > n:
        raise BadRequest(
            "best_of above n is not served: an answer is streamed, and none of it can be taken back", "best_of"
        )
    sizes = _sizes(request.get("prompt"))
    suffix = request.get("suffix")
    extra = _tokens_of(suffix) if isinstance(suffix, str) and suffix else 0
    if len(sizes) * n > MAX_CHOICES:
        raise BadRequest(f"prompts times n may be {MAX_CHOICES} at most", "n" if n > 1 else "prompt")
    key = request.get("prompt_cache_key")
    return CompletionFacts(
        model=model,
        stream=stream is True,
        include_usage=stream is not True or (options or {}).get("include_usage") is True,
        prompts=len(sizes),
        choices=len(sizes) * n,
        prompt_tokens=sum(sizes) + extra,
        longest_tokens=max(sizes) + extra,
        max_tokens=_whole(request, "max_tokens", least=0),
        session=key[:128] if isinstance(key, str) and key.isprintable() and key.isascii() else "",
    )


class CompletionReader(ChatReader):
    """Reads a runtime's stream of completions as `ChatReader` reads that of a chat.

    Each prompt has a choice of its own, and on one slot they are made one after the other: the answer is whole when as
    many have a finish reason.
    """

    def __init__(self, served_as: str, include_usage: bool, n: int = 1, *, prompts: int = 1) -> None:
        super().__init__(served_as, include_usage, n)
        self._prompts = prompts
        self._counted: dict[int, dict[str, int]] = {}
        self._told: dict[int, dict[str, Any]] = {}  # the same in the runtime's words

    @property
    def succeeded(self) -> bool:
        """Whether every choice has a finish reason, and there is one for each prompt."""
        return super().succeeded and len(self.finish_reasons) >= self._prompts

    def _has_content(self, choice: dict[str, Any]) -> bool:
        return bool(choice.get("text"))

    def _is_empty(self, data: bytes) -> bool:
        return data == b"null" or super()._is_empty(data)  # llama.cpp says it ahead of several prompts' choices

    def _read_figures(self, chunk: dict[str, Any], *, last: bool) -> None:
        """Adds up what llama.cpp tells of each choice; a usage without a choice is of all of them already."""
        self.usage = None
        super()._read_figures(chunk, last=last)
        choices = chunk.get("choices")
        if self.usage is not None:
            index = choices[0].get("index", 0) if isinstance(choices, list) and choices else None
            if index is None:
                self._counted.clear()
                self._told.clear()
            elif isinstance(chunk.get("usage"), dict):
                self._told[index if isinstance(index, int) else -1] = chunk["usage"]
            self._counted[index if isinstance(index, int) else -1] = self.usage
        self.usage = _sum(list(self._counted.values())) if self._counted else None

    def _pass_on(self, payload: bytes, chunk: dict[str, Any], *, learn: bool) -> None:
        """Takes the usage off a chunk of one of several choices: the last chunk tells that of all."""
        if self._n > 1 and isinstance(chunk.get("usage"), dict):
            self._last_chunk = payload if self._include_usage else b""
            try:
                payload = json_splice.splice(payload, {"usage": None}, finite=False)
            except BadRequest:
                return self._fail("the runtime sent an event that cannot be read")
        return super()._pass_on(payload, chunk, learn=learn)

    def _of_all_choices(self) -> dict[str, object]:
        if not self._told:
            return super()._of_all_choices()
        return {"choices": [], "usage": _sum(list(self._told.values()))}


def fold_completion(stream: bytes) -> dict[str, Any]:
    """Makes one `text_completion` of a stream in the client's dialect; raises ValueError where it carries an error."""
    top: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in stream.split(b"\n\n"):
        if not event.startswith(b"data: ") or event == b"data: [DONE]":
            continue
        chunk = json.loads(event[6:].decode())
        if chunk.get("error"):
            raise ValueError("the stream carries an error")
        parts = chunk.pop("choices", None) or []
        usage = chunk.pop("usage", None) or usage
        top |= {key: value for key, value in chunk.items() if value is not None or key not in top}
        for part in parts:
            _merge(choices, part)
    answer: dict[str, Any] = {key: top.pop(key) for key in ("id", "object", "created", "model") if key in top}
    answer["object"] = "text_completion"
    answer["choices"] = [choices[index] for index in sorted(choices)]
    if usage:
        answer["usage"] = usage
    return answer | top


def _merge(choices: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    index = part.get("index", 0)
    known = choices.setdefault(index, {"text": "", "index": index, "logprobs": None, "finish_reason": None})
    for key, value in part.items():
        if key == "text":
            known["text"] += value or ""
        elif key == "logprobs":
            known["logprobs"] = extended(known["logprobs"], value)
        elif value is not None or key not in known:
            known[key] = value


def _sum(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds counts up, those inside of details too; one alone stays as it is."""
    total = usages[0]
    for usage in usages[1:]:
        joined = dict(total)
        for key, value in usage.items():
            known = joined.get(key)
            if isinstance(known, dict) and isinstance(value, dict):
                joined[key] = _sum([known, value])
            else:
                joined[key] = known + value if isinstance(known, int) and isinstance(value, int) else value
        total = joined
    return total


def _whole(request: dict[str, Any], key: str, *, least: int = 1) -> int | None:
    value = request.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise BadRequest(f"{key} must be a whole number{' above 0' if least else ', 0 or more'}", key)
    return value


def _sizes(prompt: object) -> list[int]:
    """Gives the tokens of each prompt: of a text, of several, of one list of token numbers, or of several."""
    if isinstance(prompt, str):
        return [_tokens_of(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [len(prompt)]
        if all(isinstance(item, str) for item in prompt):
            return [_tokens_of(item) for item in prompt]
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in prompt):
            return [len(item) for item in prompt]
    raise BadRequest("prompt must be a text, a list of texts, or token numbers", "prompt")


def _tokens_of(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
    return size // BYTES_PER_TOKEN + 1
