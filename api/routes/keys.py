"""Callers and their keys over HTTP, for administrators: /v1/keys. What `gateway key` asks for."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from api.auth import Admin, Gate
from broker.callers import Rights

router = APIRouter(tags=["keys"])

SECOND_MS = 1_000
YEARS_MAX = 10

Name = Annotated[str, Field(min_length=1, max_length=128)]
Names = Annotated[tuple[Name, ...], Field(max_length=64)]
Seconds = Annotated[int, Field(ge=0, le=YEARS_MAX * 366 * 86_400, strict=True)]


class _Asked(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


class NewCaller(_Asked):
    """A caller to make, and what it may; `expiresInS` 0 = never."""

    name: Name
    lanes: Names = ()
    priority: Literal["interactive", "batch"] = "interactive"
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


@router.get("/v1/keys")
async def list_keys(gateway: Gate, _admin: Admin) -> dict[str, Any]:
    """Lists every caller with its rights and the ids of its keys."""
    await gateway.keys.reload()
    return {"object": "list", "data": gateway.keys.listing()}


@router.post("/v1/keys", status_code=201)
async def new_key(asked: NewCaller, gateway: Gate, admin: Admin, response: Response) -> dict[str, Any]:
    """Makes a caller; its key is in this answer, and nowhere else ever again."""
    expires_at = await gateway.store.now_ms() + asked.expires_in_s * SECOND_MS if asked.expires_in_s else 0
    made = await gateway.keys.new(asked.name, asked.rights, by=admin.name, expires_at=expires_at)
    response.headers["cache-control"] = "no-store"
    return {"name": made.caller, "id": made.id, "key": made.shown, "expires_at": made.expires_at}


@router.post("/v1/keys/{name}/rotate")
async def rotate_key(
    name: str, gateway: Gate, admin: Admin, response: Response, asked: Rotation | None = None
) -> dict[str, Any]:
    """Gives a caller a new key; the old ones end at once or after `keepOldS`."""
    kept_ms = asked.keep_old_s * SECOND_MS if asked else 0
    made = await gateway.keys.rotate(name, by=admin.name, keep_old_ms=kept_ms)
    response.headers["cache-control"] = "no-store"
    return {"name": made.caller, "id": made.id, "key": made.shown, "expires_at": made.expires_at}


@router.delete("/v1/keys/{name}")
async def revoke_key(name: str, gateway: Gate, admin: Admin) -> dict[str, Any]:
    """Takes a caller's keys and rights away, on every process within half a second."""
    return {"name": name, "revoked": await gateway.keys.revoke(name, by=admin.name)}
