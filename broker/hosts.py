"""Hosts and the models on them: what workers tell, and the picture that everybody decides by."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from broker import dispatch, errors, looks
from broker.dispatch import Availability, ModelView
from broker.looks import CloseLook, Look
from broker.policies import Active, PolicyBook
from broker.policy import Lane
from broker.precedence import Before
from broker.recent import RecentFirstTokens
from broker.records import HostRecord, Learned, ModelFacts, ModelOnHost
from broker.store import Store

log = logging.getLogger("warmlane.hosts")

HOST_LEASE_MS = 6_000
BEAT_EVERY_S = 2.0
LOOK_EVERY_S = 0.5
FORGET_HOST_MS = 86_400_000

LEARNED_MS = 30 * 86_400_000
NOT_FOR_BATCH = "batch work does not wake it now (wakeForBatch)"
"""For how long it is remembered what a model was like on a host: longer than a box is switched off for a holiday."""


async def beat(
    store: Store, host: HostRecord, models: dict[str, ModelOnHost], *, take: bool = False, lease_ms: int = HOST_LEASE_MS
) -> None:
    """Says that a host lives and what its models are; raises LockHeld when another boot owns the name."""
    keys = [store.keys.host(host.name), store.keys.hosts]
    keys += [store.keys.model_on_host(model, host.name) for model in models]
    told = [json.dumps(host.to_hash()), *(json.dumps(m.to_hash()) for m in models.values())]
    await store.run("host_beat", keys, [store.now_arg(), host.name, host.boot, lease_ms, int(take), *told])


async def read(store: Store, name: str) -> HostRecord | None:
    """Reads what a host last told, None when no live one has the name."""
    raw = await store.hash(store.keys.host(name))
    return HostRecord.from_hash(raw) if raw else None


async def leave(store: Store, host: HostRecord, models: list[str]) -> None:
    """Takes a host off at once, so that nobody waits for its lease to end, or takes it for lost."""
    current = await store.command("HGET", store.keys.host(host.name), "boot")
    if current in (host.boot.encode(), None):  # None = its lease ran out while it stopped
        await store.command(
            "DEL", store.keys.host(host.name), *(store.keys.model_on_host(m, host.name) for m in models)
        )
        await store.command("ZREM", store.keys.hosts, host.name)


async def learn(store: Store, model: str, **facts: float | int | str) -> None:
    """Notes what was learned of a model: fields of ModelFacts."""
    flat = [x for name, value in facts.items() for x in (name, value)]
    await store.run("wish", [store.keys.model(model)], [store.now_arg(), 0, *flat])


async def count(store: Store, model: str, **amounts: int) -> None:
    """Adds to what is counted of a model: fields of ModelFacts."""
    key = store.keys.model(model)
    await asyncio.gather(*(store.command("HINCRBY", key, name, amount) for name, amount in amounts.items() if amount))


NOT_FAILED: Mapping[str, int | str] = {"failures": 0, "quarantined_until": 0, "failure": "", "failed_at": ""}
"""What ModelFacts hold of failed loads where there were none."""


async def learn_here(store: Store, model: str, host: str, learned: Learned, *, keep_ms: int = LEARNED_MS) -> None:
    """Notes what a load showed of a model on one host, and for hosts that never loaded it."""
    keys = [store.keys.learned(model, host), store.keys.model(model)]
    await store.run("learn_here", keys, [keep_ms, learned.footprint_bytes, learned.load_ms, learned.definition])


async def learned_here(store: Store, model: str, host: str) -> Learned:
    """Reads what was learned of a model on one host."""
    return Learned.from_hash(await store.hash(store.keys.learned(model, host)))


async def forget(store: Store, *, known: set[str] | None) -> None:
    """Drops hosts that have been silent for a day; with `known`, also what was learned of models not in it."""
    now = await store.now_ms()
    await store.command("ZREMRANGEBYSCORE", store.keys.hosts, "-inf", now - FORGET_HOST_MS)
    if known is None:
        return
    async for key in store.scan(store.keys.model("*")):
        model = store.keys.model_of(key)
        if model and model not in known:
            await store.command("DEL", key, store.keys.wake_epoch(model))
    async for key in store.scan(store.keys.learned("*", "*")):
        model = store.keys.learned_model_of(key)
        if model and model not in known:
            await store.command("DEL", key)


@dataclass
class Picture:
    """All hosts and models at one moment."""

    at_ms: int = 0
    hosts: dict[str, HostRecord] = field(default_factory=dict)
    on_host: dict[str, dict[str, ModelOnHost]] = field(default_factory=dict)  # model -> host -> state
    facts: dict[str, ModelFacts] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)  # lane -> jobs waiting
    running: dict[str, int] = field(default_factory=dict)  # lane -> jobs held
    elsewhere: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)  # by model and host, once summed up
    cached: dict[str, dict[str, int]] = field(default_factory=dict)  # model -> session -> tokens, once summed up
    views: dict[tuple[int, str], ModelView] = field(default_factory=dict)  # by policy version and lane, once summed up

    def view(self, model: str, lanes_of_model: list[str]) -> ModelView:
        """Sums a model up over its hosts, as one decision about it needs it."""
        hosts = self._able(model)
        facts = self.facts.get(model, ModelFacts())
        ready = [m for m in hosts.values() if m.state in ("warm", "degraded")]
        total = sum(m.slots_total - m.slots_settling for m in ready)
        used = sum(self.running.get(name, 0) for name in lanes_of_model)
        availability, reason, aside_until = self._availability(hosts, facts)
        best = min(ready, key=lambda m: m.first_token_ewma_ms or 1e9, default=None)
        return ModelView(
            availability=availability,
            slots_total=total,
            slots_free=max(0, total - used),
            slots_yielding=sum(m.slots_yielding for m in ready),
            slots_kept=sum(m.slots_kept for m in ready),
            first_token_ms=best.first_token_ewma_ms if best else 0.0,
            service_ms=facts.service_ms,
            load_ms=min((m.load_ms for m in hosts.values() if m.load_ms and not m.unfit), default=facts.load_ms),
            prefill_tps=facts.prefill_tps,
            reason=reason,
            aside_until=aside_until,
            room_at=min((m.room_at for m in hosts.values()), default=0),
            waking_since=next((m.since for m in hosts.values() if m.state == "waking" and not m.reason), 0),
        )

    def sessions_elsewhere(self, model: str, host: str) -> frozenset[str]:
        """Sessions whose prompt another host has in a cache, where that host can take their next turn now."""
        key = model, host
        if key not in self.elsewhere:
            able = self._able(model)
            free = [
                m
                for name, m in able.items()
                if name != host and m.state == "warm" and m.slots_used + m.slots_settling < m.slots_total
            ]
            self.elsewhere[key] = frozenset(session for m in free for session, _ in m.cached().values())
        return self.elsewhere[key]

    def cached_tokens(self, model: str, session: str) -> int:
        """How many tokens of the session's prompt a live host has in a cache, as far as hosts have told.

        In the api's estimate, as a job's own tokens are: by the runtime's count the difference of two long prompts
        would be all error.
        """
        if model not in self.cached:
            found = self.cached[model] = {}
            for told in self._able(model).values():
                for name, tokens in told.estimates().items():
                    found[name] = max(found.get(name, 0), tokens)
        return self.cached[model].get(session, 0)

    def _availability(self, hosts: dict[str, ModelOnHost], facts: ModelFacts) -> tuple[Availability, str, int]:
        """Whether it can serve, why not, and until when not, 0 = nobody knows."""
        if not hosts:
            words = "no live host serves it" if not self.hosts else "no host that serves it takes new work"
            return "unavailable", words, 0
        states = {m.state for m in hosts.values()}
        for state in ("warm", "degraded", "waking"):
            if state in states:
                return state, next(m.reason for m in hosts.values() if m.state == state), 0
        unfit = [m.reason for m in hosts.values() if m.unfit]
        if unfit and all(m.unfit or m.state == "quarantined" for m in hosts.values()):
            return "unavailable", unfit[0], 0
        if facts.quarantined_until > self.at_ms or states == {"quarantined"}:
            words = facts.failure or next(m.reason for m in hosts.values())
            return "unavailable", words, facts.quarantined_until
        return "cold", "", 0

    def _able(self, model: str) -> dict[str, ModelOnHost]:
        """The model on the hosts that take new work."""
        hosts = self.on_host.get(model, {})
        return {name: m for name, m in hosts.items() if name in self.hosts and self.hosts[name].takes_work}


class Fleet:
    """Keeps the picture fresh for one process."""

    def __init__(self, store: Store, book: PolicyBook) -> None:
        self._store = store
        self._book = book
        self.picture = Picture()
        self.skew_ms = 0  # Redis' clock minus this machine's
        self.first_tokens = RecentFirstTokens()
        self._looked_at = -math.inf
        self._looking = asyncio.Lock()

    async def follow(self) -> None:
        """Looks every LOOK_EVERY_S until cancelled."""
        while True:
            try:
                if self._book.present:
                    await self.look()
            except errors.BrokerUnavailable as e:
                log.debug("event=fleet_retry reason=%s", e)
            await asyncio.sleep(LOOK_EVERY_S)

    def now_ms(self) -> int:
        """Redis' clock, as far as the last look knows it: asking costs nothing."""
        clock = self._store.clock
        return clock() if clock is not None else int(time.time() * 1000) + self.skew_ms

    async def look_again(self, *, older_than_s: float) -> bool:
        """Looks if the picture is that old, once for everybody who asks at the moment; True if there is a newer one."""
        before = self.picture
        async with self._looking:
            if asyncio.get_running_loop().time() - self._looked_at > older_than_s:
                await self._look()
        return self.picture is not before

    async def look(self) -> Picture:
        """Reads hosts, models and lanes in one go. One look at a time: of two, the later to end might be the older."""
        async with self._looking:
            return await self._look()

    async def look_closely(self, active: Active) -> CloseLook:
        """Looks at the jobs in the lanes too; the picture is then of that look."""
        async with self._looking:
            seen = await looks.look_closely(self._store, active)
            self._seen(seen.look)
            return seen

    async def _look(self) -> Picture:
        return self._seen(await looks.look(self._store, self._book.active))

    def _seen(self, look: Look) -> Picture:
        self.skew_ms = look.at_ms - int(time.time() * 1000) if self._store.clock is None else 0
        self.picture = Picture(
            at_ms=look.at_ms,
            hosts=dict(look.hosts),
            on_host={model: dict(there) for model, there in look.on_host.items()},
            facts=dict(look.facts),
            waiting=dict(look.waiting),
            running=dict(look.running),
        )
        self.first_tokens.note(self.picture.on_host)
        self._looked_at = asyncio.get_running_loop().time()
        return self.picture

    def view(self, lane_name: str, active: Active | None = None) -> ModelView:
        """Sums up the model behind a lane: once for each picture, every request asks."""
        active = active or self._book.active
        views, key = self.picture.views, (active.version, lane_name)
        if key not in views:
            views[key] = self._sum_up(lane_name, active)
        return views[key]

    def fresh_tokens(self, model: str, *, session: str, tokens: int) -> int:
        """How many of a prompt's tokens the model would have to read: those that no cache of its session holds."""
        return max(0, tokens - self.picture.cached_tokens(model, session)) if session else tokens

    def last_in(self, lane: Lane, *, batch: bool, inside: bool = False, overdue: bool = False) -> Before:
        """Who goes before a job that is the last to come to a lane, or (`inside`) that has come already: all who wait
        for its model, but no batch work before people. One that is `overdue` goes before those who have no deadline."""
        active, waits = self._book.active, {"interactive": 0, "batch": 0}
        for name in active.lanes_of(lane.model):
            sibling = active.lanes()[name]
            if name == lane.name or sibling.fallback or not overdue:
                waits[sibling.priority] += self.picture.waiting.get(name, 0)
        waits[lane.priority] -= inside
        people, others = (max(0, count) for count in waits.values())
        return Before(people, others if batch else None)

    def foretold_ms(self, lane: str, before: Before, *, fresh_tokens: int, may_start: int) -> int | None:
        """When the first token of a job should come that waits in a lane, None = nothing was measured that could tell.
        Of its caller `may_start` more may run, -1 = any number: who must wait for its own is told no time."""
        if not before.exact or 0 <= may_start <= before.own:
            return None
        return dispatch.foretold_ms(
            self.view(lane),
            ahead=before.ahead,
            batch_ahead=before.batch_ahead,
            now_ms=self.picture.at_ms,
            fresh_tokens=fresh_tokens,
        )

    def moved(self, lane: str, to: str) -> None:
        """Notes a promotion of ours until the next look: whoever asks meanwhile must not count on the same place."""
        waiting = self.picture.waiting
        waiting[lane], waiting[to] = max(0, waiting.get(lane, 0) - 1), waiting.get(to, 0) + 1
        self.picture.views.clear()

    def _sum_up(self, lane_name: str, active: Active) -> ModelView:
        lane = active.lane(lane_name)
        if lane is None:
            return ModelView("unavailable", reason="the lane is not in the policy")
        view = self.picture.view(lane.model, active.lanes_of(lane.model))
        if view.availability == "cold" and not active.wakes(lane.model, priority=lane.priority, now_ms=self.now_ms()):
            return replace(view, load_ms=0, reason=NOT_FOR_BATCH)  # nobody can say when it will be warm
        return view

    def host_keys(self, model: str) -> list[str]:
        """Keys of the model's hashes on its live hosts: what the admission scripts count free slots over."""
        return [self._store.keys.model_on_host(model, host) for host in self.picture.on_host.get(model, {})]


async def lane_counts(store: Store, lanes: list[str]) -> dict[str, tuple[int, int]]:
    """Counts entries and held entries of lanes: waiting = entries - held."""

    async def held(lane: str) -> int:
        try:
            reply: Any = await store.command("XPENDING", store.keys.lane(lane), "workers")
        except errors.BrokerUnavailable as e:
            if "NOGROUP" in str(e):
                return 0
            raise
        return int(reply["pending"] if isinstance(reply, dict) else reply[0])

    lengths = await asyncio.gather(*(store.command("XLEN", store.keys.lane(lane)) for lane in lanes))
    helds = await asyncio.gather(*(held(lane) for lane in lanes))
    return {lane: (int(n), h) for lane, n, h in zip(lanes, lengths, helds, strict=True)}
