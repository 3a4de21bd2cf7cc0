"""POST /v1/messages and /v1/messages/count_tokens: what clients of the Anthropic dialect ask for."""

from contextlib import suppress

from api.described import EVENTS, WISHES, Described, generation, says
from api.exchange import Exchange
from api.routes.chat import ChatCompletions
from api.stream import JSON
from api.visit import Wishes
from broker import counts, errors, requests
from broker.callers import Caller
from broker.dialects import anthropic, json_splice
from broker.dialects.anthropic_translate import to_chat

NOT_COUNTED = frozenset({"images", "files"})
"""What a tokenizer cannot count: a picture's tokens are made elsewhere."""


class Messages(ChatCompletions):
    """The endpoint."""

    path = anthropic.PATH
    described = generation(
        "Send messages", tag="anthropic", body="MessagesRequest", answer="Message",
        stream=(EVENTS, "Events from `message_start` to `message_stop`, or `error`; `ping` keeps a wait alive."),
    )  # fmt: skip


class CountTokens(ChatCompletions):
    """The endpoint. A warm model's runtime counts, else we estimate: it enters no lane and wakes no model."""

    path = anthropic.COUNT_PATH
    described = Described(
        "Count the tokens of messages", "anthropic", says("How many.", "TokenCount"), body="MessagesRequest",
        headers=WISHES,
        fails=(errors.BadRequest, errors.LaneForbidden, errors.UnknownModel, errors.BodyTooLarge, errors.CallerTooMany,
               errors.BodiesTooMany, errors.ModelUnavailable),
    )  # fmt: skip
    makes_jobs = False

    async def _answer(self, exchange: Exchange, body: bytes, wishes: Wishes, caller: Caller) -> None:
        gateway, asked = self._gateway, anthropic.read_messages(body)
        name = wishes.lane or asked.model
        policy, tokens = gateway.book.active.policy, asked.prompt_tokens
        lane = requests.lane_of(policy, caller, name, endpoint=anthropic.PATH, prompt_tokens=tokens)
        counted = None
        if not asked.needs & NOT_COUNTED:
            with suppress(errors.BadRequest):  # no chat carries it; what its runtime makes of it is not ours to say
                chat, picture = to_chat(asked, lane.model), gateway.fleet.picture
                counted = await counts.ask(gateway.store, gateway.hub, picture, model=lane.model, chat=chat)
        told = anthropic.token_count(counted if counted is not None else asked.prompt_tokens)
        estimate = [(b"x-gateway-estimate", b"true")] if counted is None else []
        await exchange.answer(200, [*JSON, *estimate], json_splice.encode(told))
