"""POST /v1/embeddings: as a chat request goes, but the answer is one object of vectors and never a stream."""

from api.described import generation
from api.routes.chat import ChatCompletions
from api.visit import Wishes
from broker.dialects import openai_embeddings
from broker.records import JobRecord

PATH = openai_embeddings.PATH

KEEP_MS_MAX = 60_000
"""Vectors are large, and cheap to ask for again: an answer is kept for a retry, and no longer."""


class Embeddings(ChatCompletions):
    """The endpoint."""

    path = PATH
    described = generation("Make vectors", tag="openai", body="EmbeddingsRequest", answer="Embeddings")
    keep_ms_max = KEEP_MS_MAX

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord:
        facts = openai_embeddings.read_embeddings(body)
        return self._job_of(
            wishes,
            caller,
            asked=wishes.lane or facts.model,
            tokens=facts.prompt_tokens,
            longest=facts.longest_tokens,
        )
