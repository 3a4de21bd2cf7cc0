"""POST /v1/messages and /v1/messages/count_tokens: what clients of the Anthropic dialect ask for."""

from api.described import EVENTS, WISHES, Described, generation, says
from api.routes.chat import ChatCompletions
from api.visit import Wishes
from broker import errors
from broker.dialects import anthropic, json_splice
from broker.records import JobRecord


class Messages(ChatCompletions):
    """The endpoint."""

    path = anthropic.PATH
    described = generation(
        "Send messages", tag="anthropic", body="MessagesRequest", answer="Message",
        stream=(EVENTS, "Events from `message_start` to `message_stop`, or `error`; `ping` keeps a wait alive."),
    )  # fmt: skip

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord | bytes:
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
    described = Described(
        "Count the tokens of messages", "anthropic", says("An estimate.", "TokenCount"), body="MessagesRequest",
        headers=WISHES, fails=(errors.BadRequest, errors.UnknownModel, errors.BodyTooLarge, errors.ModelUnavailable),
    )  # fmt: skip

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord | bytes:
        asked = anthropic.read_messages(body)
        name = wishes.lane or asked.model
        # raises UnknownModel
        self._gateway.book.active.policy.route(
            name, caller=caller, endpoint=anthropic.PATH, prompt_tokens=asked.prompt_tokens
        )
        return json_splice.encode(anthropic.token_count(asked))
