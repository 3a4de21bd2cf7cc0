"""Webhooks: what a caller is told of the ends of its jobs, from the outbox until its endpoint has taken it.

The script that ends a job writes the event. `gather` makes a delivery of it, whose id and body never change. The
deliveries of one job stand in line, so that they arrive in order; the first is due at its endpoint. `take` lends it
out under a lease and `note` says how it went. Every step is one script, so whoever is killed between two of them leaves
it to the next: what arrives may arrive again, under the same id.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from broker import errors, webhook_secrets
from broker.keyspace import EVERYBODY, digest
from broker.records import decode_hash
from broker.store import Store
from broker.trust import addresses
from broker.trust.resolver import resolve as resolve_here

LEASE_MS = 30_000
"""How long a delivery that somebody took is left to him: longer than any attempt lasts."""

KEPT_MS = {"delivered": 86_400_000, "dead": 7 * 86_400_000, "failed": 0}
"""How long one that has ended so is kept."""

LISTED_MAX = 10_000
LISTED_MS = 9 * 86_400_000
TRIES_KEPT = 20
ENDPOINT_MS = 86_400_000
PAGE_MAX = 200

Outcome = Literal["delivered", "failed", "dead"]
OUTCOMES: tuple[Outcome, ...] = ("delivered", "failed", "dead")


@dataclass(frozen=True)
class Try:
    """One attempt: when it ended (ms), the status that came (0 = none), how long it took, and what was wrong."""

    at: int
    status: int
    ms: int
    error: str = ""


@dataclass(frozen=True)
class Delivery:
    """One event on its way to its caller. Instants in ms, 0 = has not come."""

    id: str
    job: str
    caller: str
    type: str
    url: str
    state: str  # pending, delivered, dead
    at: int  # when the job ended
    since: int  # from when its horizon counts: when it was made, or sent once more by hand
    tries: int  # attempts since then
    next_at: int
    ended_at: int
    attempts: tuple[Try, ...]  # the last ones, oldest first
    left_alone_until: int = 0  # of one that is pending, whose endpoint has failed too often: nothing goes there before

    @classmethod
    def from_fields(cls, f: dict[str, str]) -> "Delivery":
        """Reads the hash."""
        tries = tuple(Try(**json.loads(line)) for line in f.get("history", "").split("\n") if line)
        numbers = {name: int(f.get(name) or 0) for name in ("at", "since", "tries", "next_at", "ended_at")}
        texts = {name: f.get(name, "") for name in ("id", "job", "caller", "type", "url", "state")}
        return cls(**texts, **numbers, attempts=tries)  # type: ignore[arg-type]  # two kinds of fields


@dataclass(frozen=True)
class Taken:
    """A delivery under a lease, for one attempt. `over`: its horizon passed while its endpoint was left alone."""

    delivery: Delivery
    attempt: int
    body: str
    endpoint: str
    failures: int  # of its endpoint, in a row
    over: bool = False


async def accept(
    store: Store, *, caller: str, url: str, allow: list[str], resolve: addresses.Resolve = resolve_here
) -> None:
    """Whether a caller's job may have this webhook; raises BadRequest for what is no such URL, for a host without an
    address and for a caller without a secret, and AddressRefused. Only a first look, which a resolver that is slow
    ends without a word: each delivery looks again."""
    target = addresses.target_of(url)
    if not await webhook_secrets.listed(store, caller):
        words = f"{caller} has no secret that webhooks are signed with: `gateway webhook secret new` makes one"
        raise errors.BadRequest(words, "webhook")
    try:
        await addresses.checked(target, allow, resolve)
    except TimeoutError:
        return  # that is nobody's fault here
    except OSError:
        raise errors.BadRequest(f"the webhook's host {target.host} has no address", "webhook") from None


async def gather(store: Store, *, limit: int) -> int:
    """Makes deliveries of the oldest events in the outbox; gives how many there were."""
    keys = store.keys
    entries = await store.command("XRANGE", keys.outbox, "-", "+", "COUNT", limit)
    for entry, values in entries or []:
        event = decode_hash(values)
        endpoint = endpoint_of(event["caller"], event["url"])
        fields = {name: event[name] for name in ("job", "caller", "type", "url")} | {"body": body_of(event)}
        await store.run(
            "webhook_gather",
            [
                keys.outbox,
                keys.webhook(event["id"]),
                keys.webhook_line(event["job"]),
                *_of_endpoint(store, endpoint),
                keys.webhook_list(event["caller"]),
                keys.webhook_list(EVERYBODY),
            ],
            [
                store.now_arg(),
                entry.decode(),
                event["id"],
                endpoint,
                event["ended_at"],
                LISTED_MAX,
                LISTED_MS,
                *(x for pair in fields.items() for x in pair),
            ],
        )
    return len(entries or [])


def endpoint_of(caller: str, url: str) -> str:
    """What fails together: a caller's URLs on one server. One that is no URL fails alone, and holds up nobody."""
    try:
        return digest(f"{caller} {addresses.target_of(url).origin}")
    except errors.BadRequest:
        return digest(f"{caller} {url}")


def body_of(event: dict[str, str]) -> str:
    """What is sent of an event: never the answer itself, and never a runtime's words."""
    job = event["job"]
    data: dict[str, Any] = {"id": job, "state": event["type"].removeprefix("job.")}
    if event["metadata"]:
        data["metadata"] = _as_json(event["metadata"])
    data["error"] = {"code": event["code"], "message": event["message"]} if event["code"] else None
    data["usage"] = _as_json(event["usage"]) if event["usage"] else None
    at = f"/v1/jobs/{job}"
    data["links"] = {"self": at, "events": at + "/events", "result": at + "/result"}
    ended = datetime.fromtimestamp(int(event["ended_at"]) / 1000, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"type": event["type"], "timestamp": ended.replace("+00:00", "Z"), "data": data})


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


async def due(store: Store, *, limit: int) -> list[str]:
    """The endpoints that somebody should look at now, those first that have waited longest."""
    now = await store.now_ms()
    found = await store.command("ZRANGEBYSCORE", store.keys.webhooks, "-inf", now, "LIMIT", 0, limit)
    return [endpoint.decode() for endpoint in found]


async def take(store: Store, endpoint: str, *, most: int, failures_max: int, horizon_ms: int) -> list[Taken]:
    """Takes what an endpoint gets now, at most so many deliveries at once. After `failures_max` failures in a row it
    gets one, as a trial, and what is over its horizon is taken to be given up on."""
    keys = store.keys
    told = await store.run(
        "webhook_take",
        [keys.webhooks, keys.webhook_due(endpoint), keys.webhook_endpoint(endpoint)],
        [store.now_arg(), endpoint, most, LEASE_MS, failures_max, horizon_ms, keys.webhook("")],
    )
    failures = int(await store.command("HGET", keys.webhook_endpoint(endpoint), "failures") or 0)
    taken = []
    for delivery_id, attempt, word in zip(told[::3], told[1::3], told[2::3], strict=True):
        fields = decode_hash(await store.hash(keys.webhook(delivery_id.decode())))
        delivery = Delivery.from_fields(fields)
        taken.append(Taken(delivery, int(attempt), fields["body"], endpoint, failures, over=word == b"over"))
    return taken


async def note(
    store: Store,
    taken: Taken,
    outcome: Outcome,
    told: Try,
    *,
    retry_after_ms: int = 0,
    breaks: bool = False,
    open_for_ms: int = 0,
) -> None:
    """Notes how an attempt went. `breaks`: its endpoint failed, and is left alone for `open_for_ms`. Raises
    StaleAttempt where the lease ran out and somebody else has it."""
    keys, delivery = store.keys, taken.delivery
    await store.run(
        "webhook_note",
        [
            keys.webhook(delivery.id),
            keys.webhook_line(delivery.job),
            *_of_endpoint(store, taken.endpoint),
            keys.webhook_counts,
        ],
        [
            store.now_arg(),
            delivery.id,
            taken.endpoint,
            taken.attempt,
            outcome,
            retry_after_ms,
            json.dumps(asdict(told)),
            TRIES_KEPT,
            int(breaks),
            open_for_ms,
            KEPT_MS[outcome],
            ENDPOINT_MS,
        ],
    )


async def read(store: Store, delivery_id: str, *, caller: str = "") -> Delivery:
    """Reads a delivery, of this caller or ("") of anybody; raises NoSuchDelivery."""
    fields = decode_hash(await store.hash(store.keys.webhook(delivery_id)))
    if not fields or (caller and fields["caller"] != caller):
        raise errors.NoSuchDelivery(delivery_id)
    (delivery,) = await _with_endpoints(store, [Delivery.from_fields(fields)])
    return delivery


async def redeliver(store: Store, delivery_id: str, *, caller: str = "") -> Delivery:
    """Has an event delivered again, or now; raises NoSuchDelivery."""
    delivery = await read(store, delivery_id, caller=caller)
    endpoint, keys = endpoint_of(delivery.caller, delivery.url), store.keys
    await store.run(
        "webhook_redeliver",
        [keys.webhook(delivery_id), keys.webhook_line(delivery.job), *_of_endpoint(store, endpoint)],
        [store.now_arg(), delivery_id, endpoint],
    )
    return await read(store, delivery_id)


async def listed(store: Store, *, caller: str = EVERYBODY, limit: int = 50, after: str = "") -> list[Delivery]:
    """A caller's deliveries, or everybody's, the newest first; `after` is the id of the last one known. One that is no
    longer kept leaves the list here."""
    key, start = store.keys.webhook_list(caller), 0
    if after:
        rank = await store.command("ZREVRANK", key, after)
        if rank is None:
            raise errors.NoSuchDelivery(after)
        start = int(rank) + 1
    found: list[Delivery] = []
    while len(found) < limit:
        ids = await store.command("ZREVRANGE", key, start, start + limit - 1)
        raws = await asyncio.gather(*(store.hash(store.keys.webhook(delivery_id.decode())) for delivery_id in ids))
        kept = [Delivery.from_fields(decode_hash(raw)) for raw in raws if raw]
        found += kept
        start += len(kept)
        if gone := [delivery_id for delivery_id, raw in zip(ids, raws, strict=True) if not raw]:
            await store.command("ZREM", key, *gone)
        if len(ids) < limit:
            break
    return await _with_endpoints(store, found[:limit])


@dataclass(frozen=True)
class Figures:
    """How deliveries go, since the counting began, and how many events wait to be made deliveries."""

    outcomes: dict[str, int]
    outbox: int


async def figures(store: Store) -> Figures:
    """Reads them."""
    told = decode_hash(await store.hash(store.keys.webhook_counts))
    outbox = int(await store.command("XLEN", store.keys.outbox))
    return Figures({outcome: int(told.get(outcome, 0)) for outcome in OUTCOMES}, outbox)


async def _with_endpoints(store: Store, deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Adds until when the endpoints of those that are pending are left alone."""
    endpoints = {one.id: endpoint_of(one.caller, one.url) for one in deliveries if one.state == "pending"}
    asked = sorted(set(endpoints.values()))
    keys = map(store.keys.webhook_endpoint, asked)
    told = await asyncio.gather(*(store.command("HGET", key, "open_until") for key in keys))
    now = await store.now_ms() if any(told) else 0
    until = {endpoint: int(ms) for endpoint, ms in zip(asked, told, strict=True) if int(ms or 0) > now}
    return [replace(one, left_alone_until=until.get(endpoints.get(one.id, ""), 0)) for one in deliveries]


def _of_endpoint(store: Store, endpoint: str) -> list[str]:
    keys = store.keys
    return [keys.webhook_due(endpoint), keys.webhooks, keys.webhook_endpoint(endpoint)]
