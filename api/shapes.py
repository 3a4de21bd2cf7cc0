"""What the gateway's own objects look like, read off the records that they are made of."""

from typing import Any

from pydantic import TypeAdapter

from api.routes.keys import NewCaller, Rotation
from broker.callers import Key, Keyring, Rights
from broker.dialects.json_schema import REFS, Schema, flag, list_of, maybe, number, one_of, text, thing, whole
from broker.records import JobRecord
from broker.status import Snapshot


def schemas() -> dict[str, Schema]:
    """Gives them by name."""
    return {**_status(), "Job": _job(), **_keys(), **_HEALTH}


def _status() -> dict[str, Schema]:
    status, parts = _read_off(Snapshot)
    parts["ModelStatus"]["properties"]["cached_share"] = maybe(number("cached_tokens of prompt_tokens."))
    status["properties"]["policy"] = list_of(text(), "What happens to jobs that wait too long, in sentences.")
    return {**parts, "Status": {**status, "required": list(status["properties"])}}


def _job() -> Schema:
    job, parts = _read_off(JobRecord)
    shown = {key: value for key, value in job["properties"].items() if key not in JobRecord.HIDDEN}
    shown["state"] = {"type": "string", "enum": parts["State"]["enum"]}
    shown["usage"] = maybe(thing({}, words="The runtime's own figures."))
    shown["error"] = maybe(thing({"code": text(), "message": text()}, words="What went wrong."))
    return {"type": "object", "description": job["description"], "properties": shown, "required": list(shown)}


def _keys() -> dict[str, Schema]:
    rights, key = _read_off(Rights)[0], _read_off(Key)[0]
    shown = {name: schema for name, schema in key["properties"].items() if name not in Keyring.HIDDEN}
    caller = {"name": text(), "rights": {**rights, "required": list(rights["properties"])}}
    caller["keys"] = list_of(thing(shown, words="Instants in ms, 0 = never."))
    new = {
        "name": text("The caller."),
        "id": text("The key's name in lists."),
        "key": text("All of it."),
        "expires_at": whole(),
    }
    return {
        "NewCaller": _asked(NewCaller),
        "Rotation": _asked(Rotation),
        "Callers": thing({"object": one_of("list"), "data": list_of(thing(caller, {"from": one_of("GATEWAY_KEYS")}))}),
        "NewKey": thing(new, words="It cannot be shown again."),
        "Revoked": thing({"name": text(), "revoked": list_of(text(), "Ids of the keys.")}),
    }


def _asked(kind: Any) -> Schema:
    schema: Schema = TypeAdapter(kind).json_schema(ref_template=REFS + "{model}")
    return schema


def _read_off(kind: Any) -> tuple[Schema, dict[str, Schema]]:
    schema = TypeAdapter(kind).json_schema(mode="serialization", ref_template=REFS + "{model}")
    return schema, schema.pop("$defs", {})


_HEALTH: dict[str, Schema] = {
    "Health": thing(
        {
            "status": one_of("ok", "stopping"),
            "version": text(),
            "policy_version": maybe(whole()),
            "redis": one_of("ok", "away"),
            "durability": text("Whether Redis keeps what it is told."),
            "unfit": list_of(text(), "Settings of Redis that are not as they should be."),
        },
        {"redis_version": text(), "skew_ms": whole("Redis' clock minus ours.")},
    ),
    "Ready": thing({"ready": flag(), "reasons": list_of(text(), "Why not.")}),
}
