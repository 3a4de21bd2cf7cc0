"""POST /v1/embeddings: as a chat request goes, but the answer is one object of vectors and never a stream."""

from ulid import ULID

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

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord:
        facts = openai_embeddings.read_embeddings(body)
        policy = self._gateway.book.active.policy
        return JobRecord(
            id=str(ULID()),
            asked=wishes.lane or facts.model,
            caller=caller,
            session=wishes.session,
            zone=wishes.zone,
            tokens=facts.prompt_tokens,
            longest=facts.longest_tokens,
            grace_ms=wishes.grace_ms(policy.disconnect_grace_ms),
            keep_ms=min(policy.keep_ms, KEEP_MS_MAX),
            endpoint=self.path,
        )
