"""How an answer sounds while it is sent: its headers, what is said while the client waits, its end, and the one object
that a client without a stream gets. One voice for each dialect; the words of errors are in `errors`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from api.errors import Wrong
from broker import whole
from broker.dialects import anthropic, ollama, ollama_fold, openai, openai_completions, responses
from broker.dialects.anthropic_fold import fold_messages
from broker.dialects.ollama_request import Shape
from broker.dialects.openai_embeddings import PATH as EMBEDDINGS
from broker.dialects.responses_voice import ResponsesVoice
from broker.records import JobRecord

Headers = Sequence[tuple[bytes, bytes]]

_AT_ONCE = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the answer otherwise
]
EVENT_STREAM: Headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *_AT_ONCE]
LINES: Headers = [(b"content-type", ollama.CONTENT_TYPE.encode()), *_AT_ONCE]


class Voice(Protocol):
    """What `stream` must know of a dialect."""

    headers: Headers
    done: bytes

    def heartbeat(self, note: str) -> bytes:
        """Says "still waiting" in a stream."""

    def fold(self, parts: list[bytes]) -> bytes:
        """Makes the one object of a stream; raises ValueError where it is none."""


class ChatVoice:
    """OpenAI's chat."""

    headers = EVENT_STREAM
    done = openai.DONE

    def heartbeat(self, note: str) -> bytes:
        return openai.heartbeat(note)

    def fold(self, parts: list[bytes]) -> bytes:
        return whole.chat(parts)


class CompletionVoice(ChatVoice):
    """OpenAI's older completions."""

    def fold(self, parts: list[bytes]) -> bytes:
        return whole.completion(parts)


class VectorVoice(ChatVoice):
    """Vectors in any dialect: they are one object already."""

    def fold(self, parts: list[bytes]) -> bytes:
        return whole.vectors(parts)


class AnthropicVoice:
    """Anthropic's messages; a stream's end is `message_stop`, which the runtime's own end brings."""

    headers = EVENT_STREAM
    done = b""

    def heartbeat(self, note: str) -> bytes:
        return anthropic.heartbeat(note)

    def fold(self, parts: list[bytes]) -> bytes:
        return fold_messages(b"".join(parts))


class OllamaVoice:
    """An Ollama's chat and generate."""

    headers = LINES
    done = ollama.DONE

    def __init__(self, shape: Shape, model: str) -> None:
        self._shape = shape
        self._model = model

    def heartbeat(self, note: str) -> bytes:
        return ollama.heartbeat(self._shape, self._model, note, now_ns=time.time_ns())

    def fold(self, parts: list[bytes]) -> bytes:
        return ollama_fold.fold(parts)


class CountedVoice:
    """OpenAI's responses, whose events are counted: all that one client hears goes through one voice."""

    headers = EVENT_STREAM
    done = b""

    def __init__(self, body: bytes, job_id: str, model: str) -> None:
        self._voice = ResponsesVoice(body, job_id=job_id, model=model)

    def heartbeat(self, note: str) -> bytes:
        return self._voice.heartbeat(note)

    def taken_over(self, job_id: str) -> None:
        """Tells that another job makes the answer, in which the client is not to see another response."""
        self._voice.taken_over(job_id)

    def passing(self, data: bytes) -> bytes:
        """Counts what a worker wrote."""
        return self._voice.passing(data)

    def failed(self, wrong: Wrong) -> bytes:
        """Says in the stream what went wrong."""
        return self._voice.failed(wrong.code, wrong.message, status=wrong.status, retry_after_s=wrong.retry_after_s)

    def fold(self, parts: list[bytes]) -> bytes:
        return whole.response(parts)


def voice_of(job: JobRecord, body: bytes = b"") -> Voice:
    """Gives the voice in which a job's client is answered; `body` is what it asked."""
    return _VOICES.get(job.endpoint, _chat)(job, body)


def _chat(_job: JobRecord, _body: bytes) -> Voice:
    return ChatVoice()


def _vectors(_job: JobRecord, _body: bytes) -> Voice:
    return VectorVoice()


def _completions(_job: JobRecord, _body: bytes) -> Voice:
    return CompletionVoice()


def _messages(_job: JobRecord, _body: bytes) -> Voice:
    return AnthropicVoice()


def _responses(job: JobRecord, body: bytes) -> Voice:
    return CountedVoice(body, job.id, job.asked)


def _ollamas(job: JobRecord, _body: bytes) -> Voice:
    return OllamaVoice(ollama.SHAPES[job.endpoint], job.asked)


_VOICES: Mapping[str, Callable[[JobRecord, bytes], Voice]] = {
    openai_completions.PATH: _completions,
    EMBEDDINGS: _vectors,
    responses.PATH: _responses,
    anthropic.PATH: _messages,
    **dict.fromkeys(ollama.SHAPES, _ollamas),
    **dict.fromkeys((ollama.EMBED, ollama.EMBEDDINGS), _vectors),
}
