"""Who waits and runs in each lane, and whether anybody looks after instants that have come."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from broker import errors
from broker.keyspace import GROUP
from broker.lanes import held_entries, waiting_entries
from broker.policies import Active
from broker.policy import Lane
from broker.store import Store

HELD_MAX = 1_000
"""Held entries of a lane that are looked through for its oldest waiting one."""

LATE_MS = 2_000
"""An instant that came longer ago than this has been seen by nobody: a scheduler looks twice a second."""

WANTS_MS = 60_000
"""Who asked for a place within this time wants one."""


@dataclass(frozen=True, kw_only=True)
class LaneLook:
    """One lane. `held_by` is host -> jobs that it runs; `asking` callers asked for a place within the last minute,
    `in_line` of them found none and have none."""

    name: str
    model: str
    priority: str
    waiting: int = 0
    max_queue: int = 0
    running: int = 0
    held_by: dict[str, int] = field(default_factory=dict)
    oldest_waiting_ms: int = 0
    cold_start_budget_ms: int = 0
    fallback: str = ""
    retiring: bool = False
    asking: int = 0
    in_line: int = 0


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """All lanes of the policy at one moment. `late` jobs have an instant that came over LATE_MS ago, the first
    `late_ms` ago."""

    at_ms: int
    policy_version: int
    lanes: tuple[LaneLook, ...] = ()
    scheduled: int = 0
    late: int = 0
    late_ms: int = 0


async def look(store: Store, active: Active) -> Lanes:
    """Reads every lane, a handful of commands each however long it is."""
    now = await store.now_ms()
    due = store.keys.due
    live, late, first, *lanes = await asyncio.gather(
        store.command("ZCARD", due),
        store.command("ZCOUNT", due, "-inf", f"({now - LATE_MS}"),
        store.command("ZRANGE", due, 0, 0, "WITHSCORES"),
        *(_lane(store, lane, now) for lane in active.lanes().values()),
    )
    first_at = score_of(first[0] if first and isinstance(first[0], list | tuple) else first)
    return Lanes(
        at_ms=now,
        policy_version=active.version,
        lanes=tuple(lanes),
        scheduled=max(0, int(live) - sum(lane.waiting + lane.running for lane in lanes)),
        late=int(late),
        late_ms=max(0, now - first_at) if late else 0,
    )


async def counts(store: Store, lane: str) -> tuple[int, dict[str, int]]:
    """Counts a lane's entries, and those that each host holds."""
    length, held = await asyncio.gather(
        store.command("XLEN", store.keys.lane(lane)), _held_by(store, store.keys.lane(lane))
    )
    return int(length), held


async def _held_by(store: Store, key: str) -> dict[str, int]:
    try:
        told: Any = await store.command("XPENDING", key, GROUP)
    except errors.BrokerUnavailable as e:
        if "NOGROUP" in str(e):  # a lane that nobody has used
            return {}
        raise
    if isinstance(told, dict):  # fakeredis' client
        return {row["name"].decode(): int(row["pending"]) for row in told["consumers"]}
    return {name.decode(): int(count) for name, count in told[3] or ()}


async def _lane(store: Store, lane: Lane, now: int) -> LaneLook:
    keys = store.keys
    (length, held), asking, in_line = await asyncio.gather(
        counts(store, lane.name),
        store.command("ZCOUNT", keys.active(lane.name), f"({now - WANTS_MS}", "+inf"),
        store.command("ZCARD", keys.line(lane.name)),
    )
    running = sum(held.values())
    oldest_at = await _oldest_waiting_at(store, lane.name) if length > running else 0
    return LaneLook(
        name=lane.name,
        model=lane.model,
        priority=lane.priority,
        waiting=max(0, length - running),
        max_queue=lane.max_queue,
        running=running,
        held_by=held,
        oldest_waiting_ms=max(0, now - oldest_at) if oldest_at else 0,
        cold_start_budget_ms=lane.cold_start_budget_ms,
        fallback=lane.fallback or "",
        retiring=lane.retiring,
        asking=int(asking),
        in_line=int(in_line),
    )


async def _oldest_waiting_at(store: Store, lane: str) -> int:
    """When the first entry that nobody holds was submitted; 0 where all are held by now."""
    held = set(await held_entries(store, lane, limit=HELD_MAX))
    async for entry in waiting_entries(store, lane, limit=len(held) + 1):
        if entry.entry not in held:
            return entry.submitted
    return 0


def score_of(row: list[bytes] | tuple[bytes, float] | None) -> int:
    """Reads an instant from a member and its score; 0 where there is none."""
    return int(float(row[1])) if row else 0
