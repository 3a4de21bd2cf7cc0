"""Jobs over HTTP: look at one, cancel it, follow its frames and resume where the connection broke."""

import asyncio
import json
import re
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from api.asgi import Receive, Scope, Send
from api.auth import Caller, Gate
from api.described import EVENTS, JSON, TELLS, UNSEEN, Answer, Described, described, says
from api.durations import LENGTH_PATTERN, length_ms
from api.exchange import Exchange, Interrupted, Stopping
from api.following import following
from api.gateway import Gateway
from api.query import KNOWN
from api.results import result_of
from api.stream import HEARTBEAT_S
from api.stream import JSON as JSON_HEADERS
from api.voices import EVENT_STREAM
from broker import callers, errors, jobs
from broker.dialects.json_schema import text
from broker.frames import FrameReader, Restarted
from broker.lifecycle import ENDED
from broker.records import Frame, JobRecord

router = APIRouter(tags=["jobs"])

_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_FRAME_ID = re.compile(r"([0-9]{1,9})-([0-9]{1,12})")

WITHIN = {"job_id": text("As `X-Gateway-Job` told it.")}
WAIT_S_MAX = 60
"""How long a request may wait for the end of a job: as long as proxies in between bear."""
_TELLS = ("X-Gateway-Job", "X-Gateway-Lane", "X-Gateway-Served-By")
_FAILS = (errors.NoSuchJob, errors.BrokerUnavailable)


@router.get("/v1/jobs/{job_id}", dependencies=KNOWN)
@described(
    Described(
        "Look at a job", "jobs", says("As it is now, or once it has ended.", "Job"), within=WITHIN,
        query={
            "wait": text(
                f"Wait so long for its end, like 30s; {WAIT_S_MAX} s at most.", pattern=f"^$|{LENGTH_PATTERN}"
            )
        },
        fails=(errors.BadRequest, errors.CallerTooMany, *_FAILS),
    )
)  # fmt: skip
async def show_job(job_id: str, gateway: Gate, caller: Caller, wait: str = "") -> Response:
    """Shows a job of the caller, and how its wait goes, at once or as soon as it has ended; an administrator sees
    everybody's."""
    wait_s, job = _wait_s(wait), await own_job(gateway, job_id, caller)
    if wait_s and job.live:
        return _Ended(gateway, job, wait_s=wait_s, who=caller.name)
    return JSONResponse(await shown(gateway, job))


@router.get("/v1/jobs/{job_id}/result", response_class=Response)
@described(
    Described(
        "Fetch a job's answer", "jobs", within=WITHIN,
        words="As its endpoint would have said it to a client that waited: the whole answer, also where a stream was "
        "asked for, or the job's own error with its own status, in the words of the endpoint's dialect.",
        answers={
            200: Answer("The answer.", {JSON: UNSEEN}, {name: TELLS[name] for name in _TELLS}),
        },
        fails=(
            errors.NotEnded, errors.RuntimeRefused, errors.JobCancelled, errors.RuntimeFailed,
            errors.ColdStartDeadline, errors.JobExpired, errors.ModelUnavailable, errors.WorkerLost, *_FAILS,
        ),
    )
)  # fmt: skip
async def fetch_result(job_id: str, gateway: Gate, caller: Caller) -> Response:
    """Gives what became of an ended job."""
    status, headers, body = await result_of(gateway, await own_job(gateway, job_id, caller))
    return Response(body, status, {name.decode(): value.decode("latin-1") for name, value in headers})


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
        job_id, exchange = self._job.id, Exchange(scope, receive, send)
        try:
            async with following(
                self._gateway, exchange, job_id, who=self._follower, after=self._after_frame
            ) as reader:
                await exchange.start(200, [*EVENT_STREAM, (b"x-gateway-job", job_id.encode())], in_band=True)
                await exchange.write(b": following\n\n")
                await _follow(exchange, reader)
        except Interrupted:
            pass


class _Ended(Response):
    """Waits for the end of one job, or for so long, and tells how it is then."""

    def __init__(self, gateway: Gateway, job: JobRecord, *, wait_s: float, who: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._job = job
        self._wait_s = wait_s
        self._who = who

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, job_id, exchange = self._gateway, self._job.id, Exchange(scope, receive, send)
        try:
            async with following(gateway, exchange, job_id, who=self._who) as reader:
                with suppress(Stopping):  # whoever asks again comes to another process, and is to hear how it is now
                    await _until_ended(exchange, reader, self._wait_s)
                told = await shown(gateway, await jobs.read(gateway.store, job_id))
                await exchange.answer(200, JSON_HEADERS, json.dumps(told, separators=(",", ":")).encode())
        except Interrupted:
            pass


async def _until_ended(exchange: Exchange, reader: FrameReader, wait_s: float) -> None:
    until = asyncio.get_running_loop().time() + wait_s
    while (found := await exchange.next(reader, until=until)) is not None:
        if isinstance(found, Frame) and found.terminal:
            return


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


def _wait_s(length: str) -> float:
    if not length:
        return 0.0
    try:
        wait_s = length_ms(length) / 1_000
    except ValueError as wrong:
        raise errors.BadRequest(f"wait: {wrong}", "wait") from None
    if wait_s > WAIT_S_MAX:
        raise errors.BadRequest(f"wait may be {WAIT_S_MAX} s at most", "wait")
    return wait_s


def _after(text: str) -> tuple[int, int]:
    """Reads a frame's id as a client repeats it."""
    if not text:
        return 0, 0
    found = _FRAME_ID.fullmatch(text.strip())
    if found is None:
        raise errors.BadRequest("Last-Event-ID must be the id of a frame, like 1-17", "Last-Event-ID")
    return int(found.group(1)), int(found.group(2))
