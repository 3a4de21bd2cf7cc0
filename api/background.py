"""Responses that are made in the background: what is told of one now, and its events from any of them on."""

import asyncio
import json
from collections.abc import Awaitable, Callable

from fastapi.responses import Response

from api import errors as told
from api.asgi import Receive, Scope, Send
from api.exchange import Exchange, Interrupted, Stopping
from api.following import following
from api.gateway import Gateway
from api.stream import HEARTBEAT_S, JSON
from api.visit import Visit
from api.voices import EVENT_STREAM
from broker import errors, jobs, kept
from broker.dialects import json_splice, openai
from broker.dialects.responses_background import BackgroundEvents
from broker.dialects.responses_object import ResponseObject
from broker.dialects.responses_stream import final_response
from broker.dialects.responses_voice import failure
from broker.frames import FrameReader, Restarted
from broker.lifecycle import State
from broker.records import Frame, JobRecord

Note = Callable[[], Awaitable[str]]


async def response_of(gateway: Gateway, job: JobRecord, body: bytes | None = None) -> bytes:
    """Writes the response as it is now; `body` saves a look at the request."""
    if body is None:
        body = await kept.request_of(gateway.store, job.id)
    response = ResponseObject(body, job_id=job.id, model=job.model if job.owner else job.asked)
    if job.live:
        running = job.state in (State.CLAIMED, State.STREAMING)
        return json_splice.encode(response.state("in_progress" if running else "queued"))
    if job.state is State.CANCELLED:
        return json_splice.encode(response.state("cancelled"))
    last, end = await kept.last_frames(gateway.store, job.id)
    if job.state is State.DONE:
        try:
            return final_response(last)
        except ValueError:  # Redis came back without it
            lost = told.wrong(errors.WorkerLost("the answer is gone from Redis"))
            return json_splice.encode(response.state("failed", error=_failure(lost)))
    return json_splice.encode(response.state("failed", error=_failure(told.ended(end or _end_of(job)))))


async def send_background(gateway: Gateway, visit: Visit, body: bytes) -> None:
    """Tells whoever had a response made in the background that there is one, and its events if it asked for them."""
    exchange = visit.exchange
    job = await jobs.read(gateway.store, visit.job_id)
    if not visit.stream:
        await exchange.answer(200, [*JSON, *visit.waiting_headers()], await response_of(gateway, job, body))
        visit.known = exchange.why is None
        return
    await exchange.start(200, [*EVENT_STREAM, *visit.waiting_headers()], in_band=True)
    visit.known = exchange.why is None  # the first event tells the id
    events = BackgroundEvents(body, job_id=job.id, model=job.asked)
    await _follow(exchange, visit.reader, events, beat_s=min(HEARTBEAT_S, visit.patience_s), note=visit.note)


class Followed(Response):
    """The events behind number `after`, -1 = all of them. Whoever follows so never marks the answer as seen."""

    def __init__(self, gateway: Gateway, job: JobRecord, body: bytes, *, after: int, follower: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._job = job
        self._events = BackgroundEvents(body, job_id=job.id, model=job.asked, after=after)
        self._follower = follower

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, job_id = self._gateway, self._job.id
        exchange = Exchange(scope, receive, send)
        try:
            async with following(gateway, exchange, job_id, who=self._follower) as reader:
                await exchange.start(200, [*EVENT_STREAM, (b"x-gateway-job", job_id.encode())], in_band=True)
                await _follow(exchange, reader, self._events, beat_s=HEARTBEAT_S, note=_still)
        except Stopping:
            await exchange.refuse(told.wrong(errors.BrokerUnavailable("the gateway is being restarted; follow anew")))
        except Interrupted:
            pass


async def _follow(
    exchange: Exchange, reader: FrameReader, events: BackgroundEvents, *, beat_s: float, note: Note
) -> None:
    """Sends the events to their end. What ends the stream and not the response is an `error`, never a failure."""
    loop = asyncio.get_running_loop()
    exchange.event_of = lambda wrong: events.broken(wrong.code, wrong.message)
    await exchange.write(events.opening() or openai.heartbeat("following"))
    while True:
        try:
            found = await exchange.next(reader, until=loop.time() + beat_s)
        except errors.NoSuchJob:
            gone = errors.NoSuchResponse("the response was deleted, or is not kept any longer")
            return await exchange.write(events.broken(gone.code, str(gone)), last=True)
        if found is None:
            await exchange.write(openai.heartbeat(await note()))
        elif isinstance(found, Restarted):
            continue  # the next frame tells of which attempt it is
        elif found.terminal:
            return await exchange.write(_end(events, found), last=True)
        elif not events.goes_on(found.attempt):
            again = errors.BegunAgain()
            return await exchange.write(events.broken(again.code, str(again)), last=True)
        elif data := events.passing(found.attempt, found.data):
            await exchange.write(data)


def _end(events: BackgroundEvents, end: Frame) -> bytes:
    if end.kind == State.DONE:
        return b""  # the answer's own last event has told it
    if end.kind == State.CANCELLED:
        return events.ended(end.attempt, "cancelled", None)
    return events.ended(end.attempt, "failed", _failure(told.ended(end)))


def _failure(wrong: told.Wrong) -> dict[str, str]:
    return failure(wrong.code, wrong.message, status=wrong.status, retry_after_s=wrong.retry_after_s)


def _end_of(job: JobRecord) -> Frame:
    """How a job ended, where only its record tells."""
    said = {"code": job.error, "message": job.error_message}
    return Frame(job.attempt, job.last_seq, job.state.value, json.dumps(said).encode())


async def _still() -> str:
    return "still following"
