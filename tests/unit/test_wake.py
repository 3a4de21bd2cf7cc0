"""What a wake comes to when it fails, and what it leaves in memory. The lock's verbs, the room and the runtime are the
test's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from broker import errors
from broker import wake as locks
from broker.policy import Model
from broker.store import Store
from broker.wake import WakeLock
from workers import wake
from workers.room import Claim, NoRoom
from workers.runtimes.base import LoadFailed, Runtime
from workers.wake import NotWoken, Wake, Woken

BUDGET_MS = 1_000


class Scripted:
    """A runtime whose load fails as told; `loads` sets off when one begins."""

    kind = "scripted"

    def __init__(
        self,
        error: Exception | None = None,
        *,
        states: tuple[str, ...] = ("absent",),
        hangs: bool = False,
        lacking: str = "",
    ) -> None:
        self.error = error
        self.states = list(states)
        self.hangs = hangs
        self.lacking = lacking
        self.line = asyncio.Event()  # before its loader
        self.line.set()
        self.probes = [50.0]
        self.unloaded = 0
        self.loading = asyncio.Event()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        await self.line.wait()
        yield

    async def lacks(self) -> str:
        return self.lacking

    async def state(self) -> str:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    async def load(self, *, timeout_s: float) -> None:
        self.loading.set()
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error

    async def progress(self) -> float | None:
        return None

    async def probe(self, *, timeout_s: float) -> float:
        return self.probes.pop(0)

    async def unload(self) -> None:
        self.unloaded += 1


def wake_of(
    runtime: Scripted,
    *,
    full: bool = False,
    room_after: asyncio.Event | None = None,
    timeout_ms: int = 60_000,
    noted: list[str] | None = None,
) -> Wake:
    noted = noted if noted is not None else []

    @asynccontextmanager
    async def room() -> AsyncIterator[Claim]:
        if full:
            raise NoRoom("big needs 9 MB and 1 MB are free")
        if room_after is not None:
            await room_after.wait()
        yield Claim("big")
        noted.append("room is given back")

    async def begins() -> None:
        noted.append("begins")

    async def in_memory() -> None:
        noted.append("in memory")

    model = Model.model_validate(
        {"backend": "simulated", "model": "x", "firstTokenBudgetMs": BUDGET_MS, "wakeTimeoutMs": timeout_ms}
    )
    return Wake(
        cast(Store, None),
        WakeLock("big", "gpu1", "boot", 1),
        model,
        cast(Runtime, runtime),
        room=room(),
        waits=noted.append,
        begins=begins,
        in_memory=in_memory,
        progressed=lambda part: None,
    )


async def test_what_it_occupies_is_noted_while_its_room_is_kept() -> None:
    runtime, noted = Scripted(), list[str]()
    assert isinstance(await wake_of(runtime, noted=noted).run(), Woken)
    assert noted == ["begins", "in memory", "room is given back"]
    assert runtime.unloaded == 0


@pytest.mark.parametrize(("probes", "told"), [([5.0, 9.0], 5.0), ([2_000.0, 9.0], 9.0), ([3_000.0, 2_000.0], 2_000.0)])
async def test_a_slow_first_answer_gets_a_second_probe(probes: list[float], told: float) -> None:
    runtime = Scripted()
    runtime.probes = probes
    assert (await wake_of(runtime).run()).first_token_ms == told


async def test_no_room_before_a_load_is_no_failure_and_touches_nothing() -> None:
    runtime = Scripted()
    with pytest.raises(NoRoom, match="9 MB"):
        await wake_of(runtime, full=True).run()
    assert runtime.unloaded == 0 and not runtime.loading.is_set()


async def test_what_is_not_there_fails_before_anybody_makes_room_for_it() -> None:
    """It waited a minute for its turn, or had another model evicted, and failed all the same."""
    runtime, noted = Scripted(lacking="there is no GGUF file at x"), list[str]()
    runtime.line.clear()
    with pytest.raises(NotWoken, match="there is no GGUF file at x") as failed:
        await wake_of(runtime, full=True, noted=noted).run()
    assert failed.value.tried and not runtime.loading.is_set() and noted == []


@pytest.mark.parametrize("waits_for", ["turn", "room"])
async def test_the_time_of_a_load_counts_from_its_begin(waits_for: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for is somebody else's load: that is no failure of its own."""
    monkeypatch.setattr(wake, "TELL_TURN_S", 0.0)
    runtime, there, noted = Scripted(), asyncio.Event(), list[str]()
    if waits_for == "turn":
        runtime.line = there
    one = wake_of(runtime, timeout_ms=1_000, room_after=there, noted=noted)
    waking = asyncio.create_task(one.run())
    waited, _ = await asyncio.wait({waking}, timeout=1.2)
    assert not waited, "its wakeTimeoutMs ran while it waited"
    there.set()
    assert isinstance(await waking, Woken)
    told = ["waits for its runtime to end another load"] if waits_for == "turn" else []
    assert noted == [*told, "begins", "in memory", "room is given back"]


async def test_memory_that_runs_out_while_it_loads_is_a_failure() -> None:
    runtime = Scripted(NoRoom("nothing more can go"))
    with pytest.raises(NotWoken, match="nothing more can go") as failed:
        await wake_of(runtime).run()
    assert failed.value.tried and runtime.unloaded == 1


@pytest.mark.parametrize(
    ("states", "tried"),
    [
        (("absent",), True),
        (("unreachable",), False),
        (("unreachable", "absent"), True),
        (("absent", "unreachable"), True),
    ],
)
async def test_a_load_counts_as_tried_if_anybody_was_there_at_its_begin_or_end(
    states: tuple[str, ...], tried: bool
) -> None:
    runtime = Scripted(LoadFailed("there is no GGUF file"), states=states)
    with pytest.raises(NotWoken, match="there is no GGUF file") as failed:
        await wake_of(runtime).run()
    assert failed.value.tried is tried and runtime.unloaded == 1


async def test_a_load_that_never_ends_is_given_up_and_cleared_away() -> None:
    runtime = Scripted(hangs=True)
    with pytest.raises(NotWoken, match="it did not answer within 1 s"):
        await wake_of(runtime, timeout_ms=1_000).run()
    assert runtime.unloaded == 1


@pytest.mark.parametrize("silent", [0, 2])
async def test_only_another_holder_stops_a_load_not_a_silent_redis(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def keep(*_: Any) -> bool:
        nonlocal asked
        asked += 1
        if asked <= silent:
            raise errors.BrokerUnavailable("Redis is away")
        return asked == silent + 1

    monkeypatch.setattr(locks, "WAKE_RENEW_S", 0.01)
    monkeypatch.setattr(locks, "keep", keep)
    runtime = Scripted(hangs=True)
    with pytest.raises(errors.LockHeld, match="somebody else wakes big now"):
        await wake_of(runtime).run()
    assert asked == silent + 2 and runtime.unloaded == 1
