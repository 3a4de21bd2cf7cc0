"""POST /v1/responses: as a chat request goes, in the words of OpenAI's newer dialect."""

from ulid import ULID

from api.routes.chat import ChatCompletions
from api.visit import Wishes
from broker.dialects import responses
from broker.records import JobRecord


class Responses(ChatCompletions):
    """The endpoint."""

    path = responses.PATH

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord | bytes:
        facts = responses.read_responses(body)
        policy = self._gateway.book.active.policy
        return JobRecord(
            id=str(ULID()),
            asked=wishes.lane or facts.model,
            caller=caller,
            session=wishes.session or facts.session,
            zone=wishes.zone,
            stream=facts.stream,
            include_usage=True,
            needs=" ".join(sorted(facts.needs)),
            tokens=facts.prompt_tokens,
            max_tokens=facts.max_tokens or 0,
            grace_ms=wishes.grace_ms(policy.disconnect_grace_ms),
            keep_ms=policy.keep_ms,
            endpoint=self.path,
        )
