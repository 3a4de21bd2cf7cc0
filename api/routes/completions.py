"""POST /v1/completions: as a chat request goes, for editors that finish text and hold no talk."""

from ulid import ULID

from api.routes.chat import ChatCompletions
from api.visit import Wishes
from broker.dialects import openai_completions
from broker.records import JobRecord


class Completions(ChatCompletions):
    """The endpoint."""

    path = openai_completions.PATH

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord | bytes:
        facts = openai_completions.read_completion(body)
        policy = self._gateway.book.active.policy
        return JobRecord(
            id=str(ULID()),
            asked=wishes.lane or facts.model,
            caller=caller,
            session=wishes.session or facts.session,
            zone=wishes.zone,
            stream=facts.stream,
            include_usage=facts.include_usage,
            choices=facts.choices,
            tokens=facts.prompt_tokens,
            longest=facts.longest_tokens if facts.prompts > 1 else 0,
            max_tokens=facts.max_tokens or 0,
            grace_ms=wishes.grace_ms(policy.disconnect_grace_ms),
            keep_ms=policy.keep_ms,
            endpoint=self.path,
        )
