"""The models of this host: which there are by the policy, and which of them may be in memory together."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from broker import hosts
from broker.hosts import Fleet
from broker.policies import Active
from broker.records import ModelFacts
from broker.store import Store
from workers.memory import HostMemory, Resident, evictions, host_memory, predicted_bytes
from workers.picture import LanePicture
from workers.swaps import Swaps
from workers.turns import Wish, may_take
from workers.waker import NoRoom, Surroundings, Waker

log = logging.getLogger("warmlane.residents")

ROOM_WAIT_S = 20.0
ROOM_LOOK_S = 0.25
LEAVE_LOOK_S = 0.2


class Residents:
    """Starts a waker for every model that the policy lets this host serve, and makes room between them."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        picture: LanePicture,
        *,
        host: str,
        boot: str,
        state_dir: Path,
        memory_mb: int | None,
        tasks: asyncio.TaskGroup,
        tell: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
        drained: Callable[[], bool],
    ) -> None:
        self.wakers: dict[str, Waker] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._store = store
        self._fleet = fleet
        self._picture = picture
        self._host = host
        self._boot = boot
        self._state_dir = state_dir
        self._memory_mb = memory_mb
        self._tasks = tasks
        self._tell = tell
        self._changed = changed
        self._drained = drained
        self._making_room = asyncio.Lock()
        self._lanes: dict[str, list[str]] = {}  # of each model
        self._promised: dict[str, int] = {}  # bytes that loads under way will occupy
        self.swaps = Swaps(
            self.wakers,
            now_ms=lambda: int(time.time() * 1000) + fleet.skew_ms,
            waiting=lambda name: picture.waiting(self._lanes.get(name, ())),
            waited_for=self._waited_for,
            drained=drained,
            facts=self._facts,
            warm_elsewhere=self._warm_elsewhere,
            need=self._need,
            headroom=self._headroom,
        )

    def follow(self, active: Active) -> None:
        """Takes new models in, hands changed definitions on, lets removed ones go when they are idle."""
        models = {n: m for n, m in active.models().items() if m.hosts is None or self._host in m.hosts}
        self._lanes = {name: active.lanes_of(name) for name in models}
        self.swaps.follow(active)
        for name, model in models.items():
            waker = self.wakers.get(name)
            if waker is None:
                around = Surroundings(
                    now_ms=self._store.now_ms,
                    facts=self._facts,
                    look=self._fleet.look,
                    warm_elsewhere=self._warm_elsewhere,
                    waited_for=self._waited_for,
                    drained=self._drained,
                    room_for=self._room_for,
                    held_up=self.swaps.held_up,
                    learn=self._learn,
                    tell=self._tell,
                    changed=self._changed,
                    outdone=self._outdone,
                )
                waker = Waker(
                    self._store,
                    name,
                    model,
                    host=self._host,
                    boot=self._boot,
                    state_dir=self._state_dir,
                    around=around,
                )
                self.wakers[name] = waker
                self._running[name] = self._tasks.create_task(waker.run(), name=f"waker {name}")
            elif waker.leaving:
                waker.leaving = False  # it was removed and came back before it was idle
            waker.wanted_model = waker.model if waker.model == model else model
            waker.kick()
        for name in self.wakers.keys() - models.keys():
            if not self.wakers[name].leaving:
                self.wakers[name].leaving = True
                self._tasks.create_task(self._let_go(self.wakers[name]), name=f"let go {name}")
        self._changed()

    def memory(self) -> HostMemory:
        """The host's memory now, in bytes."""
        return host_memory(self._memory_mb, [w.memory_bytes for w in self.wakers.values()])

    def stop(self) -> None:
        """Stops every waker; each closes the runtime that it started."""
        for waker in self.wakers.values():
            waker.leaving = False  # nobody waits for one to be idle any more
        for task in self._running.values():
            task.cancel()

    async def _let_go(self, waker: Waker) -> None:
        while waker.leaving and not waker.slots.idle:  # noqa: ASYNC110  # it may come back meanwhile
            await asyncio.sleep(LEAVE_LOOK_S)
        if waker.leaving and waker.state in ("warm", "degraded"):
            await waker.unload("removed from the policy")  # a runtime that is not ours would keep it for ever
        if waker.leaving and self.wakers.get(waker.name) is waker:
            del self.wakers[waker.name]
            self._running.pop(waker.name).cancel()
            self._changed()

    async def _learn(self, model: str, **facts: float | int | str) -> None:
        await hosts.learn(self._store, model, **facts)
        await self._fleet.look()

    def _warm_elsewhere(self, model: str) -> bool:
        """Whether as many other live hosts that stay have the model as the policy wants, or are about to."""
        picture = self._fleet.picture
        others = [
            m for h, m in picture.on_host.get(model, {}).items() if h != self._host and not picture.hosts[h].draining
        ]
        there = sum(m.state in ("warm", "degraded", "waking") for m in others)
        return there >= self.wakers[model].wanted_model.replicas

    def _outdone(self, model: str) -> bool:
        """Whether another live host has become warm after this one: it believed us gone, and has it now."""
        picture, mine = self._fleet.picture, (self.wakers[model].since_ms, self._host)
        return any(
            m.state in ("warm", "degraded") and (m.since, h) > mine
            for h, m in picture.on_host.get(model, {}).items()
            if h != self._host and not picture.hosts[h].draining
        )

    @asynccontextmanager
    async def _room_for(self, name: str, demanded: bool) -> AsyncIterator[None]:
        """Makes room for a load, and keeps it from other loads until this one is over.

        Loads may overlap: a small fallback must not wait until the big model has loaded.
        """
        async with self._making_room:
            await self._make_room(self.wakers[name], demanded=demanded)
        try:
            yield
        finally:
            self._promised.pop(name, None)

    async def _make_room(self, waker: Waker, *, demanded: bool) -> None:
        """Unloads idle models until one more fits, and waits until the memory is really back."""
        if await waker.runtime.state() == "loaded":
            return
        need = self._need(waker)
        going = evictions(need, self._headroom(), self._others(waker.name, demanded=demanded))
        if going is None:
            words = f"{waker.name} needs {need >> 20} MB and {self._headroom() >> 20} MB are free"
            raise NoRoom(f"{words}; no idle model can make room")
        for name in going:
            victim = self.wakers.get(name)
            if victim is None:
                continue
            if not victim.slots.idle:
                raise NoRoom(f"{waker.name} needs the memory of {name}, which is at work again")
            log.info("event=evict model=%s for=%s", name, waker.name)
            await victim.unload(f"made room for {waker.name}")
        if going:
            await self._wait_for(need)
        self._promised[waker.name] = need

    def _need(self, waker: Waker) -> int:
        """Predicts what a load will occupy, in bytes; 0 = nothing is known."""
        learned = self._facts(waker.name).footprint_bytes
        return predicted_bytes(learned=learned, memory_mb=waker.model.memory_mb, weights=waker.model.model)

    def _headroom(self) -> int:
        return max(0, self.memory().headroom - sum(self._promised.values()))

    def _facts(self, model: str) -> ModelFacts:
        return self._fleet.picture.facts.get(model, ModelFacts())

    async def _wait_for(self, need: int) -> None:
        """Memory comes back late after an unload: believe the machine, not the answer."""
        try:
            async with asyncio.timeout(ROOM_WAIT_S):
                while self._headroom() < need:  # noqa: ASYNC110  # the machine tells nobody
                    await asyncio.sleep(ROOM_LOOK_S)
        except TimeoutError:
            log.warning("event=memory_not_back need_mb=%d headroom_mb=%d", need >> 20, self._headroom() >> 20)

    def _waited_for(self, name: str) -> bool:
        served = self._lanes.get(name, ())
        if any(True for _ in self._picture.waiting(served)):  # the tail hears of a job before the next look does
            return True
        return any(self._fleet.picture.waiting.get(lane) for lane in served)

    def _may_take_from(self, name: str, victim: Waker, *, demanded: bool) -> bool:
        """Whether one model's wish is the stronger one; `demanded` = the load is for somebody who asked."""
        if self.swaps.makes_room(victim.name, name):
            return True
        mine = self._wish(self.wakers[name])
        cold = (w for n, w in self.wakers.items() if n != name and w.state not in ("warm", "degraded"))
        return may_take(
            mine if demanded else replace(mine, waited_for=False, wanted_until=0),
            self._wish(victim),
            now_ms=self._fleet.picture.at_ms,
            others_wait=any(self._waited_for(other.name) for other in cold),
        )

    def _wish(self, waker: Waker) -> Wish:
        """How much a model wants to be in memory now."""
        return Wish(
            waited_for=self._waited_for(waker.name),
            wanted_until=self._facts(waker.name).wanted_until,
            kept=waker.warmth.kept(self._fleet.picture.at_ms),
            weight=waker.model.weight,
        )

    def _others(self, but: str, *, demanded: bool) -> list[Resident]:
        return [
            Resident(
                name,
                waker.memory_bytes,
                self._facts(name).load_ms,
                waker.model.weight,
                waker.idle_ms,
                waker.stayed_ms,
                waker.model.min_stay_ms,
                waker.state in ("warm", "degraded")
                and not self._facts(name).pinned
                and self._may_take_from(but, waker, demanded=demanded),
            )
            for name, waker in self.wakers.items()
            if name != but and waker.memory_bytes
        ]
