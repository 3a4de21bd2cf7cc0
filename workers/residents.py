"""The models of this host: which there are by the policy, and which of them may be in memory together."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from broker import errors, hosts
from broker.hosts import Fleet
from broker.policies import Active
from broker.policy import Model
from broker.records import ModelFacts
from broker.store import Store
from workers.footprints import Footprints
from workers.learned import LearnedHere
from workers.memory import Resident
from workers.picture import LanePicture
from workers.room import Claim, Look, NoRoom, Room
from workers.surroundings import Surroundings
from workers.swaps import Swaps
from workers.turns import Wish, may_take
from workers.waker import Waker

log = logging.getLogger("warmlane.residents")

LEAVE_LOOK_S = 0.2
WATCH_EVERY_S = 2.0


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
        self._learned = LearnedHere(store, host)
        self.footprints = Footprints(self.wakers, self._learned, memory_mb=memory_mb, facts=self._facts)
        self._room = Room(read=self.footprints.look, residents=self._residents, unload=self._unload)
        self._tasks = tasks
        self._tell = tell
        self._changed = changed
        self._drained = drained
        self._lanes: dict[str, list[str]] = {}  # of each model
        self._batch_lanes: frozenset[str] = frozenset()
        self.swaps = Swaps(
            self.wakers,
            now_ms=lambda: int(time.time() * 1000) + fleet.skew_ms,
            waiting=lambda name: picture.waiting(self._asking_lanes(name)),
            waited_for=self._waited_for,
            drained=drained,
            facts=self._facts,
            load_ms=self._load_ms,
            warm_elsewhere=self._warm_elsewhere,
            need=self.footprints.need,
            headroom=lambda: self.footprints.memory().headroom + self.footprints.taken(self._room.loading),
            loading=lambda: self._room.loading,
        )

    def follow(self, active: Active) -> None:
        """Takes new models in, hands changed definitions on, lets removed ones go when they are idle."""
        models = {n: m for n, m in active.models().items() if m.hosts is None or self._host in m.hosts}
        self._lanes = {name: active.lanes_of(name) for name in models}
        self._batch_lanes = frozenset(name for name, lane in active.lanes().items() if lane.priority == "batch")
        self.swaps.follow(active)
        for name, model in models.items():
            waker = self.wakers.get(name)
            if waker is None:
                waker = self._start(name, model)
            elif waker.leaving:
                waker.leaving = False  # it was removed and came back before it was idle
            waker.wanted_model = waker.model if waker.model == model else model
            waker.kick()
        for name in self.wakers.keys() - models.keys():
            if not self.wakers[name].leaving:
                self.wakers[name].leaving = True
                self._tasks.create_task(self._let_go(self.wakers[name]), name=f"let go {name}")
        self._changed()

    def headroom(self) -> int:
        """What is left for another model, in bytes: beside what loads under way were promised."""
        return max(0, int(self._room.left(Look(self.footprints.memory()))))

    async def watch(self) -> None:
        """Reads memory every WATCH_EVERY_S and says which models cannot fit, until cancelled."""
        while True:
            before = self.footprints.memory()
            try:
                for waker in list(self.wakers.values()):
                    await self.footprints.inquire(waker)
                look = await self._room.look()
                for waker in list(self.wakers.values()):
                    await self._learned.note_size(waker.name, waker.model, waker.memory_bytes)
                    self._judge(waker, look)
            except errors.BrokerUnavailable as e:
                log.debug("event=watch_retry reason=%s", e)
            except Exception:
                log.exception("event=watch_broken")  # a figure that nobody can read must not end the host's streams
            if not before.total and self.footprints.memory().total:
                self._changed()  # whoever asks need not wait for the next beat to see the memory
            await asyncio.sleep(WATCH_EVERY_S)

    def stop(self) -> None:
        """Stops every waker; each closes the runtime that it started."""
        for waker in self.wakers.values():
            waker.leaving = False  # nobody waits for one to be idle any more
        for task in self._running.values():
            task.cancel()

    def _start(self, name: str, model: Model) -> Waker:
        around = Surroundings(
            now_ms=self._store.now_ms,
            facts=self._facts,
            look=self._fleet.look,
            warm_elsewhere=self._warm_elsewhere,
            waited_for=self._waited_for,
            drained=self._drained,
            room_for=self._room_for,
            lacks_room=self._lacks_room,
            given_room=self.swaps.given_room,
            held_up=self.swaps.held_up,
            occupied=self.footprints.occupied,
            loaded=self._loaded,
            learned=self.footprints.learned,
            learn=self._learn,
            count=self._count,
            tell=self._tell,
            changed=self._changed,
            outdone=self._outdone,
        )
        host, boot, state_dir = self._host, self._boot, self._state_dir
        waker = Waker(self._store, name, model, host=host, boot=boot, state_dir=state_dir, around=around)
        self.wakers[name] = waker
        self._running[name] = self._tasks.create_task(waker.run(), name=f"waker {name}")
        return waker

    async def _let_go(self, waker: Waker) -> None:
        while waker.leaving and not waker.slots.idle:  # noqa: ASYNC110  # it may come back meanwhile
            await asyncio.sleep(LEAVE_LOOK_S)
        if waker.leaving and waker.resident:
            await waker.unload("no longer served by this host")  # a runtime that is not ours would keep it for ever
        if waker.leaving and self.wakers.get(waker.name) is waker:
            del self.wakers[waker.name]
            self._running.pop(waker.name).cancel()
            self._changed()

    async def _learn(self, model: str, **facts: float | int | str) -> None:
        await hosts.learn(self._store, model, **facts)
        await self._fleet.look()

    async def _count(self, model: str, **amounts: int) -> None:
        """Adds to the model's counts; while Redis is away nothing is counted, and nothing waits for that."""
        try:
            await hosts.count(self._store, model, **amounts)
        except errors.BrokerUnavailable as e:
            log.debug("event=uncounted model=%s reason=%s", model, e)

    def _warm_elsewhere(self, model: str) -> bool:
        """Whether as many other live hosts that stay have the model as the policy wants, or are about to."""
        picture = self._fleet.picture
        others = [
            m for h, m in picture.on_host.get(model, {}).items() if h != self._host and picture.hosts[h].takes_work
        ]
        there = sum(m.state in ("warm", "degraded", "waking") for m in others)
        return there >= self.wakers[model].wanted_model.replicas

    def _outdone(self, model: str) -> bool:
        """Whether another live host has become warm after this one: it believed us gone, and has it now."""
        picture, mine = self._fleet.picture, (self.wakers[model].since_ms, self._host)
        return any(
            m.state in ("warm", "degraded") and (m.since, h) > mine
            for h, m in picture.on_host.get(model, {}).items()
            if h != self._host and picture.hosts[h].takes_work
        )

    @asynccontextmanager
    async def _room_for(self, name: str, demanded: bool) -> AsyncIterator[Claim]:
        """Makes room for a load, and keeps it from other loads until this one is over."""
        waker = self.wakers[name]
        state = await waker.runtime.state()  # asked first: some know only then whether they can be managed
        if state == "loaded" or not waker.ours:
            yield Claim(name, there=state == "loaded")
            return
        need = await self._predict(waker)
        async with self._room.hold(name, need, demanded=demanded, waits=waker.waits) as claim:
            yield claim

    async def _lacks_room(self, name: str, demanded: bool) -> str:
        """Says why there is no room for a load, "" = there is, or the load itself says what is wrong with it."""
        waker = self.wakers[name]
        if await waker.runtime.state() == "loaded" or not waker.ours or await waker.runtime.lacks():
            return ""
        try:
            return await self._room.lacks(name, await self._predict(waker), demanded=demanded)
        except NoRoom as e:
            return str(e)

    async def _predict(self, waker: Waker) -> int:
        """Predicts what a load will occupy, in bytes; raises NoRoom where it cannot fit at all."""
        await self.footprints.inquire(waker)
        self._judge(waker, await self._room.look())
        if waker.unfit:
            raise NoRoom(waker.unfit)
        return self.footprints.need(waker)

    def _judge(self, waker: Waker, look: Look) -> None:
        """Says whether a model that is not in memory can fit at all."""
        was, waker.unfit = waker.unfit, self.footprints.unfit(waker, look)
        if bool(waker.unfit) != bool(was):
            event = "unfit" if waker.unfit else "fits_again"
            log.info("event=%s model=%s reason=%s", event, waker.name, waker.unfit or "-")
            waker.kick()
            self._changed()

    def _load_ms(self, name: str) -> float:
        """What a load takes: here, else wherever it was loaded last; 0 = nobody knows."""
        return self.footprints.learned(name).load_ms or self._facts(name).load_ms

    async def _loaded(self, name: str, load_ms: float, footprint_bytes: int) -> None:
        model = self.wakers[name].model
        await self._learned.note_load(name, model, load_ms=load_ms, footprint_bytes=footprint_bytes)
        await self._fleet.look()

    async def _unload(self, name: str, asker: str) -> bool:
        """Unloads one model for another; False when it is at work again."""
        victim = self.wakers.get(name)
        if victim is None or not victim.memory_bytes or victim.state == "unloading":
            return True
        if victim.state not in ("warm", "degraded") or not victim.slots.idle:
            return False
        log.info("event=evict model=%s for=%s", name, asker)
        await victim.unload(f"made room for {asker}")
        await self._count(name, evictions=1)
        return True

    def _facts(self, model: str) -> ModelFacts:
        return self._fleet.picture.facts.get(model, ModelFacts())

    def _waited_for(self, name: str) -> bool:
        served = self._asking_lanes(name)
        if self._picture.anyone_waits(served):  # the tail hears of a job before the next look does
            return True
        return any(self._fleet.picture.waiting.get(lane) for lane in served)

    def _asking_lanes(self, name: str) -> list[str]:
        """The lanes whose jobs ask for a model. Batch work that may not wake it asks for it only once it is there."""
        served, waker = self._lanes.get(name, []), self.wakers.get(name)
        if waker is None or waker.resident or waker.warmth.wakes_for_batch(self._fleet.now_ms()):
            return served
        return [lane for lane in served if lane not in self._batch_lanes]

    def _may_take_from(self, name: str, victim: Waker, *, demanded: bool) -> bool:
        """Whether one model's wish is the stronger one; `demanded` = the load is for somebody who asked."""
        if self.swaps.makes_room(victim.name, name):
            return True
        mine = self._wish(self.wakers[name])
        cold = (w for n, w in self.wakers.items() if n != name and not w.resident)
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

    def _residents(self, asker: str, demanded: bool) -> list[Resident]:
        """Who occupies memory, as the model sees it that asks for room."""
        return [
            Resident(
                name,
                waker.memory_bytes,
                self.footprints.learned(name).load_ms,
                waker.model.weight,
                waker.idle_ms,
                waker.stayed_ms,
                waker.model.min_stay_ms,
                waker.resident
                and not self._facts(name).pinned
                and self._may_take_from(asker, waker, demanded=demanded),
            )
            for name, waker in self.wakers.items()
            if name != asker and waker.memory_bytes and waker.ours
        ]
