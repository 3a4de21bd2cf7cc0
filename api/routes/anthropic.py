"""POST /v1/messages and /v1/messages/count_tokens: what clients of the Anthropic dialect ask for."""

from api.auth import lane_of
from api.routes.chat import ChatCompletions
from api.visit import Wishes
from broker.callers import Caller
from broker.dialects import anthropic, json_splice
from broker.records import JobRecord


class Messages(ChatCompletions):
    """The endpoint."""

    path = anthropic.PATH

    def _job(self, body: bytes, wishes: Wishes, caller: Caller) -> JobRecord | bytes:
        asked = anthropic.read_messages(body)
        return self._job_of(
            wishes,
            caller,
            asked=wishes.lane or asked.model,
            session=asked.session,
            stream=asked.stream,
            include_usage=True,
            needs=" ".join(sorted(asked.needs)),
            tokens=asked.prompt_tokens,
            max_tokens=asked.max_tokens or 0,
        )


class CountTokens(ChatCompletions):
    """The endpoint. It is answered with our estimate at once: a count enters no lane and wakes no model."""

    path = anthropic.COUNT_PATH

    def _job(self, body: bytes, wishes: Wishes, caller: Caller) -> JobRecord | bytes:
        asked = anthropic.read_messages(body)
        name = wishes.lane or asked.model
        lane_of(self._gateway, caller, name, endpoint=anthropic.PATH, prompt_tokens=asked.prompt_tokens)
        return json_splice.encode(anthropic.token_count(asked))
