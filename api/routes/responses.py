"""POST /v1/responses: as a chat request goes, in the words of OpenAI's newer dialect."""

from api.described import EVENTS, generation
from api.routes.chat import ChatCompletions
from api.visit import Wishes
from broker.dialects import responses
from broker.records import JobRecord


class Responses(ChatCompletions):
    """The endpoint."""

    path = responses.PATH
    described = generation(
        "Respond", tag="openai", body="ResponsesRequest", answer="Response",
        stream=(EVENTS, "Numbered events, `response.completed` or `response.failed` at the end; `response.in_progress` "
        "keeps a wait alive."),
        words="Nothing is kept: the whole conversation comes in `input`.",
    )  # fmt: skip

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord | bytes:
        facts = responses.read_responses(body)
        return self._job_of(
            wishes,
            caller,
            asked=wishes.lane or facts.model,
            session=facts.session,
            stream=facts.stream,
            include_usage=True,
            needs=" ".join(sorted(facts.needs)),
            tokens=facts.prompt_tokens,
            max_tokens=facts.max_tokens or 0,
        )
