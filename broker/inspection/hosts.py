"""The hosts of the last day and the models on them; who holds which wake lock."""

import asyncio
import re
from dataclasses import dataclass

from broker.policies import Active
from broker.records import HostRecord, ModelFacts, ModelOnHost, without_name
from broker.store import Store


@dataclass(frozen=True, kw_only=True)
class ModelHere:
    """A model on a live host. `behind`: the worker still serves it under an earlier policy."""

    name: str
    state: str
    reason: str = ""
    for_ms: int = 0
    slots_used: int = 0
    slots_settling: int = 0
    slots_total: int = 0
    first_token_ms: float = 0
    memory_bytes: int = 0
    sessions: int = 0
    behind: bool = False


@dataclass(frozen=True, kw_only=True)
class HostLook:
    """A host. One that is not alive has told nothing for longer than its lease; what it told before is gone with it."""

    name: str
    alive: bool
    beat_age_ms: int
    lease_ms: int = 0
    boot: str = ""
    pid: int = 0
    up_ms: int = 0
    memory_total: int = 0
    memory_used: int = 0
    memory_headroom: int = 0
    memory_source: str = ""
    policy_version: int = 0
    policy_unread: int = 0
    draining: bool = False
    skew_ms: int = 0
    models: tuple[ModelHere, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LockLook:
    """A wake lock. `holder` is "" while nobody holds it; `alive`: its boot is the one that the host now tells of. A
    value that no worker wrote is a holder without a boot."""

    model: str
    holder: str = ""
    boot: str = ""
    epoch: int = 0
    ttl_ms: int = 0
    alive: bool = False
    wakes: int = 0
    failures: int = 0
    quarantine_ms: int = 0
    wanted_ms: int = 0


async def look(store: Store, active: Active | None) -> list[HostLook]:
    """Reads every host that was there within a day, live ones first."""
    now = await store.now_ms()
    beats = await _beats(store)
    found = await asyncio.gather(*(_host(store, active, name, at, now) for name, at in beats.items()))
    return sorted(found, key=lambda host: (not host.alive, host.name))


async def locks(store: Store, models: list[str]) -> list[LockLook]:
    """Reads the wake lock of each model."""
    now = await store.now_ms()
    return list(await asyncio.gather(*(_lock(store, model, now) for model in models)))


async def locked_models(store: Store) -> list[str]:
    """Finds the models that have locks or counters, for when no policy says which models there are."""
    found = {store.keys.wake_model_of(key) async for key in store.scan(store.keys.wake("*"))}
    return sorted(found - {""})


async def _beats(store: Store) -> dict[str, int]:
    told = await store.command("ZRANGE", store.keys.hosts, 0, -1, "WITHSCORES")
    flat = [x for row in told for x in row] if told and isinstance(told[0], list | tuple) else told
    return {flat[i].decode(): int(float(flat[i + 1])) for i in range(0, len(flat), 2)}


async def _host(store: Store, active: Active | None, name: str, beat_at: int, now: int) -> HostLook:
    keys, models = store.keys, list(active.models()) if active is not None else []
    raw, lease, *told = await asyncio.gather(
        store.hash(keys.host(name)),
        store.command("PTTL", keys.host(name)),
        *(store.hash(keys.model_on_host(model, name)) for model in models),
        *(store.hash(keys.model(model)) for model in models),
    )
    if not raw:
        return HostLook(name=name, alive=False, beat_age_ms=max(0, now - beat_at))
    host = HostRecord.from_hash(raw)
    version = active.version if active is not None else 0
    return HostLook(
        name=name,
        alive=True,
        beat_age_ms=max(0, now - host.beat_at),
        lease_ms=max(0, int(lease)),
        boot=host.boot,
        pid=host.pid,
        up_ms=max(0, now - host.started_at) if host.started_at else 0,
        memory_total=host.memory_total,
        memory_used=host.memory_used,
        memory_headroom=host.memory_headroom,
        memory_source=host.memory_source,
        policy_version=host.policy_version,
        policy_unread=host.policy_unread,
        draining=host.draining,
        skew_ms=host.skew_ms,
        models=tuple(
            _model(model, ModelOnHost.from_hash(state), ModelFacts.from_hash(facts), version, now)
            for model, state, facts in zip(models, told[: len(models)], told[len(models) :], strict=True)
            if state
        ),
    )


def _model(name: str, told: ModelOnHost, facts: ModelFacts, version: int, now: int) -> ModelHere:
    return ModelHere(
        name=name,
        state=told.state,
        reason=told.reason or (_why_cold(name, facts, now) if told.state == "cold" else ""),
        for_ms=max(0, now - told.since) if told.since else 0,
        slots_used=told.slots_used,
        slots_settling=told.slots_settling,
        slots_total=told.slots_total,
        first_token_ms=told.first_token_ms,
        memory_bytes=told.memory_bytes,
        sessions=len(told.cached()),
        behind=told.version != version,
    )


def _why_cold(name: str, facts: ModelFacts, now: int) -> str:
    if facts.quarantined_until > now:
        return f"quarantined: {without_name(name, facts.failure)}"
    return facts.failed(name)


async def _lock(store: Store, model: str, now: int) -> LockLook:
    keys = store.keys
    value, ttl, wakes, raw = await asyncio.gather(
        store.command("GET", keys.wake(model)),
        store.command("PTTL", keys.wake(model)),
        store.command("GET", keys.wake_epoch(model)),
        store.hash(keys.model(model)),
    )
    facts = ModelFacts.from_hash(raw)
    host, boot, epoch = _holder((value or b"").decode(errors="backslashreplace"))
    owner: bytes | None = await store.command("HGET", keys.host(host), "boot") if boot else None
    return LockLook(
        model=model,
        holder=host,
        boot=boot,
        epoch=epoch,
        ttl_ms=max(0, int(ttl)) if value else 0,
        alive=owner is not None and owner.decode() == boot,
        wakes=int(wakes) if wakes and wakes.isdigit() else 0,
        failures=facts.failures,
        quarantine_ms=max(0, facts.quarantined_until - now),
        wanted_ms=max(0, facts.wanted_until - now),
    )


def _holder(value: str) -> tuple[str, str, int]:
    """The host, the boot and the epoch in a lock's value; of one that no worker wrote all of it, "" and 0."""
    found = re.fullmatch(r"(.+)/([^/]+)/(\d+)", value, re.ASCII)
    return (found[1], found[2], int(found[3])) if found else (value, "", 0)
