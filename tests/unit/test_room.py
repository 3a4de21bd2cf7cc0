"""No load starts before the memory for it is there: one load after another, and several beside each other, in virtual
time. The machine here gives memory back when the test says so."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.support.jump_loop import passes, run_in_virtual_time
from workers import room as room_module
from workers.memory import HostMemory, Resident
from workers.room import Claim, Look, NoRoom, Room
from workers.runtimes.base import LoadFailed

GB = 1 << 30
TOTAL = 24
IDLE = Resident(
    "idle", 0, load_ms=10_000, weight=1, idle_ms=60_000, stayed_ms=90_000, min_stay_ms=60_000, evictable=True
)


@dataclass
class Late:
    """Memory that is on its way back: bytes, and when they are there."""

    size: float
    at: float


class Box:
    """A machine of 24 GB. All sizes in GB."""

    def __init__(self, **idle: float) -> None:
        self.held = dict(idle)  # models in memory
        self.foreign = 0.0
        self.late: list[Late] = []
        self.back_after_s = 1.0
        self.taken: dict[str, float] = {}  # what loads under way occupy already
        self.busy: set[str] = set()
        self.evicted: list[tuple[str, str]] = []
        self.room = Room(read=self.read, residents=self.residents, unload=self.unload)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def used(self) -> float:
        self.late = [late for late in self.late if late.at > self.now]
        parts = [*self.held.values(), *self.taken.values(), *(late.size for late in self.late)]
        return self.foreign + sum(parts)

    async def read(self, loading: Collection[str]) -> Look:
        look = Look(HostMemory(TOTAL * GB, int(self.used() * GB)), {n: int(s * GB) for n, s in self.taken.items()})
        await passes(0.02)  # a thread takes its time: the picture is old by then
        return look

    def residents(self, asker: str, demanded: bool) -> list[Resident]:
        return [
            replace(IDLE, name=name, footprint=int(size * GB), idle_ms=0 if name in self.busy else 60_000 + n)
            for n, (name, size) in enumerate(self.held.items())
        ]

    async def unload(self, name: str, asker: str) -> bool:
        if name in self.busy:
            return False
        self.evicted.append((name, asker))
        await passes(0.5)
        if name in self.held:
            self.late.append(Late(self.held.pop(name), self.now + self.back_after_s))
        return True

    async def load(self, name: str, need: float, *, takes_s: float = 10, size: float | None = None) -> float:
        """One whole load; gives when it began. Fails if it began without room."""
        async with self.room.hold(name, int(need * GB), demanded=True):
            began = self.now
            size = need if size is None else size
            assert self.used() + size <= TOTAL, f"{name} began to load with {TOTAL - self.used():.1f} GB free"
            for part in range(1, 6):
                self.taken[name] = size * part / 5
                await passes(takes_s / 5)
            self.held[name] = self.taken.pop(name)
        return began


def virtual(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Runs an async test in virtual time."""

    def run() -> None:
        run_in_virtual_time(test(), at_most_s=600)  # type: ignore[arg-type]

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@virtual
async def test_what_fits_loads_at_once() -> None:
    assert await Box(idle=10).load("new", 12) < 0.1


@virtual
async def test_a_load_waits_until_the_memory_is_back_and_not_only_promised() -> None:
    box = Box(idle=21)
    box.back_after_s = 4
    assert await box.load("new", 6) >= 4.5, "half a second of unload, four until the memory is there"
    assert box.evicted == [("idle", "new")]


@virtual
async def test_memory_that_never_comes_back_lets_nothing_load() -> None:
    """The old code loaded all the same, with a warning."""
    box = Box(idle=21)
    box.back_after_s = 1e6
    with pytest.raises(NoRoom, match="new needs 6144 MB and 3072 MB are free; no idle model that is"):
        await box.load("new", 6)
    assert 6 < box.now < 30


@virtual
async def test_what_a_load_lacks_can_be_asked_without_a_claim() -> None:
    box = Box(busy=15, idle=4)
    box.busy.add("busy")
    words = "new needs 10240 MB and 5120 MB are free; no idle model that is wanted less can make room"
    assert await box.room.lacks("new", 10 * GB, demanded=True) == words
    assert await box.room.lacks("new", 8 * GB, demanded=True) == "", "the idle one can"
    assert await box.room.lacks("new", 0, demanded=True) == "", "nobody knows what it needs"
    assert (box.room.loading, box.evicted) == ([], [])


@virtual
async def test_nothing_is_lacking_while_a_load_of_unknown_size_goes_on() -> None:
    """What it will leave is known when it is over: who asks for room waits for that."""
    box = Box()
    async with box.room.hold("unknown", 0, demanded=True):
        assert await box.room.lacks("new", 30 * GB, demanded=True) == ""


@virtual
async def test_a_single_look_that_shows_room_is_not_believed() -> None:
    """Between the end of one process and the start of another there is a moment when everything is free."""
    box = Box(idle=21)
    looks = 0

    async def read(loading: Collection[str]) -> Look:
        nonlocal looks
        looks += 1
        free = 24 if looks == 3 or box.now > 5 else 2
        return Look(HostMemory(TOTAL * GB, (TOTAL - free) * GB))

    box.room._read = read
    async with box.room.hold("new", 6 * GB, demanded=True):
        assert box.now > 5


@virtual
async def test_loads_overlap_where_both_fit_and_count_what_the_other_has_taken() -> None:
    """A small fallback need not wait for the big model; and what that has taken is not counted twice."""
    box = Box()
    async with asyncio.TaskGroup() as tasks:
        big = tasks.create_task(box.load("big", 15))
        await passes(7)
        small = tasks.create_task(box.load("small", 7, takes_s=1))
    assert (round(big.result()), round(small.result())) == (0, 7)


@virtual
async def test_two_at_once_do_not_take_the_same_room() -> None:
    box = Box()
    found = await asyncio.gather(box.load("a", 15), box.load("b", 15), return_exceptions=True)
    assert sorted(type(result).__name__ for result in found) == ["NoRoom", "float"]


@virtual
async def test_a_load_that_ends_while_another_looks_is_counted_once_and_not_never() -> None:
    """Its memory is not in the look, which is older, and its promise is gone."""
    box = Box()
    async with box.room.hold("first", 15 * GB, demanded=True):
        second = asyncio.create_task(box.load("second", 15))
        await passes(0.01)  # the second has looked, and has not yet heard what it saw
        box.held["first"] = 15
        box.busy.add("first")
    with pytest.raises(NoRoom):
        await second


@virtual
async def test_who_is_first_in_line_blocks_its_own_victims_and_nobody_elses() -> None:
    """`big` waits for the memory of `a`. Meanwhile `small` takes what is spare, and `other` evicts what nobody asked
    for; neither takes what was freed for `big`."""
    box = Box(a=12, b=4)
    box.back_after_s = 5
    box.busy.add("b")
    box.foreign = 1
    async with asyncio.TaskGroup() as tasks:
        big = tasks.create_task(box.load("big", 15, takes_s=1))
        await passes(1)
        box.busy.clear()
        small = tasks.create_task(box.load("small", 2, takes_s=1))
        await passes(0.1)
        other = tasks.create_task(box.load("other", 4, takes_s=1))
    assert small.result() < 1.2, "7 GB are free, of which big will need 3"
    assert big.result() > 5.5
    assert other.result() > 5.5
    assert set(box.evicted) == {("a", "big"), ("b", "other")}


@virtual
async def test_who_comes_later_does_not_take_what_was_freed_for_the_first() -> None:
    box = Box(a=20)
    box.back_after_s = 3
    first = asyncio.create_task(box.load("first", 20, takes_s=1))
    await passes(1)
    with pytest.raises(NoRoom, match="second needs 10240 MB"):
        await box.load("second", 10)
    assert await first > 3


@virtual
async def test_who_goes_for_somebody_already_does_not_go_for_another_too() -> None:
    """While it is being unloaded it still occupies its memory, and that is spoken for."""
    box = Box(a=12, b=4)
    big = asyncio.create_task(box.load("big", 15))
    await passes(0.3)
    assert "a" in box.held
    with pytest.raises(NoRoom):
        await box.load("other", 12)
    await big
    assert box.evicted == [("a", "big")]


@virtual
async def test_a_victim_that_went_back_to_work_is_not_unloaded() -> None:
    box = Box(a=10, b=10)

    async def unload(name: str, asker: str) -> bool:
        if name == "b":
            box.busy.add("b")
        return await Box.unload(box, name, asker)

    box.room._unload = unload
    await box.load("new", 12)
    assert box.evicted == [("a", "new")] and "b" in box.held


@virtual
async def test_more_goes_when_somebody_else_took_what_was_freed() -> None:
    box = Box(a=10, b=10)
    box.back_after_s = 2

    async def grab() -> None:
        await passes(1)
        box.foreign = 8

    grabbing = asyncio.create_task(grab())
    assert await box.load("new", 9) > 2
    await grabbing
    assert [name for name, _ in box.evicted] == ["b", "a"]


@virtual
async def test_a_load_of_unknown_size_goes_on_alone() -> None:
    """It waits for the loads under way; later ones wait for it; idle models stay."""
    box = Box(idle=4)
    async with asyncio.TaskGroup() as tasks:
        known = tasks.create_task(box.load("known", 2, takes_s=5))
        await passes(1)
        unknown = tasks.create_task(box.load("unknown", 0, size=10, takes_s=5))
        await passes(6)
        later = tasks.create_task(box.load("later", 2, takes_s=1))
    assert [round(task.result()) for task in (known, unknown, later)] == [0, 5, 10]
    assert box.evicted == []


@virtual
async def test_whoever_waits_says_for_what() -> None:
    """Else `status` tells of a load that goes on and on, where none has begun."""
    box, told = Box(idle=20), dict[str, list[str]]()

    async def load(name: str, need: float, takes_s: float = 5) -> None:
        said = told.setdefault(name, [])
        async with box.room.hold(name, int(need * GB), demanded=True, waits=said.append):
            assert said[-1] == "", "it loads, and said that it waits"
            await passes(takes_s)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load("first", 3))
        await passes(1)
        tasks.create_task(load("unknown", 0))
        await passes(5)
        tasks.create_task(load("second", 2))
    await load("big", 10)
    assert told == {
        "first": [""],
        "unknown": ["waits for first to load: nobody knows how much memory it needs beside it", ""],
        "second": ["waits for unknown to load: nobody knows how much memory that needs", ""],
        "big": ["waits for the memory of idle", ""],
    }


@virtual
async def test_nobody_waits_for_ever_for_a_load_of_unknown_size() -> None:
    """Its own time must not run out, or it would count as its failure."""
    box = Box()
    unknown = asyncio.create_task(box.load("unknown", 0, size=10, takes_s=200))
    await passes(1)
    with pytest.raises(NoRoom, match="small waits for the load of unknown: nobody knows what both will need"):
        await box.load("small", 1)
    assert 1 + room_module.TURN_WAIT_S <= box.now < 70
    await unknown


class Loads:
    """A runtime that runs out of memory while so much is held, or so often."""

    def __init__(self, fails: Callable[[int], bool], *, oom: bool = True) -> None:
        self.fails, self.oom, self.calls = fails, oom, 0

    async def load(self, *, timeout_s: float) -> None:
        self.calls += 1
        await passes(3)
        if self.fails(self.calls):
            raise LoadFailed("no more memory", oom=self.oom)


async def load(box: Box, runtime: Any) -> float:
    async with box.room.hold("new", 5 * GB, demanded=True) as claim:
        return await claim.load(runtime, timeout_s=60)


@virtual
async def test_out_of_memory_makes_all_the_room_there_is_and_tries_once_more() -> None:
    box = Box(a=5, b=5, working=5)
    box.busy.add("working")
    runtime = Loads(lambda _: "a" in box.held or "b" in box.held)
    ms = await load(box, runtime)
    assert runtime.calls == 2 and ms == pytest.approx(3000), "the first try does not count as load time"
    assert {name for name, _ in box.evicted} == {"a", "b"}
    assert box.now > 3 + 1 + room_module.ROOM_STILL_S, "and waits until no more memory comes back"


@virtual
async def test_out_of_memory_twice_is_a_failure() -> None:
    box, runtime = Box(), Loads(lambda _: True)
    with pytest.raises(LoadFailed, match="no more memory"):
        await load(box, runtime)
    assert runtime.calls == 2
    assert box.room.loading == []


@virtual
async def test_a_load_that_fails_for_another_reason_is_not_tried_again() -> None:
    box, runtime = Box(a=5), Loads(lambda _: True, oom=False)
    with pytest.raises(LoadFailed):
        await load(box, runtime)
    assert (runtime.calls, box.evicted) == (1, [])


@virtual
async def test_nothing_else_starts_while_a_load_that_ran_out_of_memory_is_tried_again() -> None:
    """Else the model that went for it would be back before it, and the second try would fail as the first did."""
    box = Box(a=5)
    retried = asyncio.create_task(load(box, Loads(lambda n: n == 1)))
    await passes(4)
    assert box.evicted == [("a", "new")]
    began = await box.load("a", 5, takes_s=1)
    assert retried.done() and began > 3 + room_module.ROOM_STILL_S + 3


@virtual
async def test_out_of_memory_and_then_no_room_is_no_second_try() -> None:
    """Somebody else has taken what the first try gave back: the second would only run out of memory again."""
    box = Box()

    def runs_out(_calls: int) -> bool:
        box.foreign = 22
        return True

    runtime = Loads(runs_out)
    with pytest.raises(NoRoom, match="new needs 5120 MB and 2048 MB are free"):
        await load(box, runtime)
    assert runtime.calls == 1
    assert box.room.loading == []


@virtual
async def test_to_find_a_model_in_memory_is_no_load() -> None:
    """An Ollama keeps its models while our worker restarts: how soon it answers then says nothing of a load."""
    runtime = Loads(lambda _: False)
    assert await Claim("new", there=True).load(runtime, timeout_s=60) == 0  # type: ignore[arg-type]
    assert runtime.calls == 1, "it is told all the same to keep the model"
