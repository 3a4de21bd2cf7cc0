"""POST /v1/responses: as a chat request goes, in the words of OpenAI's newer dialect."""

from api.background import send_background
from api.described import EVENTS, generation
from api.routes.chat import ChatCompletions
from api.visit import Visit, Wishes
from broker.dialects import responses


class Responses(ChatCompletions):
    """The endpoint."""

    path = responses.PATH
    described = generation(
        "Respond", tag="openai", body="ResponsesRequest", answer="Response",
        stream=(EVENTS, "Numbered events, `response.completed` or `response.failed` at the end; `response.in_progress` "
        "keeps a wait alive, in the background a comment does."),
        words="Nothing is kept but what is made in the background: the whole conversation comes in `input`.",
    )  # fmt: skip

    async def _send(self, visit: Visit, body: bytes, wishes: Wishes) -> None:
        if not visit.background:
            return await super()._send(visit, body, wishes)
        await send_background(self._gateway, visit, body)
        await visit.detach()
