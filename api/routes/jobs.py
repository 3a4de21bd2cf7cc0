"""Jobs over HTTP: look at one, cancel it, follow its frames and resume where the connection broke."""

import asyncio
import json
import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from api.asgi import Receive, Scope, Send
from api.auth import Caller, Gate
from api.described import EVENTS, UNSEEN, Answer, Described, described, says
from api.exchange import Exchange, Interrupted
from api.gateway import Gateway
from api.stream import HEARTBEAT_S
from api.voices import EVENT_STREAM
from broker import callers, errors, jobs, lanes
from broker.dialects.json_schema import text
from broker.frames import FrameReader, Restarted
from broker.lifecycle import ENDED
from broker.records import Frame, JobRecord

router = APIRouter(tags=["jobs"])

_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_FRAME_ID = re.compile(r"([0-9]{1,9})-([0-9]{1,12})")

WITHIN = {"job_id": text("As `X-Gateway-Job` told it.")}
_FAILS = (errors.NoSuchJob, errors.BrokerUnavailable)


@router.get("/v1/jobs/{job_id}")
@described(Described("Look at a job", "jobs", says("As it is now.", "Job"), within=WITHIN, fails=_FAILS))
async def show_job(job_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Shows a job of the caller, and how its wait goes; an administrator sees everybody's."""
    return await shown(gateway, await own_job(gateway, job_id, caller))


@router.delete("/v1/jobs/{job_id}")
@described(
    Described(
        "Cancel a job", "jobs", says("As it is now; one that had ended stays as it ended.", "Job"), within=WITHIN,
        fails=_FAILS,
    )
)  # fmt: skip
async def cancel_job(job_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Cancels a job in any state; one that has ended stays as it ended."""
    await own_job(gateway, job_id, caller)
    try:
        await jobs.cancel(gateway.store, job_id)
    except errors.AlreadyEnded:
        pass
    return await shown(gateway, await jobs.read(gateway.store, job_id))


@router.get("/v1/jobs/{job_id}/events", response_class=Response)
@described(
    Described(
        "Follow a job", "jobs", within=WITHIN, fails=(errors.BadRequest, errors.CallerTooMany, *_FAILS),
        headers={"Last-Event-ID": text("The last frame that was seen, like 1-17: what follows it is sent.")},
        answers={
            200: Answer(
                "Its frames: events `frame` and `end` with {kind, data}; `restarted` voids earlier attempts; `gone`.",
                {EVENTS: UNSEEN},
                {"X-Gateway-Job": text("The job's id.")},
            ),
            204: Answer("All of it has been seen."),
        },
    )
)  # fmt: skip
async def follow_job(job_id: str, request: Request, gateway: Gate, caller: Caller) -> Response:
    """Streams a job's frames as server-sent events, from the first or from after `Last-Event-ID`.

    Events are `frame` and `end` with data {"kind", "data"}, and `restarted`, after which earlier attempts are void.
    """
    job = await own_job(gateway, job_id, caller)
    after = _after(request.headers.get("last-event-id", ""))
    if job.state in ENDED and after >= (job.attempt, job.last_seq):
        return Response(status_code=204)  # tells a browser's EventSource to stop asking
    return _Events(gateway, job, after, follower=caller.name)


class _Events(Response):
    """Follows one job; it never marks the answer as seen, because it can say that it began again."""

    def __init__(self, gateway: Gateway, job: JobRecord, after: tuple[int, int], *, follower: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._job = job
        self._after_frame = after
        self._follower = follower

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, job_id = self._gateway, self._job.id
        gateway.house.enter(self._follower)
        exchange = Exchange(scope, receive, send)
        name = gateway.reader_name()
        reader = gateway.hub.open(job_id, after=self._after_frame)
        gateway.exchanges.add(exchange)
        exchange.watch()
        try:
            await jobs.attach(gateway.store, job_id, reader=name, lease_ms=lanes.READER_LEASE_MS, sees=False)
            gateway.readers.add(name, job_id, sees=False)
            reader.look()
            await exchange.start(200, [*EVENT_STREAM, (b"x-gateway-job", job_id.encode())], in_band=True)
            await exchange.write(b": following\n\n")
            await _follow(exchange, reader)
        except Interrupted:
            pass
        finally:
            exchange.close()
            gateway.house.leave(self._follower)
            gateway.exchanges.discard(exchange)
            gateway.readers.drop(name)
            gateway.hub.close(reader)
            await _detach(gateway, job_id, name)


async def _follow(exchange: Exchange, reader: FrameReader) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            found = await exchange.next(reader, until=loop.time() + HEARTBEAT_S)
        except errors.NoSuchJob:
            return await exchange.write(_event("gone", "", {"kind": "gone", "data": None}), last=True)
        if found is None:
            await exchange.write(b": still following\n\n")
        elif isinstance(found, Restarted):
            await exchange.write(_event("restarted", "", {"kind": "restarted", "data": {"attempt": found.attempt}}))
        elif found.terminal:
            said = {"kind": found.kind, "data": json.loads(found.data)}
            return await exchange.write(_event("end", found.id, said), last=True)
        else:
            await exchange.write(_frame(found))


async def _detach(gateway: Gateway, job_id: str, name: str) -> None:
    try:
        await jobs.detach(gateway.store, job_id, reader=name)
    except errors.BrokerError:
        pass  # its lease runs out


def _frame(frame: Frame) -> bytes:
    return _event("frame", frame.id, {"kind": frame.kind, "data": frame.data.decode("utf-8", "replace")})


def _event(name: str, frame_id: str, said: dict[str, Any]) -> bytes:
    id_line = f"id: {frame_id}\n" if frame_id else ""
    return f"{id_line}event: {name}\ndata: {json.dumps(said, separators=(',', ':'))}\n\n".encode()


async def shown(gateway: Gateway, job: JobRecord) -> dict[str, Any]:
    """A job as its caller sees it, and how its wait goes."""
    wait = await gateway.waits.of(job)
    return {**job.public(), "wait": None if wait is None else wait.as_json()}


async def own_job(gateway: Gateway, job_id: str, caller: callers.Caller) -> JobRecord:
    """Reads a job; another caller's is as unknown as one that never was."""
    if not _ID.fullmatch(job_id):
        raise errors.NoSuchJob(job_id[:64])
    job = await jobs.read(gateway.store, job_id)
    if job.caller != caller.name and not caller.rights.admin:
        raise errors.NoSuchJob(job_id)
    return job


def _after(text: str) -> tuple[int, int]:
    """Reads a frame's id as a client repeats it."""
    if not text:
        return 0, 0
    found = _FRAME_ID.fullmatch(text.strip())
    if found is None:
        raise errors.BadRequest("Last-Event-ID must be the id of a frame, like 1-17", "Last-Event-ID")
    return int(found.group(1)), int(found.group(2))
