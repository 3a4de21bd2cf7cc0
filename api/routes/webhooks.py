"""Webhooks over HTTP: what they are signed with, what became of them, and sending one again. `gateway webhook` asks
here."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from api.auth import Caller, Gate
from api.described import JSON, Answer, Described, described, says
from api.paging import checked
from api.query import KNOWN
from api.small_body import read_as
from broker import errors, webhook_secrets, webhooks
from broker.dialects.json_schema import ref, text, whole
from broker.keyspace import EVERYBODY
from broker.webhooks import PAGE_MAX, Delivery

router = APIRouter(tags=["webhooks"])

Overlap = Annotated[int, Field(ge=0, le=webhook_secrets.OVERLAP_MS_MAX // 1_000, strict=True)]


class NewSecret(BaseModel):
    """Whether the secrets that there are end, and when; without `rotate` there must be none."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)

    rotate: bool = Field(False, strict=True)
    overlap_s: Overlap = webhook_secrets.OVERLAP_MS // 1_000


@router.get("/v1/webhooks/secrets")
@described(
    Described(
        "List your webhook secrets", "webhooks", says("Those that sign now, without what they are.", "WebhookSecrets"),
        fails=(errors.BrokerUnavailable,),
    )
)  # fmt: skip
async def list_secrets(gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Lists the secrets that the caller's webhooks are signed with, never the secrets themselves."""
    found = await webhook_secrets.listed(gateway.store, caller.name)
    data = [{"id": one.id, "made_at": one.made_at, "ends_at": one.ends_at} for one in found]
    return {"object": "list", "data": data}


@router.post("/v1/webhooks/secrets", status_code=201)
@described(
    Described(
        "Make a webhook secret", "webhooks", {201: Answer("The secret, this once.", {JSON: ref("WebhookSecret")})},
        body="NewSecret", bodyless=True,
        fails=(errors.BadRequest, errors.BodyTooLarge, errors.WishRefused, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def new_secret(request: Request, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Makes a secret for the caller's webhooks; with `rotate` those before it sign beside it for `overlapS`."""
    asked = await read_as(NewSecret, request, default=NewSecret())
    if asked.rotate:
        made = await webhook_secrets.rotate(gateway.store, caller.name, overlap_ms=asked.overlap_s * 1_000)
    else:
        made = await webhook_secrets.make(gateway.store, caller.name)
    return {"caller": caller.name, "id": made.id, "secret": made.secret}


@router.delete("/v1/webhooks/secrets/{secret_id}")
@described(
    Described(
        "Take a webhook secret away", "webhooks", says("It signs no more.", "WebhookSecretRevoked"),
        within={"secret_id": text("Its name in the list.")}, fails=(errors.WishRefused, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def revoke_secret(secret_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Takes one of the caller's secrets away, at once."""
    await webhook_secrets.revoke(gateway.store, caller.name, secret_id)
    return {"caller": caller.name, "revoked": secret_id}


@router.get("/v1/webhooks/deliveries", dependencies=KNOWN)
@described(
    Described(
        "What became of webhooks", "webhooks",
        says("Your own, an administrator's everybody's; the newest first.", "Deliveries"),
        query={
            "limit": whole("How many at most.", least=1, most=PAGE_MAX),
            "after": text("The id of the last one known."),
        },
        fails=(errors.BadRequest, errors.NoSuchDelivery, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def list_deliveries(gateway: Gate, caller: Caller, limit: int = 50, after: str = "") -> dict[str, Any]:
    """Lists deliveries with their last attempts; `has_more` says whether there is another page."""
    limit = checked(limit, PAGE_MAX)
    whose = EVERYBODY if caller.rights.admin else caller.name
    found = await webhooks.listed(gateway.store, caller=whose, limit=limit + 1, after=after)
    return {"object": "list", "data": [told(one) for one in found[:limit]], "has_more": len(found) > limit}


@router.post("/v1/webhooks/deliveries/{delivery_id}/redeliver", status_code=202)
@described(
    Described(
        "Send a webhook again", "webhooks", {202: Answer("It goes under its own id.", {JSON: ref("Delivery")})},
        within={"delivery_id": text("The delivery.")}, fails=(errors.NoSuchDelivery, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def redeliver(delivery_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Sends an event again that was delivered or given up on, or one at once that waits for its next attempt."""
    whose = "" if caller.rights.admin else caller.name
    return told(await webhooks.redeliver(gateway.store, delivery_id, caller=whose))


def told(delivery: Delivery) -> dict[str, Any]:
    """A delivery as clients see it."""
    return asdict(delivery)
