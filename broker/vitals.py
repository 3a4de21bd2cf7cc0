"""How the gateway's own machinery does, beyond the jobs: what is late, what has piled up, what its Redis is like.

The status snapshot tells of lanes, models and hosts; this tells an operator whether those figures can be trusted.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.records import ModelFacts
from broker.store import Store


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """Figures at one moment of Redis' clock; what nobody could tell is None."""

    due_late_ms: int = 0
    """For how long the oldest instant of `gw:due` has passed that nobody has looked at; 0 = nothing is overdue."""
    due_overdue: int = 0
    jobs_live: int = 0
    dead_letters: int = 0
    batches_open: int = 0
    batch_oldest_ms: int = 0
    outbox_oldest_ms: int = 0
    """Age of the oldest event that is no delivery yet."""
    webhooks_late_ms: int = 0
    """For how long the endpoint that has waited longest should have been looked at."""
    durability: str = "unknown"
    unfit: tuple[str, ...] = ()
    redis_used_bytes: int | None = None
    redis_max_bytes: int | None = None
    """0 = as much as there is."""
    redis_writes_ok: bool | None = None
    """Whether the last write of the append-only file and the last snapshot went well."""
    facts: Mapping[str, ModelFacts] = field(default_factory=dict)


async def read(store: Store, *, facts: Mapping[str, ModelFacts]) -> Vitals:
    """Takes them, in one go; `facts` come from a picture that was taken just before."""
    keys, ask = store.keys, store.command
    now = await store.now_ms()
    (
        first_due, overdue, live, letters, batches, first_batch, events, endpoints, durability, unfit, info,
    ) = await asyncio.gather(
        ask("ZRANGE", keys.due, 0, 0, "WITHSCORES"),
        ask("ZCOUNT", keys.due, "-inf", f"({now}"),
        ask("ZCARD", keys.due),
        ask("XLEN", keys.dead),
        ask("ZCARD", keys.batches),
        ask("ZRANGE", keys.batches, 0, 0, "WITHSCORES"),
        ask("XRANGE", keys.outbox, "-", "+", "COUNT", 1),
        ask("ZRANGE", keys.webhooks, 0, 0, "WITHSCORES"),
        store.durability(),
        store.unfit_settings(),
        _info(store),
    )  # fmt: skip
    return Vitals(
        due_late_ms=_since(first_due, now),
        due_overdue=int(overdue),
        jobs_live=int(live),
        dead_letters=int(letters),
        batches_open=int(batches),
        batch_oldest_ms=_since(first_batch, now),
        outbox_oldest_ms=max(0, now - int(events[0][0].split(b"-")[0])) if events else 0,
        webhooks_late_ms=_since(endpoints, now),
        durability=durability,
        unfit=tuple(unfit),
        redis_used_bytes=_number(info, "used_memory"),
        redis_max_bytes=_number(info, "maxmemory"),
        redis_writes_ok=_writes_ok(info),
        facts=facts,
    )


def _since(first: list[Any], now: int) -> int:
    """For how long the lowest score of a sorted set has passed; 0 where it has not, or where there is none."""
    if not first:
        return 0
    score = first[0][1] if isinstance(first[0], list | tuple) else first[1]
    return max(0, now - int(float(score)))


async def _info(store: Store) -> dict[str, str]:
    """What the server says of its memory and its files."""
    return await store.info("memory") | await store.info("persistence")


def _number(info: Mapping[str, str], name: str) -> int | None:
    value = info.get(name, "")
    return int(value) if value.isdigit() else None


def _writes_ok(info: Mapping[str, str]) -> bool | None:
    said = [info[name] for name in ("aof_last_write_status", "rdb_last_bgsave_status") if name in info]
    return all(word == "ok" for word in said) if said else None
