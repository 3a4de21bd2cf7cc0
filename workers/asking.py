"""How a job is asked of a runtime: at which path, with which body, and who reads the answer.

A runtime that speaks the client's dialect gets its bytes; any other is asked through the chat or the embeddings of
OpenAI's dialect, which all of them have, and the answer is told in the client's words. An endpoint is a row of `OWN`,
of `THROUGH`, or of both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker.dialects import (
    anthropic,
    going_on,
    ollama,
    ollama_embeddings,
    ollama_request,
    ollama_translate,
    openai_completions,
    responses,
)
from broker.dialects.anthropic_stream import PassingReader, TranslatingReader
from broker.dialects.anthropic_translate import to_chat
from broker.dialects.ollama_embeddings import AskedVectors, VectorReader
from broker.dialects.ollama_request import Asked
from broker.dialects.ollama_stream import FromChat, NativeReader
from broker.dialects.openai import ChatReader, rewrite_chat
from broker.dialects.openai_embeddings import PATH as EMBEDDINGS
from broker.dialects.openai_embeddings import EmbeddingReader, rewrite_embeddings
from broker.dialects.partial import Partial
from broker.records import JobRecord
from workers.answers import AnswerReader, ContinuedReader
from workers.runtimes.base import Endpoint

CHAT = "/v1/chat/completions"


class Asking:
    """One job, and the runtime that it is asked of; raises BadRequest where that cannot do what is asked."""

    def __init__(self, job: JobRecord, body: bytes, endpoint: Endpoint) -> None:
        self._job = job
        self._body = body
        self._to = endpoint
        path = job.endpoint
        own = path not in THROUGH or (path in OWN and path in endpoint.speaks)
        # what a newer api lets in and we do not know is asked as it is: the runtime says what it thinks of it
        self._way = OWN.get(path, OWN[CHAT]) if own else THROUGH[path]
        self._partial: Partial | None = None

    def go_on(self, partial: Partial) -> None:
        """Asks for the rest of an answer of which the client has this. That goes through chat: whatever the client's
        dialect, only there a runtime can be asked to go on."""
        self._partial = partial
        self._way = THROUGH.get(self._job.endpoint, self._way)

    def translate_instead(self) -> bool:
        """Asks through chat from now on: this version of the runtime lacks the other. False if that is no help."""
        other = THROUGH.get(self._job.endpoint)
        if other is None or other is self._way or other.path != CHAT:
            return False
        self._way = other
        return True

    @property
    def path(self) -> str:
        """Where the runtime is asked."""
        return self._to.path(self._way.path)

    def request(self, slot: int | None) -> bytes:
        """What it is asked; `slot` is the one that has the session's prompt in its cache."""
        request = self._way.request(self._body, self._to, slot)
        if self._partial is None:
            return request
        if self._way.path == openai_completions.PATH:
            return going_on.ask_completion_on(request, self._partial)
        return going_on.ask_chat_on(request, self._partial, flags=self._to.knows_continue)

    def reader(self) -> AnswerReader:
        """Who reads the answer."""
        reader = self._way.reader(self._job, self._body)
        if self._partial is None:
            return reader
        return ContinuedReader(
            reader,
            self._partial,
            model=self._job.model,
            echoes=not self._to.knows_continue,
            completion=self._way.path == openai_completions.PATH,
        )


@dataclass(frozen=True)
class Way:
    """One way to the answers of an endpoint. `request` takes what the client sent, and the slot to name."""

    path: str
    request: Callable[[bytes, Endpoint, int | None], bytes]
    reader: Callable[[JobRecord, bytes], AnswerReader]


def _chat(body: bytes, to: Endpoint, slot: int | None) -> bytes:
    return rewrite_chat(body, to.model, slot=slot, drops=to.drops, extra=to.extra)


def _chat_reader(job: JobRecord, _body: bytes) -> AnswerReader:
    return ChatReader(job.model, job.include_usage, job.choices)


def _completions_reader(job: JobRecord, body: bytes) -> AnswerReader:
    prompts = openai_completions.read_completion(body).prompts if job.choices > 1 else 1
    return openai_completions.CompletionReader(job.model, job.include_usage, job.choices, prompts=prompts)


def _vectors(body: bytes, to: Endpoint, _slot: int | None) -> bytes:
    return rewrite_embeddings(body, to.model, drops=to.drops, extra=to.extra)


def _vectors_reader(job: JobRecord, _body: bytes) -> AnswerReader:
    return EmbeddingReader(job.model)


def _responses(body: bytes, to: Endpoint, slot: int | None) -> bytes:
    return responses.ask_chat(body, to.model, slot=slot, drops=to.drops, extra=to.extra, plain=to.metered)


def _responses_reader(job: JobRecord, body: bytes) -> AnswerReader:
    return responses.responses_reader(body, served_as=job.model, job_id=job.id)


def _messages(body: bytes, to: Endpoint, _slot: int | None) -> bytes:
    return anthropic.rewrite_messages(body, to.model, drops=to.drops, extra=to.extra)


def _messages_reader(job: JobRecord, _body: bytes) -> AnswerReader:
    return PassingReader(job.model)


def _messages_as_chat(body: bytes, to: Endpoint, slot: int | None) -> bytes:
    asked = anthropic.read_messages(body)
    return to_chat(asked, to.model, slot=slot, drops=to.drops, extra=to.extra, plain=to.metered)


def _chat_as_messages(job: JobRecord, _body: bytes) -> AnswerReader:
    return TranslatingReader(job.model, job.id)


def _ollamas(body: bytes, to: Endpoint, _slot: int | None) -> bytes:
    return ollama_request.rewrite(body, to.model, drops=to.drops, extra=to.extra)


def _ollamas_reader(job: JobRecord, _body: bytes) -> AnswerReader:
    return NativeReader(job.model)


def _ollamas_through_chat(path: str, read: Callable[[bytes], Asked]) -> Way:
    def as_chat(body: bytes, to: Endpoint, slot: int | None) -> bytes:
        asked = read(body)
        return ollama_translate.to_chat(asked, to.model, slot=slot, drops=to.drops, extra=to.extra, plain=to.metered)

    def from_chat(job: JobRecord, _body: bytes) -> AnswerReader:
        return FromChat(job.model, shape=ollama.SHAPES[path], waited_ns=_waited_ns(job))

    return Way(CHAT, as_chat, from_chat)


def _ollamas_vectors(path: str, read: Callable[[bytes], AskedVectors], *, native: bool) -> Way:
    def request(body: bytes, to: Endpoint, _slot: int | None) -> bytes:
        if native:
            return ollama_embeddings.rewrite(body, to.model, drops=to.drops, extra=to.extra)
        return ollama_embeddings.to_openai(read(body), to.model, drops=to.drops, extra=to.extra)

    def reader(job: JobRecord, body: bytes) -> AnswerReader:
        return VectorReader(job.model, asked=read(body), native=native, waited_ns=_waited_ns(job))

    return Way(path if native else EMBEDDINGS, request, reader)


def _waited_ns(job: JobRecord) -> int:
    """An Ollama's load duration holds its own queue: so does ours."""
    return max(0, job.claimed_at - job.submitted_at) * 1_000_000 if job.submitted_at else 0


OWN: Mapping[str, Way] = {
    CHAT: Way(CHAT, _chat, _chat_reader),
    openai_completions.PATH: Way(openai_completions.PATH, _chat, _completions_reader),
    EMBEDDINGS: Way(EMBEDDINGS, _vectors, _vectors_reader),
    anthropic.PATH: Way(anthropic.PATH, _messages, _messages_reader),
    ollama.CHAT: Way(ollama.CHAT, _ollamas, _ollamas_reader),
    ollama.GENERATE: Way(ollama.GENERATE, _ollamas, _ollamas_reader),
    ollama.EMBED: _ollamas_vectors(ollama.EMBED, ollama_embeddings.read_embed, native=True),
    ollama.EMBEDDINGS: _ollamas_vectors(ollama.EMBEDDINGS, ollama_embeddings.read_embeddings, native=True),
}
"""In the client's own dialect. OpenAI's chat, completions and embeddings are spoken by every runtime, the others where
`Endpoint.speaks` names them."""

THROUGH: Mapping[str, Way] = {
    responses.PATH: Way(CHAT, _responses, _responses_reader),
    anthropic.PATH: Way(CHAT, _messages_as_chat, _chat_as_messages),
    ollama.CHAT: _ollamas_through_chat(ollama.CHAT, ollama_request.read_chat),
    ollama.GENERATE: _ollamas_through_chat(ollama.GENERATE, ollama_request.read_generate),
    ollama.EMBED: _ollamas_vectors(ollama.EMBED, ollama_embeddings.read_embed, native=False),
    ollama.EMBEDDINGS: _ollamas_vectors(ollama.EMBEDDINGS, ollama_embeddings.read_embeddings, native=False),
}
"""Through OpenAI's dialect, and told in the client's words."""
