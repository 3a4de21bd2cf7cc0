"""What the gateway's own objects look like, read off the records that they are made of."""

from typing import Any

from pydantic import TypeAdapter

from api.async_jobs import (
    LANE_CHARACTERS_MAX,
    METADATA_KEY_CHARACTERS_MAX,
    METADATA_KEYS_MAX,
    METADATA_TEXT_CHARACTERS_MAX,
)
from api.durations import LENGTH_PATTERN
from api.routes.batches import NewBatch
from api.routes.keys import NewCaller, Rotation
from api.routes.webhooks import NewSecret
from broker import requests
from broker.callers import Key, Keyring, Rights
from broker.dead import Letter
from broker.dialects.json_schema import (
    REFS,
    Schema,
    any_value,
    flag,
    list_of,
    maybe,
    nothing,
    number,
    one_of,
    ref,
    some,
    text,
    thing,
    whole,
)
from broker.records import JobRecord
from broker.status import Snapshot
from broker.trust.addresses import URL_MAX
from broker.trust.audit import Left
from broker.usage_report import BY, Used
from broker.webhooks import Delivery


def schemas() -> dict[str, Schema]:
    """Gives them by name."""
    return {
        **_status(), "Job": _job(), **_new_jobs(), **_keys(), **_audit(), **_HEALTH, **_usage(), **_tune(),
        **_webhooks(), **_FILES, **_batches(),
    }  # fmt: skip


def _status() -> dict[str, Schema]:
    status, parts = _read_off(Snapshot)
    parts["ModelStatus"]["properties"]["cached_share"] = maybe(number("cached_tokens of prompt_tokens."))
    del status["properties"]["day"], parts["By"]
    status["properties"]["policy"] = list_of(text(), "What happens to jobs that wait too long, in sentences.")
    return {**parts, "Status": {**status, "required": list(status["properties"])}}


def _job() -> Schema:
    job, parts = _read_off(JobRecord)
    shown = {key: value for key, value in job["properties"].items() if key not in JobRecord.HIDDEN}
    shown["state"] = {"type": "string", "enum": parts["State"]["enum"]}
    shown["usage"] = maybe(thing({}, words="The runtime's own figures."))
    shown["error"] = maybe(thing({"code": text(), "message": text()}, words="What went wrong."))
    shown["metadata"] = {**thing({}, words="What its caller noted on it."), "additionalProperties": text()}
    return {"type": "object", "description": job["description"], "properties": shown, "required": list(shown)}


def _new_jobs() -> dict[str, Schema]:
    note = {"type": "string", "maxLength": METADATA_TEXT_CHARACTERS_MAX}
    metadata = {
        "type": ["object", "null"], "maxProperties": METADATA_KEYS_MAX, "additionalProperties": note,
        "propertyNames": {"minLength": 1, "maxLength": METADATA_KEY_CHARACTERS_MAX},
        "description": "Notes of its caller, for lists and webhooks.",
    }  # fmt: skip
    asked = {
        "endpoint": maybe(one_of(*requests.ENDPOINTS, words="Whose body it is.")),
        "lane": maybe(text("Enter this lane instead of the one that `model` leads to.", maxLength=LANE_CHARACTERS_MAX)),
        "webhook": maybe(text("Where its end is told.", maxLength=URL_MAX, pattern="^(https?://.+)?$")),
        "metadata": metadata,
        "notBefore": some(
            text("An instant like 2026-11-30T06:00:00Z, a length of time like 10m, or seconds since 1970."),
            number("Seconds since 1970."), {"type": "null"}, words="When it may start, 30 days ahead at most.",
        ),
        "expiresAfter": maybe(
            text("How long it may wait for a slot from there, 1s to 30d, like 12h; else as its lane says.",
                 pattern=LENGTH_PATTERN)
        ),
        "priority": maybe(one_of("batch", "interactive", words="Within what the key allows; batch unless said.")),
    }  # fmt: skip
    order = thing({"body": thing({}, words="The body that the endpoint takes.")}, asked)
    letter, _ = _read_off(Letter)
    more = text("The `after` of the next page, empty where this is the last.")
    links = thing({name: text() for name in ("self", "events", "result", "cancel")}, words="Paths of this gateway.")
    return {
        "NewJob": {**order, "additionalProperties": False},
        "Jobs": thing({"object": one_of("list"), "data": list_of(ref("Job")), "next": more}),
        "Letter": {**letter, "required": list(letter["properties"])},
        "Letters": thing({"object": one_of("list"), "data": list_of(ref("Letter")), "next": more}),
        "TakenJob": {"allOf": [ref("Job"), thing({"links": links})]},
    }


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


def _batches() -> dict[str, Schema]:
    new = _asked(NewBatch)
    parts = new.pop("$defs", {})
    batch = {
        "id": text(),
        "object": one_of("batch"),
        "endpoint": text(),
        "errors": maybe(ref("BatchErrors")),
        "input_file_id": text(),
        "completion_window": text(),
        "status": one_of(
            "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
        ),
        "output_file_id": maybe(text("Of the answers, once there is one.")),
        "error_file_id": maybe(text("Of the requests without an answer, once there is one.")),
        "created_at": whole("In seconds."),
        "expires_at": whole("What has no answer then is left without."),
        "request_counts": thing({"total": whole(), "completed": whole(), "failed": whole()}),
        "metadata": maybe({"type": "object", "additionalProperties": text()}),
        "wait": maybe(ref("BatchWait")),
    }
    instants = "in_progress finalizing completed failed expired cancelling cancelled".split()
    batch |= {f"{name}_at": maybe(whole()) for name in instants}
    wrong = thing({"code": text(), "message": text(), "line": maybe(whole("Of the input file, from 1."))})
    return {
        **parts,
        "NewBatch": new,
        "Batch": thing(batch),
        "Batches": thing({"object": one_of("list"), "data": list_of(ref("Batch")), **_PAGE}),
        "BatchWait": thing({"code": text(), "message": text()}, words="What its lines wait for that are no jobs."),
        "BatchErrors": thing({"object": one_of("list"), "data": list_of(wrong)}, words="Why all of it failed."),
    }


def _asked(kind: Any) -> Schema:
    schema: Schema = TypeAdapter(kind).json_schema(ref_template=REFS + "{model}")
    return schema


def _usage() -> dict[str, Schema]:
    figures = {name: _figure(_FIGURES[name], value) for name, value in Used().as_json().items()}
    names = {name: text() for name in BY}
    usage = {
        "since": text("The first day."),
        "until": text("The last day."),
        "zone": text("Whose days they are."),
        "by": list_of(one_of(*BY), "What has a row."),
        "caller": maybe(text("Only this one's; null = everybody's.")),
        "first_token_error": number("The most by which a percentile may differ from the exact one, as a share of it."),
        "rows": list_of(ref("UsageRow"), "With the names that `by` says."),
        "total": ref("Used"),
    }
    return {
        "Used": thing(figures, words="Figures of some days, jobs on the day of their end."),
        "UsageRow": thing(figures, names),
        "Usage": thing(usage),
    }


def _tune() -> dict[str, Schema]:
    proposal = {
        "key": text("Where it stands in the policy file, like models.deep-coder.maxQueue; `routing` for a new rule."),
        "now": any_value("What the file says; null = nothing of the kind."),
        "proposed": any_value("What it should say."),
        "why": text("The reason, with the figures that it rests on."),
    }
    tuning = {
        "since": text("The first day that was looked at."),
        "until": text("The last one."),
        "zone": text("Whose days they are."),
        "policy_version": whole("Of the policy that the proposals are for."),
        "proposals": list_of(ref("Proposal")),
        "advice": list_of(text(), "What no number mends."),
        "unknown": list_of(text(), "What could not be judged."),
        "fragment": thing({}, words="The proposals as a part of a policy."),
    }
    return {"Proposal": thing(proposal), "Tuning": thing(tuning)}


def _figure(words: str, example: Any) -> Schema:
    """A count, what there may be none of (a share, a percentile), or counts by code."""
    if example is None:
        return maybe(number(words))
    return {**thing({}, words=words), "additionalProperties": whole()} if example == {} else whole(words)


def _audit() -> dict[str, Schema]:
    left, _ = _read_off(Left)
    left = {**left, "required": list(left["properties"])}
    more = text("The `after` of the next page, empty where this is the last.")
    return {"Left": left, "Audit": thing({"records": list_of(ref("Left")), "next": more})}


def _webhooks() -> dict[str, Schema]:
    delivery, parts = _read_off(Delivery)
    parts["Try"]["required"] = list(parts["Try"]["properties"])
    words = "Until when its endpoint is left alone, since it failed too often: no attempt comes before. 0 = it is not."
    delivery["properties"]["left_alone_until"] = whole(words)
    page = {
        "object": one_of("list"),
        "data": list_of(ref("Delivery")),
        "has_more": flag("There are older ones."),
    }
    secret = {"id": text(), "made_at": whole(), "ends_at": whole("0 = it does not end.")}
    return {
        **parts,
        "Delivery": {**delivery, "required": list(delivery["properties"])},
        "Deliveries": thing(page),
        "NewSecret": _asked(NewSecret),
        "WebhookSecret": thing({"caller": text(), "id": text(), "secret": text("All of it, whsec_…")}),
        "WebhookSecrets": thing({"object": one_of("list"), "data": list_of(thing(secret))}),
        "WebhookSecretRevoked": thing({"caller": text(), "revoked": text("Its id.")}),
    }


def _read_off(kind: Any) -> tuple[Schema, dict[str, Schema]]:
    schema = TypeAdapter(kind).json_schema(mode="serialization", ref_template=REFS + "{model}")
    return schema, schema.pop("$defs", {})


_PAGE: Schema = {"has_more": flag(), "first_id": maybe(text()), "last_id": maybe(text())}
_FILES: dict[str, Schema] = {
    "NewFile": thing(
        {"file": text("JSONL: each line is one request.", format="binary"), "purpose": one_of("batch")},
        {
            "expires_after[anchor]": one_of("created_at"),
            "expires_after[seconds]": whole(
                "Kept this long, where that is less than `fileDays`.", least=3_600, most=2_592_000
            ),
        },
    ),
    "File": thing(
        {
            "id": text(),
            "object": one_of("file"),
            "bytes": whole(),
            "created_at": whole("In seconds, as all of OpenAI's instants."),
            "expires_at": whole(),
            "filename": text(),
            "purpose": one_of("batch", "batch_output"),
            "status": one_of("processed"),
            "status_details": nothing(),
        }
    ),
    "Files": thing({"object": one_of("list"), "data": list_of(ref("File")), **_PAGE}),
    "FileDeleted": thing({"id": text(), "object": one_of("file"), "deleted": one_of(True)}),
}
_HEALTH: dict[str, Schema] = {
    "Health": thing(
        {
            "status": one_of("ok", "stopping"),
            "version": text(),
            "policy_version": maybe(whole("Of the policy at hand.")),
            "policy_unread": maybe(whole("Of the active one, where this version of warmlane cannot read it.")),
            "redis": one_of("ok", "away"),
            "durability": text("Whether Redis keeps what it is told."),
            "unfit": list_of(text(), "What of Redis is not as it should be: its settings, or that it is full."),
        },
        {"redis_version": text(), "skew_ms": whole("Redis' clock minus ours.")},
    ),
    "Ready": thing({"ready": flag(), "reasons": list_of(text(), "Why not.")}),
}

_FIGURES = {
    "asked": "Requests: those that were refused, and those that became jobs.",
    "done": "Jobs that were answered.",
    "failed": "Jobs that ended with an error.",
    "cancelled": "Jobs cancelled by request, because their client hung up, or because their key was revoked.",
    "expired": "Jobs that waited in vain.",
    "refused": "Requests that were refused.",
    "by_other": "Answered jobs that another model served than the one asked for.",
    "promotions": "Moves to a fallback lane, of jobs that asked for the model.",
    "judged": "Interactive jobs whose first token was judged.",
    "in_time": "Of those, in time from any model.",
    "in_time_asked": "Of those, in time from the model asked for.",
    "in_time_share": "in_time of judged.",
    "in_time_asked_share": "in_time_asked of judged.",
    "first_token_p50_ms": "Half of the first tokens of interactive jobs came within this time.",
    "first_token_p95_ms": "95 % did.",
    "first_token_p99_ms": "99 % did.",
    "tokens_in": "Prompt tokens, as the runtimes counted them; of the model that served.",
    "tokens_cached": "Of those, from a runtime's cache.",
    "tokens_out": "Tokens of answers.",
    "untold": "Answered jobs whose runtime told no tokens.",
    "queued_ms": "How long jobs waited in lanes.",
    "running_ms": "How long jobs held slots, of the model that served.",
    "failed_by": "Failed jobs by code.",
    "refused_by": "Refused requests by code.",
}
