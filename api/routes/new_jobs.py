"""POST /v1/jobs and what becomes of it from outside: hand a generation in and walk away; try a dead one again."""

import json
from typing import Any

from fastapi import APIRouter, Response

from api import async_jobs
from api import errors as told
from api.asgi import Receive, Scope, Send
from api.auth import Caller, CountedCaller, Gate
from api.described import GENERATION_FAILS, JSON, WISHES, Answer, Described, Kinds, described
from api.exchange import Exchange, Interrupted
from api.gateway import Gateway
from api.routes.jobs import WITHIN, own_job, shown
from api.stream import JSON as JSON_HEADERS
from api.visit import Wishes
from broker import callers, errors
from broker.dialects.json_schema import ref, text
from broker.records import JobRecord

router = APIRouter(tags=["jobs"])

_ENDS = (
    errors.RuntimeRefused,
    errors.JobCancelled,
    errors.RuntimeFailed,
    errors.ColdStartDeadline,
    errors.JobExpired,
    errors.WorkerLost,
)
"""What only the job itself can come to: whoever handed it in has gone by then."""
REFUSED: Kinds = (errors.AddressRefused, errors.ScheduleFull, *(kind for kind in GENERATION_FAILS if kind not in _ENDS))
_HEADERS = ("X-Gateway-Lane", "X-Session-Affinity", "X-Gateway-Allow-Remote", "Idempotency-Key", "traceparent")
RETRIED = Answer(
    "The job as it is now, and where to look after it. The answer waits at `links.result`.",
    {JSON: ref("TakenJob")},
    {"Location": text("Where the job is."), "X-Gateway-Job": text("The job's id.")},
)

_OF_A_BODY = (
    errors.BadRequest, errors.BodyTooLarge, errors.BodiesTooMany, errors.IdempotencyMismatch,
    errors.UnknownModel,
)  # fmt: skip
RETRY_FAILS = (
    errors.NotRetryable, errors.UnknownCaller, *(kind for kind in REFUSED if kind not in _OF_A_BODY),
)  # fmt: skip
"""What a retry may be refused with: its request has been read before."""


@router.post("/v1/jobs", response_class=Response)
@described(
    Described(
        "Hand a job in", "jobs", {202: RETRIED}, body="NewJob", fails=REFUSED,
        headers={name: WISHES[name] for name in _HEADERS},
        words="Wraps the body of any endpoint that generates. The job runs as batch work unless it says otherwise, "
        "needs nobody to wait for it, and its answer is kept for `keepAsyncMs`.",
    )
)  # fmt: skip
async def new_job(gateway: Gate, caller: Caller) -> Response:
    """Takes a generation that nobody waits for."""
    return _Taken(gateway, caller)


@router.post("/v1/jobs/{job_id}/retry", status_code=202, response_class=Response)
@described(
    Described(
        "Try a dead job again", "jobs", {202: RETRIED}, within=WITHIN, fails=(errors.NoSuchJob, *RETRY_FAILS),
        words="A new job of the same caller from the request that is kept. The two name each other: `retry_of`, "
        "`retried_as`. Asking again gives the same job while it lives, and once it is done.",
    )
)  # fmt: skip
async def retry_job(job_id: str, gateway: Gate, caller: CountedCaller) -> Response:
    """Tries a job that failed, expired or was cancelled once more."""
    old = await own_job(gateway, job_id, caller)
    status, headers, body = await taken(gateway, await tried_again(gateway, old, caller))
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


async def tried_again(gateway: Gateway, old: JobRecord, caller: callers.Caller) -> JobRecord:
    """The same for whoever has the job; notes a refusal as one of its caller's requests."""
    try:
        return await async_jobs.again(gateway, old, caller)
    except errors.Refused as error:
        gateway.refusals.note(error, caller=old.caller, job=old)
        raise


async def taken(gateway: Gateway, job: JobRecord) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """The answer to whoever handed a job in: status, headers, body."""
    at = f"/v1/jobs/{job.id}"
    links = {"self": at, "events": at + "/events", "result": at + "/result", "cancel": at}
    body: dict[str, Any] = {**await shown(gateway, job), "links": links}
    headers = [*JSON_HEADERS, (b"location", at.encode()), (b"x-gateway-job", job.id.encode())]
    return 202, headers, json.dumps(body, separators=(",", ":")).encode()


class _Taken(Response):
    """Reads a body that may be as large as any generation's, within the same limits, and hands the job in."""

    def __init__(self, gateway: Gateway, caller: callers.Caller) -> None:
        super().__init__()
        self._gateway = gateway
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, exchange = self._gateway, Exchange(scope, receive, send)
        gateway.exchanges.add(exchange)
        try:
            await self._take(exchange)
        except errors.BrokerError as error:
            if isinstance(error, errors.Refused):
                gateway.refusals.note(error, caller=self._caller.name, job=exchange.job)
            await exchange.refuse(told.wrong(error))
        except Interrupted:
            pass
        finally:
            exchange.close()
            gateway.exchanges.discard(exchange)

    async def _take(self, exchange: Exchange) -> None:
        gateway, caller = self._gateway, self._caller
        gateway.house.enter(caller.name)
        try:
            said = await exchange.read_body(gateway.house)
            await gateway.house.turn(len(said))
            wishes = Wishes.of(exchange)
            order = async_jobs.read_order(said, wishes, now_ms=gateway.fleet.now_ms())
            job = exchange.job = async_jobs.job_of(gateway, order, wishes, caller)
            key = wishes.idempotency_key
            found = await async_jobs.let_in(gateway, job, order, rights=caller.rights, key=key, said=said)
            await exchange.answer(*await taken(gateway, found))
        finally:
            gateway.house.leave(caller.name)
