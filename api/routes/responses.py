"""POST /v1/responses: as a chat request goes, in the words of OpenAI's newer dialect."""

from api.described import EVENTS, generation
from api.routes.chat import ChatCompletions
from broker.dialects import responses


class Responses(ChatCompletions):
    """The endpoint."""

    path = responses.PATH
    described = generation(
        "Respond", tag="openai", body="ResponsesRequest", answer="Response",
        stream=(EVENTS, "Numbered events, `response.completed` or `response.failed` at the end; `response.in_progress` "
        "keeps a wait alive."),
        words="Nothing is kept: the whole conversation comes in `input`.",
    )  # fmt: skip
