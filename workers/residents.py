"""The models of this host: which there are by the policy, and which of them may be in memory together."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from broker import errors, hosts
from broker.hosts import Fleet
from broker.policies import Active
from broker.records import Learned, ModelFacts
from broker.store import Store
from workers.learned import LearnedHere
from workers.memory import HostMemory, Resident, cannot_fit, predicted_bytes
from workers.meter import Meter, occupied_bytes
from workers.picture import LanePicture
from workers.room import ROOM_WAIT_S, Claim, Look, NoRoom, Room
from workers.runtimes.base import Runtime
from workers.surroundings import Surroundings
from workers.swaps import Swaps
from workers.turns import Wish, may_take
from workers.waker import Waker

log = logging.getLogger("warmlane.residents")

LEAVE_LOOK_S = 0.2
WATCH_EVERY_S = 2.0
FILE_SIZE_KEPT_S = 60.0


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
        self._meter = Meter(memory_mb)
        self._memory = HostMemory(0, 0)
        self._room = Room(read=self._look, residents=self._residents, unload=self._unload)
        self._learned = LearnedHere(store, host)
        self._file_sizes: dict[str, tuple[Runtime, float, int]] = {}  # until when a size holds, bytes
        self._occupied_before: dict[str, int] = {}
        self._left: list[tuple[float, int]] = []  # until when, bytes: unloaded models whose memory may be on its way
        self._tasks = tasks
        self._tell = tell
        self._changed = changed
        self._drained = drained
        self._lanes: dict[str, list[str]] = {}  # of each model
        self.swaps = Swaps(
            self.wakers,
            now_ms=lambda: int(time.time() * 1000) + fleet.skew_ms,
            waiting=lambda name: picture.waiting(self._lanes.get(name, ())),
            waited_for=self._waited_for,
            drained=drained,
            facts=self._facts,
            warm_elsewhere=self._warm_elsewhere,
            need=self._need,
            headroom=lambda: max(0, int(self.memory().headroom - self._room.spoken_for)),
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
                    occupied=self._occupied,
                    loaded=self._loaded,
                    learned=self._learned_of,
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
        """The host's memory as it was last read."""
        return self._meter.limited(self._held()) or self._memory

    def headroom(self) -> int:
        """What is left for another model, in bytes: beside what loads under way were promised."""
        return max(0, int(self._room.left(Look(self.memory()))))

    async def watch(self) -> None:
        """Reads memory every WATCH_EVERY_S and says which models cannot fit, until cancelled."""
        while True:
            before = self._memory
            try:
                for waker in list(self.wakers.values()):
                    await self._inquire(waker)
                look = await self._room.look()
                for waker in list(self.wakers.values()):
                    await self._learned.note_size(waker.name, waker.model, waker.memory_bytes)
                    self._judge(waker, look)
            except errors.BrokerUnavailable as e:
                log.debug("event=watch_retry reason=%s", e)
            except Exception:
                log.exception("event=watch_broken")  # a figure that nobody can read must not end the host's streams
            if not before.total and self._memory.total:
                self._changed()  # whoever asks need not wait for the next beat to see the memory
            await asyncio.sleep(WATCH_EVERY_S)

    def stop(self) -> None:
        """Stops every waker; each closes the runtime that it started."""
        for waker in self.wakers.values():
            waker.leaving = False  # nobody waits for one to be idle any more
        for task in self._running.values():
            task.cancel()

    async def _let_go(self, waker: Waker) -> None:
        while waker.leaving and not waker.slots.idle:  # noqa: ASYNC110  # it may come back meanwhile
            await asyncio.sleep(LEAVE_LOOK_S)
        if waker.leaving and waker.resident:
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
    async def _room_for(self, name: str, demanded: bool) -> AsyncIterator[Claim]:
        """Makes room for a load, and keeps it from other loads until this one is over."""
        waker = self.wakers[name]
        state = await waker.runtime.state()  # asked first: some know only then whether they can be managed
        if state == "loaded" or not _is_ours(waker.runtime):
            yield Claim(name)
            return
        await self._inquire(waker)
        self._judge(waker, await self._room.look())
        if waker.unfit:
            raise NoRoom(waker.unfit)
        async with self._room.hold(name, self._need(waker), demanded=demanded) as claim:
            yield claim

    async def _inquire(self, waker: Waker) -> None:
        """Finds out what a prediction needs: what was learned, and the size of the file where nothing else tells."""
        await self._learned.recall(waker.name)
        now = asyncio.get_running_loop().time()
        runtime, until, _ = self._file_sizes.get(waker.name, (None, 0.0, 0))
        if self._is_guessed(waker) and (runtime is not waker.runtime or until <= now):
            size = await waker.runtime.file_bytes() or 0
            self._file_sizes[waker.name] = waker.runtime, now + FILE_SIZE_KEPT_S, size

    def _need(self, waker: Waker) -> int:
        """Predicts what a load will occupy, in bytes; 0 = nothing is known."""
        runtime, _, size = self._file_sizes.get(waker.name, (None, 0.0, 0))
        return predicted_bytes(
            learned_here=self._learned_of(waker.name).footprint_bytes,
            memory_mb=waker.model.memory_mb,
            learned_elsewhere=self._learned.elsewhere(self._facts(waker.name), waker.model),
            file_bytes=size if runtime is waker.runtime else 0,
        )

    def _is_guessed(self, waker: Waker) -> bool:
        """Whether nothing but the model's file tells what it will occupy."""
        model, learned = waker.model, self._learned_of(waker.name).footprint_bytes
        return not (learned or model.memory_mb or self._learned.elsewhere(self._facts(waker.name), model))

    def _judge(self, waker: Waker, look: Look) -> None:
        """Says whether a model that is not in memory can fit at all."""
        if waker.state not in ("cold", "waking", "quarantined") or waker.memory_bytes or not _is_ours(waker.runtime):
            unfit, need, others = False, 0, 0
        else:
            pinned = sum(w.memory_bytes for n, w in self.wakers.items() if self._facts(n).pinned)
            need, others = self._need(waker), self._held() - pinned + sum(look.taken.values())
            returning = min(self._returning(), max(0, look.memory.total - look.memory.headroom - others))
            unfit = cannot_fit(
                need,
                headroom=look.memory.headroom,
                idle_could_leave=others,
                returning=returning,
                before=bool(waker.unfit),
            )
        was, free, total = bool(waker.unfit), look.memory.headroom >> 20, look.memory.total >> 20
        words = f"{waker.name} needs {need >> 20} MB; {free} MB are free and the other models could leave"
        waker.unfit = f"{words} {others >> 20} MB, of {total} MB in all" if unfit else ""
        if unfit and self._is_guessed(waker):
            waker.unfit += "; what it needs is guessed from its file, memoryMb in the policy would tell"
        if unfit != was:
            log.info("event=%s model=%s reason=%s", "unfit" if unfit else "fits_again", waker.name, waker.unfit or "-")
            waker.kick()
            self._changed()

    def _returning(self) -> int:
        """Memory (bytes) of models that were unloaded a moment ago: it may not be back yet."""
        now = asyncio.get_running_loop().time()
        held = {name: waker.memory_bytes for name, waker in self.wakers.items()}
        for name, before in self._occupied_before.items():
            if held.get(name, 0) < before:
                self._left.append((now + ROOM_WAIT_S, before - held.get(name, 0)))
        self._occupied_before = held
        self._left = [(until, size) for until, size in self._left if until > now]
        return sum(size for _, size in self._left)

    def _held(self) -> int:
        return sum(waker.memory_bytes for waker in self.wakers.values())

    async def _look(self, loading: Collection[str]) -> Look:
        limited = self._meter.limited(self._held())
        if limited is not None:
            return Look(limited)
        runtimes = {name: waker.runtime for name, waker in self.wakers.items() if waker.runtime.local}
        look = await asyncio.to_thread(self._read, runtimes, set(loading))
        self._memory = look.memory
        return look

    def _read(self, runtimes: Mapping[str, Runtime], loading: Collection[str]) -> Look:
        pids = {name: runtime.process_ids() for name, runtime in runtimes.items()}
        gpus = self._meter.gpus()
        memory = self._meter.host(gpus, occupied=0, ours=[pid for ids in pids.values() for pid in ids])
        taken = {name: self._meter.held_by(pids[name], gpus) for name in loading if pids.get(name)}
        return Look(memory, taken)

    async def _occupied(self, name: str) -> int:
        """Measures what a loaded model takes of this host's memory, in bytes; where nobody can tell, `memoryMb` is
        believed; 0 = nothing, or nothing is known."""
        waker = self.wakers[name]
        runtime = waker.runtime
        if not runtime.local:
            return 0
        told = await runtime.memory_bytes() or (waker.model.memory_mb or 0) << 20
        gpus = await asyncio.to_thread(self._meter.gpus)
        on_gpu = gpus.held_by(await asyncio.to_thread(runtime.process_ids))
        return occupied_bytes(told, on_gpu, gpus_tell=bool(gpus.total))

    def _learned_of(self, name: str) -> Learned:
        waker = self.wakers.get(name)
        return self._learned.of(name, waker.model) if waker is not None else Learned()

    async def _loaded(self, name: str, load_ms: float, footprint_bytes: int) -> None:
        model = self.wakers[name].model
        await self._learned.note_load(name, model, load_ms=load_ms, footprint_bytes=footprint_bytes)
        await self._fleet.look()

    async def _unload(self, name: str, asker: str) -> bool:
        """Unloads one model for another; False when it is at work again."""
        victim = self.wakers.get(name)
        if victim is None or not victim.memory_bytes:
            return True
        if not victim.slots.idle:
            return False
        log.info("event=evict model=%s for=%s", name, asker)
        await victim.unload(f"made room for {asker}")
        return True

    def _facts(self, model: str) -> ModelFacts:
        return self._fleet.picture.facts.get(model, ModelFacts())

    def _waited_for(self, name: str) -> bool:
        served = self._lanes.get(name, ())
        if self._picture.anyone_waits(served):  # the tail hears of a job before the next look does
            return True
        return any(self._fleet.picture.waiting.get(lane) for lane in served)

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
                self._learned_of(name).load_ms,
                waker.model.weight,
                waker.idle_ms,
                waker.stayed_ms,
                waker.model.min_stay_ms,
                waker.resident
                and not self._facts(name).pinned
                and self._may_take_from(asker, waker, demanded=demanded),
            )
            for name, waker in self.wakers.items()
            if name != asker and waker.memory_bytes and _is_ours(waker.runtime)
        ]


def _is_ours(runtime: Runtime) -> bool:
    """Whether a load of it takes this host's memory, and is ours to begin and to end."""
    return runtime.local and runtime.manageable
