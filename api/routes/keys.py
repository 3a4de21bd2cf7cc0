"""Callers and their keys over HTTP, for administrators: /v1/keys. What `gateway key` asks for."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from api.auth import Admin, Gate
from api.described import JSON, Answer, Described, described, says
from broker import errors
from broker.callers import ANONYMOUS, NAME_PATTERN, Rights
from broker.dialects.json_schema import ref, text

router = APIRouter(tags=["keys"])

SECOND_MS = 1_000
YEARS_MAX = 10

Name = Annotated[str, Field(min_length=1, max_length=128)]
Names = Annotated[tuple[Name, ...], Field(max_length=64)]
Seconds = Annotated[int, Field(ge=0, le=YEARS_MAX * 366 * 86_400, strict=True)]
Jobs = Annotated[int, Field(ge=0, le=1_000_000, strict=True)]
Tokens = Annotated[int, Field(ge=0, le=1_000_000_000_000, strict=True)]


class _Asked(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


class NewCaller(_Asked):
    """A caller to make, and what it may; 0 = no limit, and no end."""

    name: Annotated[Name, Field(json_schema_extra={"pattern": NAME_PATTERN, "not": {"const": ANONYMOUS}})]
    lanes: Names = ()
    priority: Literal["interactive", "batch"] = "interactive"
    max_waiting: Jobs = 0
    max_running: Jobs = 0
    tokens_per_day: Tokens = 0
    remote: bool = False
    remote_lanes: Names = ()
    admin: bool = False
    expires_in_s: Seconds = 0

    @property
    def rights(self) -> Rights:
        """What it may, as the broker says it."""
        return Rights(**self.model_dump(exclude={"name", "expires_in_s"}))


class Rotation(_Asked):
    """How long the old keys stay good beside the new one."""

    keep_old_s: Seconds = 0


_WITHIN = {"name": text("A caller that has a key.")}
_FAILS = (errors.AdminOnly, errors.WishRefused, errors.BrokerUnavailable)


@router.get("/v1/keys")
@described(
    Described(
        "List callers",
        "keys",
        says("Who may call, and what each may.", "Callers"),
        fails=(errors.AdminOnly, errors.BrokerUnavailable),
    )
)
async def list_keys(gateway: Gate, _admin: Admin) -> dict[str, Any]:
    """Lists every caller with its rights and the ids of its keys."""
    await gateway.keys.reload()
    return {"object": "list", "data": gateway.keys.listing()}


@router.post("/v1/keys", status_code=201)
@described(
    Described(
        "Make a caller", "keys", {201: Answer("The key, this once.", {JSON: ref("NewKey")})}, body="NewCaller",
        fails=(errors.BadRequest, *_FAILS),
    )
)  # fmt: skip
async def new_key(asked: NewCaller, gateway: Gate, admin: Admin, response: Response) -> dict[str, Any]:
    """Makes a caller; its key is in this answer, and nowhere else ever again."""
    expires_at = await gateway.store.now_ms() + asked.expires_in_s * SECOND_MS if asked.expires_in_s else 0
    made = await gateway.keys.new(asked.name, asked.rights, by=admin.name, expires_at=expires_at)
    response.headers["cache-control"] = "no-store"
    return {"name": made.caller, "id": made.id, "key": made.shown, "expires_at": made.expires_at}


@router.post("/v1/keys/{name}/rotate")
@described(
    Described(
        "Give a caller another key", "keys", says("The key, this once.", "NewKey"), within=_WITHIN, body="Rotation",
        bodyless=True, fails=(errors.BadRequest, errors.UnknownCaller, *_FAILS),
    )
)  # fmt: skip
async def rotate_key(
    name: str, gateway: Gate, admin: Admin, response: Response, asked: Rotation | None = None
) -> dict[str, Any]:
    """Gives a caller a new key; the old ones end at once or after `keepOldS`."""
    kept_ms = asked.keep_old_s * SECOND_MS if asked else 0
    made = await gateway.keys.rotate(name, by=admin.name, keep_old_ms=kept_ms)
    response.headers["cache-control"] = "no-store"
    return {"name": made.caller, "id": made.id, "key": made.shown, "expires_at": made.expires_at}


@router.delete("/v1/keys/{name}")
@described(
    Described(
        "Take a caller's keys away", "keys", says("The ids of its keys.", "Revoked"), within=_WITHIN,
        fails=(errors.UnknownCaller, *_FAILS),
    )
)  # fmt: skip
async def revoke_key(name: str, gateway: Gate, admin: Admin) -> dict[str, Any]:
    """Takes a caller's keys and rights away, on every process within half a second."""
    return {"name": name, "revoked": await gateway.keys.revoke(name, by=admin.name)}
