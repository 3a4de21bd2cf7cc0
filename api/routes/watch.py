"""Status as it changes: `GET /v1/status/events`, the stream that the page lives by."""

import asyncio
import json

from fastapi import APIRouter
from fastapi.responses import Response

from api.asgi import Receive, Scope, Send
from api.auth import Caller, Gate, who_calls
from api.described import EVENTS, UNSEEN, Answer, Described, described
from api.exchange import Exchange, Interrupted, Stopping
from api.gateway import Gateway
from api.voices import EVENT_STREAM
from broker import callers, errors

router = APIRouter(tags=["health"])

EVERY_S = 1.0
"""From one snapshot to the next; those who watch at once share them."""
COUNTED_EVERY_S = 1.0
"""The day's counters are read anew every other time: there may be many."""
ASK_S_MAX = 2.0


@router.get("/v1/status/events", response_class=Response)
@described(
    Described(
        "Watch models, lanes and hosts", "health", fails=(errors.CallerTooMany,),
        answers={
            200: Answer(
                "Events `snapshot`, data as of GET /v1/status, id its number, every second; `away` with {reason} while "
                "nobody can say.",
                {EVENTS: UNSEEN},
            ),
        },
    )
)  # fmt: skip
async def watch_status(gateway: Gate, caller: Caller) -> Response:
    """Streams the numbered snapshots. Whose jobs others' are is shown to an administrator only."""
    return _Watching(gateway, caller)


class _Watching(Response):
    """One who watches, for as long as it likes and its key opens this: that is asked anew for each snapshot."""

    def __init__(self, gateway: Gateway, caller: callers.Caller) -> None:
        super().__init__()
        self._gateway = gateway
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, exchange = self._gateway, Exchange(scope, receive, send)
        gateway.house.enter(self._caller.name)
        gateway.exchanges.add(exchange)
        exchange.watch()
        try:
            await exchange.start(200, EVENT_STREAM, in_band=True)
            await self._tell(exchange)
            await exchange.write(b"", last=True)
        except Interrupted:
            pass
        finally:
            exchange.close()
            gateway.exchanges.discard(exchange)
            gateway.house.leave(self._caller.name)

    async def _tell(self, exchange: Exchange) -> None:
        """Returns when its key opens nothing any more, or when this process is about to end."""
        loop = asyncio.get_running_loop()
        while True:
            next_s = loop.time() + EVERY_S
            try:
                caller = who_calls(self._gateway, exchange.raw_headers)
            except errors.Unauthorized:
                return
            viewer = None if caller.rights.admin else caller.name
            try:
                async with asyncio.timeout(ASK_S_MAX):
                    said = await self._gateway.snapshots.as_event(
                        viewer, older_than_s=0.9 * EVERY_S, counted_before_s=COUNTED_EVERY_S
                    )
            except (errors.BrokerError, TimeoutError) as problem:
                reason = "Redis does not answer" if isinstance(problem, TimeoutError) else str(problem)
                said = f"event: away\ndata: {json.dumps({'reason': reason})}\n\n".encode()
            await exchange.write(said)
            try:
                await exchange.pause(until=next_s)
            except Stopping:
                return
