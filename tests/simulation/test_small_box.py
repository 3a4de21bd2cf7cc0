"""A box with one card of 24 GB, in virtual time: models of 21 and 6.5 GB and some small ones, requests at random, loads
that take as long as they like, memory that comes back late or never, and other programs that take and give some.

What decides is the real thing: workers/room and workers/memory. The box only keeps the books, with the truth that no
worker sees: what is really held now, and what the loads under way are really going to need.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import pytest

from tests.support.jump_loop import passes, run_in_virtual_time
from workers.memory import HostMemory, Resident, predicted_bytes
from workers.room import Look, NoRoom, Room
from workers.runtimes.base import LoadFailed

GB = 1 << 30
TOTAL = 24 * GB
MIN_STAY_MS = 60_000
NO_ROOM_PAUSE_S = 5.0
SIZES = {"big": 21.0, "middle": 6.5, "small": 2.0, "smaller": 1.2, "embed": 0.4}
SHARES = {"big": 2, "middle": 4, "small": 2, "smaller": 2, "embed": 3}
JUST_NOW_S = 0.05
"""A worker cannot see what another program took in the moment between its look and the start of a load."""


@dataclass
class Model:
    """One model of the box. Bytes."""

    name: str
    size: int
    file: int
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0
    busy: int = 0
    held: int = 0  # in memory now, as far as the load has got
    learned: int = 0
    load_ms: float = 0.0
    warm: bool = False
    warm_since: float = 0.0
    idle_since: float = 0.0


class Box:
    """The machine and everybody on it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.models = {
            name: Model(name, int(size * GB), int(size * GB * self.rng.uniform(0.78, 0.84)))
            for name, size in SIZES.items()
        }
        self.late: dict[int, tuple[float, int]] = {}  # memory on its way back: when, bytes
        self.foreign = 0
        self.took: list[tuple[float, int]] = []  # by other programs, a moment ago
        self.counts: Counter[str] = Counter()
        self.longest_wait_s = 0.0
        self.room = Room(read=self.read, residents=self.residents, unload=self.unload)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def free(self) -> int:
        self.late = {n: (at, size) for n, (at, size) in self.late.items() if at > self.now}
        held = sum(model.held for model in self.models.values()) + sum(size for _, size in self.late.values())
        return TOTAL - held - self.foreign

    # --- what the worker sees ---

    async def read(self, loading: Collection[str]) -> Look:
        look = Look(HostMemory(TOTAL, TOTAL - max(0, self.free())), {n: self.models[n].held for n in loading})
        await passes(self.rng.uniform(0, JUST_NOW_S / 2))
        return look

    def residents(self, asker: str, demanded: bool) -> list[Resident]:
        return [
            Resident(
                model.name, model.held, model.load_ms, 1.0,
                idle_ms=0 if model.busy else (self.now - model.idle_since) * 1000,
                stayed_ms=(self.now - model.warm_since) * 1000, min_stay_ms=MIN_STAY_MS, evictable=model.warm,
            )
            for model in self.models.values() if model.name != asker and model.held
        ]  # fmt: skip

    async def unload(self, name: str, asker: str) -> bool:
        model = self.models[name]
        if not model.warm:
            return True
        if model.busy:
            return False
        assert self.now - model.warm_since >= MIN_STAY_MS / 1000, f"{name} went inside its minimum stay"
        self.counts["swaps"] += 1
        model.warm = False
        await passes(self.rng.uniform(0.1, 3))
        self.give_back(model)
        return True

    def give_back(self, model: Model) -> None:
        """Mostly within seconds, sometimes later than anybody waits."""
        after = self.rng.choice([0.05, 0.3, 1, 2, 4, 8, 15, 40])
        self.late[len(self.late) + self.counts["returns"]] = self.now + after, model.held
        self.counts["returns"] += 1
        model.held = 0

    # --- what really happens ---

    async def load(self, model: Model) -> None:
        """A runtime loads: bit by bit, for as long as it likes, and it dies if the card is full."""
        self.counts["loads"] += 1
        recently = sum(size for at, size in self.took if self.now - at <= JUST_NOW_S)
        under_way = sum(m.size - m.held for m in self.models.values() if m.held and not m.warm and m is not model)
        there = self.free() + recently - under_way
        assert there >= model.size, (
            f"{model.name} ({model.size / GB:.1f} GB) began at {self.now:.1f} s with {there / GB:.1f} GB"
        )
        model.held = 1
        takes_s = self.rng.uniform(1, 40)
        for part in range(1, 9):
            await passes(takes_s / 8)
            more = model.size * part // 8 - model.held
            if more > self.free():
                self.counts["out of memory"] += 1
                self.give_back(model)
                raise LoadFailed("out of memory", oom=True)
            model.held += more

    async def look_after(self, model: Model) -> None:
        """What a waker does: loads while requests wait, pauses where there is no room."""
        while True:
            await model.arrived.wait()
            if model.warm or not model.waiting:
                model.arrived.clear()
                continue
            need = predicted_bytes(
                learned_here=model.learned, memory_mb=None, learned_elsewhere=0, file_bytes=model.file
            )
            runtime = _Loads(self, model)
            try:
                async with self.room.hold(model.name, need, demanded=True) as claim:
                    model.load_ms = await claim.load(runtime, timeout_s=300)  # type: ignore[arg-type]
                    model.warm, model.warm_since, model.idle_since = True, self.now, self.now
                    model.learned = model.held
            except NoRoom:
                self.counts["no room"] += 1
                await passes(NO_ROOM_PAUSE_S)
            except LoadFailed:
                self.counts["quarantines"] += 1
                await passes(NO_ROOM_PAUSE_S)

    async def job(self, model: Model) -> None:
        """One request: waits until its model is warm and free, and runs."""
        asked = self.now
        model.waiting += 1
        model.arrived.set()
        while not model.warm or model.busy:
            await passes(0.5)
        model.waiting -= 1
        model.busy = 1
        self.longest_wait_s = max(self.longest_wait_s, self.now - asked)
        await passes(self.rng.expovariate(1 / 1.5))
        model.busy, model.idle_since = 0, self.now
        self.counts["served"] += 1

    async def others(self) -> None:
        """Other programs: they take what is free, up to 3 GB in all, and give it back, at any moment."""
        while True:
            await passes(self.rng.expovariate(1 / 30))
            wanted = int(self.rng.choice([0, 0, 0.3, 1, 2.5]) * GB)
            if wanted > self.foreign:
                wanted = self.foreign + min(wanted - self.foreign, max(0, self.free()))
                self.took = [*self.took[-3:], (self.now, wanted - self.foreign)]
            self.foreign = wanted

    async def run(self, arrivals: int, gap_s: float) -> None:
        names, weights = list(SHARES), list(SHARES.values())
        forever = [asyncio.create_task(self.look_after(model)) for model in self.models.values()]
        forever.append(asyncio.create_task(self.others()))
        try:
            async with asyncio.TaskGroup() as jobs:
                for _ in range(arrivals):
                    await passes(self.rng.expovariate(1 / gap_s))
                    for task in forever:
                        if task.done():
                            task.result()
                    jobs.create_task(self.job(self.models[self.rng.choices(names, weights)[0]]))
        finally:
            for task in forever:
                task.cancel()
            for result in await asyncio.gather(*forever, return_exceptions=True):
                if isinstance(result, AssertionError):
                    raise result


class _Loads:
    """The runtime of one model."""

    def __init__(self, box: Box, model: Model) -> None:
        self._box, self._model = box, model

    async def load(self, *, timeout_s: float) -> None:
        await self._box.load(self._model)


def play(seed: int, arrivals: int, gap_s: float = 6.0) -> Box:
    async def main() -> Box:
        box = Box(seed)
        await box.run(arrivals, gap_s)
        return box

    return run_in_virtual_time(main(), at_most_s=arrivals * gap_s * 4)


def check(box: Box, arrivals: int) -> None:
    assert box.counts["served"] == arrivals, "everybody was served in the end"
    assert box.counts["swaps"] < arrivals / 6, box.counts
    assert box.counts["quarantines"] < 5, box.counts


@pytest.mark.parametrize("seed", range(3))
def test_no_load_starts_without_room(seed: int) -> None:
    check(play(seed, 600), 600)


@pytest.mark.long
def test_no_load_starts_without_room_in_ten_thousand_arrivals() -> None:
    check(play(99, 10_000), 10_000)


if __name__ == "__main__":
    import sys
    import time

    began = time.process_time()
    played = play(int(sys.argv[1]), int(sys.argv[2]))
    print(
        dict(played.counts), f"longest wait {played.longest_wait_s:.0f} s, {time.process_time() - began:.1f} s of CPU"
    )
