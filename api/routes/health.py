"""How the gateway does: alive, ready, in figures, and the status snapshot. None of them touches a runtime."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from api.auth import Caller, Gate
from api.described import JSON, Answer, Described, described, says
from api.gateway import Gateway
from api.scrape import wants_openmetrics
from broker import errors, usage, vitals, webhooks
from broker.dialects.json_schema import ref, text
from broker.figures import Day
from broker.metrics import CONTENT_TYPE, OPENMETRICS_TYPE, Here
from broker.status import Snapshot

router = APIRouter(tags=["health"])

ASK_S_MAX = 1.0
"""Whoever watches us wants an answer, also while Redis hangs."""


@router.api_route("/healthz", methods=["GET", "HEAD"])
@described(Described("Is this process alive?", "health", says("It is.", "Health"), keyless=True))
async def healthz(gateway: Gate) -> dict[str, Any]:
    """Says that this process lives, and what it thinks of its Redis."""
    told: dict[str, Any] = {
        "status": "stopping" if gateway.stopping else "ok",
        "version": gateway.version,
        "policy_version": gateway.book.active.version if gateway.book.present else None,
        "policy_unread": gateway.book.unread or None,
    }
    try:
        async with asyncio.timeout(ASK_S_MAX):
            await gateway.store.now_ms()
            durability = await gateway.store.durability()
            told |= {"redis_version": gateway.store.version, "skew_ms": gateway.fleet.skew_ms}
            return {**told, "redis": "ok", "durability": durability, "unfit": await gateway.store.unfit()}
    except (errors.BrokerError, TimeoutError):
        return {**told, "redis": "away", "durability": "unknown", "unfit": []}


@router.api_route("/readyz", methods=["GET", "HEAD"])
@described(
    Described(
        "Can anybody serve?", "health", keyless=True,
        answers={200: Answer("Some model can.", {JSON: ref("Ready")}), 503: Answer("None can.", {JSON: ref("Ready")})},
    )
)  # fmt: skip
async def readyz(gateway: Gate) -> JSONResponse:
    """Says whether some lane's model answers now or can be woken: 200, or 503 with the reasons."""
    reasons = await _unready(gateway)
    return JSONResponse({"ready": not reasons, "reasons": reasons}, status_code=503 if reasons else 200)


@router.get("/metrics")
@described(
    Described(
        "Figures for Prometheus", "health",
        {200: Answer("They are.", {"text/plain": text(), "application/openmetrics-text": text()})},
    )
)  # fmt: skip
async def metrics(request: Request, gateway: Gate, caller: Caller) -> Response:
    """The page that Prometheus reads. What others used is shown under their names to an administrator only."""
    shown: Snapshot | None = None
    day: Day = ()
    told: webhooks.Figures | None = None
    vital: vitals.Vitals | None = None
    ready: bool | None = None
    up = True
    try:
        async with asyncio.timeout(ASK_S_MAX):
            told = await webhooks.figures(gateway.store)
            picture = gateway.fleet.picture
            if gateway.book.present:
                shown = await gateway.snapshots.latest()
                picture, day = gateway.fleet.picture, shown.day
            else:
                day = await usage.today(gateway.store)
            vital = await vitals.read(gateway.store, facts=picture.facts)
            decides = gateway.book.present and gateway.book.unreadable is None and not gateway.stopping
            ready = decides and not _unserved(gateway)
    except (errors.BrokerError, TimeoutError):
        up = False
    exemplars = wants_openmetrics(request.headers.getlist("accept"))
    page = gateway.metrics.render(
        shown,
        day,
        callers=gateway.keys.names if caller.rights.admin else [caller.name],
        redis_up=up,
        webhooks=told,
        vitals=vital,
        here=Here(requests=len(gateway.exchanges), bodies_bytes=gateway.house.bodies_bytes, ready=ready),
        exemplars=exemplars,
    )
    return Response(page, headers={"content-type": OPENMETRICS_TYPE if exemplars else CONTENT_TYPE})


@router.get("/v1/status")
@described(
    Described(
        "Models, lanes and hosts", "health", says("As they are now.", "Status"),
        fails=(errors.ModelUnavailable, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def status(gateway: Gate, caller: Caller) -> dict[str, Any]:
    """The snapshot that `gateway status` prints. Whose jobs others' are is shown to an administrator only."""
    shown = await gateway.snapshots.latest()
    return shown.as_json(viewer=None if caller.rights.admin else caller.name)


async def _unready(gateway: Gateway) -> list[str]:
    if gateway.stopping:
        return ["the gateway is stopping"]
    if gateway.book.unreadable is not None:
        return [str(gateway.book.unreadable)]
    if not gateway.book.present:
        return ["no policy has been applied yet"]
    try:
        async with asyncio.timeout(ASK_S_MAX):
            await gateway.fleet.look()
    except (errors.BrokerError, TimeoutError):
        return ["Redis does not answer"]
    return _unserved(gateway)


def _unserved(gateway: Gateway) -> list[str]:
    """Why no model can serve, by the last look; nothing where one can."""
    active = gateway.book.active
    views = {name: gateway.fleet.view(name) for name in active.policy.models}
    if any(view.availability != "unavailable" for view in views.values()):
        return []
    return [f"{name}: {view.reason}" for name, view in views.items()]
