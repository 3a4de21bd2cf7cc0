"""How a job is asked of a runtime: at which path, with which body, and who reads the answer.

A runtime that speaks the client's dialect gets its bytes; any other is asked through the chat or the embeddings of
OpenAI's dialect, which all of them have, and the answer is told in the client's words.
"""

from typing import Any, Protocol

from broker.dialects import (
    anthropic,
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
from broker.dialects.openai_stream import RuntimeComplaint
from broker.records import JobRecord
from workers.runtimes.base import Endpoint

CHAT = "/v1/chat/completions"
_THROUGH_CHAT = {ollama.CHAT: CHAT, ollama.GENERATE: CHAT, anthropic.PATH: CHAT, responses.PATH: CHAT}
_VECTORS = {ollama.EMBED: ollama_embeddings.read_embed, ollama.EMBEDDINGS: ollama_embeddings.read_embeddings}
_WORDS = {ollama.CHAT: ollama_request.read_chat, ollama.GENERATE: ollama_request.read_generate}


class AnswerReader(Protocol):
    """Takes a runtime's bytes in and gives the client's out."""

    @property
    def has_content(self) -> bool:
        """Whether a first token has come."""

    @property
    def succeeded(self) -> bool:
        """Whether the answer is whole."""

    @property
    def error(self) -> str | None:
        """What went wrong, or None."""

    @property
    def complaint(self) -> RuntimeComplaint | None:
        """The same, as the runtime said it."""

    @property
    def usage(self) -> dict[str, int] | None:
        """The tokens that the runtime counted."""

    @property
    def timings(self) -> dict[str, Any] | None:
        """The runtime's own timings, where it tells them."""

    @property
    def prompt_read(self) -> tuple[int, int] | None:
        """Prompt tokens read so far, and of how many, where it tells them."""

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""

    def end(self) -> None:
        """Tells that the runtime closed the answer."""

    def take(self) -> bytes:
        """Gives the client's bytes that are ready."""


class Asking:
    """One job, and the runtime that it is asked of; raises BadRequest where that cannot do what is asked."""

    def __init__(self, job: JobRecord, body: bytes, endpoint: Endpoint) -> None:
        self._job = job
        self._body = body
        self._to = endpoint
        self._native = job.endpoint in endpoint.speaks

    def translate_instead(self) -> bool:
        """Asks through OpenAI's dialect from now on: this version of the runtime lacks the other. False if it did."""
        if not self._native or self._job.endpoint not in _THROUGH_CHAT:
            return False
        self._native = False
        return True

    @property
    def path(self) -> str:
        """Where the runtime is asked."""
        path = self._job.endpoint
        if not self._native:
            path = _THROUGH_CHAT.get(path, EMBEDDINGS if path in _VECTORS else path)
        return self._to.path(path)

    def request(self, slot: int | None) -> bytes:
        """What it is asked; `slot` is the one that has the session's prompt in its cache."""
        to, path = self._to, self._job.endpoint
        if path in _WORDS:
            if self._native:
                return ollama_request.rewrite(self._body, to.model, drops=to.drops, extra=to.extra)
            asked: Asked = _WORDS[path](self._body)
            return ollama_translate.to_chat(
                asked, to.model, slot=slot, drops=to.drops, extra=to.extra, plain=to.metered
            )
        if path == responses.PATH:
            return responses.ask_chat(self._body, to.model, slot=slot, drops=to.drops, extra=to.extra, plain=to.metered)
        if path == anthropic.PATH:
            if self._native:
                return anthropic.rewrite_messages(self._body, to.model, drops=to.drops, extra=to.extra)
            told = anthropic.read_messages(self._body)
            return to_chat(told, to.model, slot=slot, drops=to.drops, extra=to.extra, plain=to.metered)
        if path in _VECTORS:
            if self._native:
                return ollama_embeddings.rewrite(self._body, to.model, drops=to.drops, extra=to.extra)
            return ollama_embeddings.to_openai(self._vectors(), to.model, drops=to.drops, extra=to.extra)
        if path == EMBEDDINGS:
            return rewrite_embeddings(self._body, to.model, drops=to.drops, extra=to.extra)
        return rewrite_chat(self._body, to.model, slot=slot, drops=to.drops, extra=to.extra)

    def reader(self) -> AnswerReader:
        """Who reads the answer."""
        job = self._job
        waited_ns = max(0, job.claimed_at - job.submitted_at) * 1_000_000 if job.submitted_at else 0
        if job.endpoint in ollama.SHAPES:
            if self._native:
                return NativeReader(job.model)
            return FromChat(job.model, shape=ollama.SHAPES[job.endpoint], waited_ns=waited_ns)
        if job.endpoint == responses.PATH:
            return responses.responses_reader(self._body, served_as=job.model, job_id=job.id)
        if job.endpoint == anthropic.PATH:
            return PassingReader(job.model) if self._native else TranslatingReader(job.model, job.id)
        if job.endpoint in _VECTORS:
            return VectorReader(job.model, asked=self._vectors(), native=self._native, waited_ns=waited_ns)
        if job.endpoint == EMBEDDINGS:
            return EmbeddingReader(job.model)
        if job.endpoint == openai_completions.PATH:
            prompts = openai_completions.read_completion(self._body).prompts if job.choices > 1 else 1
            return openai_completions.CompletionReader(job.model, job.include_usage, job.choices, prompts=prompts)
        return ChatReader(job.model, job.include_usage, job.choices)

    def _vectors(self) -> AskedVectors:
        return _VECTORS[self._job.endpoint](self._body)
