"""POST /v1/chat/completions: the hot route, in plain ASGI and without models of the body."""

import logging
import time
from typing import ClassVar

from api import errors as told
from api.asgi import Receive, Scope, Send
from api.auth import who_calls
from api.described import EVENTS, Described, generation
from api.exchange import CutConnection, Exchange, Interrupted, Stopping
from api.gateway import Gateway
from api.stream import JSON, WHOLE_HOLD_S, send_stream, send_whole
from api.visit import Visit, Wishes
from broker import errors, requests
from broker.callers import Caller
from broker.dialects import openai
from broker.records import JobRecord

log = logging.getLogger("warmlane.api")

PATH = openai.PATH


class ChatCompletions:
    """The endpoint. Each request is one exchange, and from its admission on one visit to a job."""

    path = PATH
    methods = ("POST",)
    described: ClassVar[Described] = generation(
        "Chat", tag="openai", body="ChatRequest", answer="ChatCompletion",
        stream=(EVENTS, "Chunks of the answer; the last event is `data: [DONE]`. Comments keep a wait alive."),
    )  # fmt: skip
    makes_jobs: ClassVar[bool] = True
    """Whether who is refused here asked for a generation."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        self._gateway.exchanges.add(exchange)
        try:
            await self._serve(exchange)
        except errors.BrokerError as error:
            if self.makes_jobs and isinstance(error, errors.Refused):
                self._gateway.refusals.note(error, caller=exchange.caller, job=exchange.job)
            await exchange.refuse(told.wrong(error))
        except Stopping:
            await exchange.refuse(told.wrong(errors.BrokerUnavailable("the gateway is being restarted; try again")))
        except Interrupted:
            pass  # nobody is there to be told
        except CutConnection:
            raise
        except Exception as error:  # noqa: BLE001 - the one place where what nobody foresaw becomes an answer
            await exchange.refuse(told.unexpected(error))
        finally:
            exchange.close()
            self._gateway.exchanges.discard(exchange)

    async def _serve(self, exchange: Exchange) -> None:
        if exchange.method != "POST":
            wrong = told.Wrong("method_not_allowed", f"{self.path} takes POST only", 405, told.INVALID)
            return await exchange.refuse(wrong, [(b"allow", b"POST")])
        house, caller = self._gateway.house, who_calls(self._gateway, exchange.raw_headers)
        exchange.caller = caller.name
        house.enter(caller.name)
        try:
            body = await exchange.read_body(house)
            await house.turn(len(body))
            await self._answer(exchange, body, Wishes.of(exchange), caller)
        finally:
            house.leave(caller.name)

    async def _answer(self, exchange: Exchange, body: bytes, wishes: Wishes, caller: Caller) -> None:
        gateway = self._gateway
        job = self._job(body, wishes, caller)
        if isinstance(job, bytes):
            return await exchange.answer(200, JSON, job)
        exchange.job = job
        visit = Visit(
            gateway,
            exchange,
            job,
            rights=caller.rights,
            hold_s=gateway.book.active.policy.header_hold_ms / 1000 if job.stream else WHOLE_HOLD_S,
            patience_s=wishes.patience_s,
        )
        exchange.watch()
        try:
            await self._follow(visit, body, wishes)
        finally:
            visit.close()

    async def _follow(self, visit: Visit, body: bytes, wishes: Wishes) -> None:
        await visit.enter(body, wishes)
        try:
            await self._send(visit, body, wishes)
        except Stopping:
            await visit.detach()
            raise
        except errors.BrokerUnavailable:
            raise  # the job is out of reach; without a reader's lease it ends by itself
        except errors.NoSuchJob:
            # A client that reads on after the keep time, or a Redis that lost its data.
            if visit.delivered and not visit.redis_came_back:
                raise errors.SlowReader("the answer was read too slowly: the rest of it is no longer kept") from None
            raise errors.WorkerLost("the job is gone from Redis; try again") from None
        except Exception:
            await visit.leave()
            raise

    async def _send(self, visit: Visit, body: bytes, wishes: Wishes) -> None:
        send = send_stream if visit.stream else send_whole
        try:
            await send(visit)
        except errors.NoSuchJob:
            if not await visit.enter_anew(body, wishes):
                raise
            await send(visit)

    def _job(self, body: bytes, wishes: Wishes, caller: Caller) -> JobRecord | bytes:
        """Reads the request and writes the job that it asks for, or the answer where it needs none; raises Refused."""
        book = self._gateway.book
        asked = requests.ENDPOINTS[self.path].read(body)
        if asked.nothing is not None:
            with book.deciding() as active:
                name = requests.name_of(self.path, asked, active.policy, lane=wishes.lane)
                requests.lane_of(active.policy, caller, name, endpoint=self.path)
            return asked.nothing(time.time_ns())
        with book.deciding() as active:
            return requests.job_of(
                self.path,
                asked,
                active,
                caller,
                lane=wishes.lane,
                session=wishes.session,
                leave=wishes.leave,
                grace_ms=wishes.grace_ms(active.policy.disconnect_grace_ms),
                traceparent=wishes.traceparent,
            )
