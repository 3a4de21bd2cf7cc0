"""A model that always fails to load, over hours of virtual time: the real waker, verbs and deadlines; the runtime and
the fallback's worker are the test's."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker import admission, hosts, jobs
from broker.records import JobRecord, Learned, ModelFacts, ModelOnHost
from tests.support.broker_world import World, fake_world
from workers import waker as waker_module
from workers.room import Claim
from workers.runtimes.base import Endpoint, LoadFailed
from workers.surroundings import Surroundings
from workers.waker import Waker

HOUR_MS = 3_600_000
STEP_MS = 15_000
ASK_EVERY_MS = 60_000
POLICY = json.dumps(
    {
        "models": {
            "big": {
                "backend": "simulated",
                "model": "x",
                "keepWarm": True,
                "coldStartBudgetMs": 60_000,
                "fallback": "small",
            },
            "small": {"backend": "simulated", "model": "y", "maxConcurrent": 4},
        }
    }
)


class Failing:
    """A runtime whose loads fail; `repaired` makes them succeed, `away` = nobody is there to load anything."""

    kind = "simulated"
    local = manageable = True

    def __init__(self, world: World) -> None:
        self.world = world
        self.loads: list[int] = []
        self.repaired = self.away = False

    async def state(self) -> str:
        return "unreachable" if self.away else "absent"

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        yield

    async def lacks(self) -> str:
        return ""

    async def load(self, *, timeout_s: float) -> None:
        if not self.repaired:
            self.loads.append(self.world.now)
            raise LoadFailed("there is no GGUF file")

    async def progress(self) -> None:
        return None

    def endpoint(self) -> Endpoint:
        return Endpoint("http://127.0.0.1:1", slots=1)

    async def probe(self, *, timeout_s: float, slot: int | None = None) -> float:
        return 5.0

    async def memory_bytes(self) -> int:
        return 1

    async def unload(self) -> None:
        """There is nothing to unload."""

    async def close(self) -> None:
        """There is nothing to close."""


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with fake_world() as world:
        await world.apply(POLICY)
        yield world


def start(world: World, runtime: Failing, monkeypatch: pytest.MonkeyPatch, host: str = "gpu1") -> Waker:
    """A worker's waker for the model; a second one is another life of it, or another host's."""

    @asynccontextmanager
    async def room(name: str, demanded: bool) -> AsyncIterator[Claim]:
        yield Claim(name)

    async def lacks_room(name: str, demanded: bool) -> str:
        return ""

    async def occupied(name: str) -> int:
        return 1

    async def loaded(name: str, load_ms: float, footprint_bytes: int) -> None:
        """Nothing is learned."""

    async def tell() -> None:
        told = {"big": waker.told(world.book.active.version)}
        if host == "gpu1":
            told["small"] = ModelOnHost(state="warm", slots_total=4)
        await world.tell(host, told, boot=host)

    async def learn(name: str, **facts: Any) -> None:
        await hosts.learn(world.store, name, **facts)
        await world.fleet.look()

    around = Surroundings(
        now_ms=world.store.now_ms,
        facts=lambda name: world.fleet.picture.facts.get(name, ModelFacts()),
        look=world.fleet.look,
        warm_elsewhere=lambda name: False,
        waited_for=lambda name: bool(world.fleet.picture.waiting.get(name)),
        room_for=room,
        lacks_room=lacks_room,
        occupied=occupied,
        loaded=loaded,
        learned=lambda name: Learned(),
        given_room=lambda name: False,
        held_up=lambda name: ("", 0),
        drained=lambda: False,
        outdone=lambda name: False,
        learn=learn,
        count=partial(hosts.count, world.store),
        tell=tell,
        changed=lambda: None,
    )
    monkeypatch.setattr(waker_module, "runtime_for", lambda name, model, state_dir: runtime)
    model = world.book.active.models()["big"]
    waker = Waker(world.store, "big", model, host=host, boot=host, state_dir=Path("/nowhere"), around=around)
    return waker


async def ask(world: World) -> str:
    record = JobRecord(id=world.new_id(), asked="big", stream=True)
    admitted = await admission.admit(world.store, world.book, world.fleet, record, b"{}", reader="")
    return admitted.job_id


async def serve_small(world: World, asked: list[str]) -> int:
    """Promotes what waits for a model that cannot come, and serves what is in the fallback's lane."""
    served = 0
    for job_id in list(asked):
        job = await world.job(job_id)
        if job.lane == "big" and world.fleet.view("big").availability == "unavailable":
            assert (await world.due.look(job_id, hasten=True)).outcome == "promoted"
            job = await world.job(job_id)
        if job.lane == "small":
            held = await world.stream(job_id, host="gpu1", boot="gpu1")
            await jobs.end(world.store, held, "finish", seq=2, data=b"end", served_by="small@gpu1", usage={})
            asked.remove(job_id)
            served += 1
    return served


async def live(world: World, wakers: list[Waker], until_ms: int) -> tuple[int, int]:
    """Lets time pass: a request a minute, a step of each waker every few seconds. Gives asked and served."""
    asked: list[str] = []
    count = served = 0
    while world.now < until_ms:
        if world.now % ASK_EVERY_MS < STEP_MS:
            asked.append(await ask(world))
            count += 1
        for waker in wakers:
            await waker._step()
            await waker._around.tell()
        served += await serve_small(world, asked)
        world.now += STEP_MS
    assert not asked, "somebody still waits"
    return count, served


async def test_an_hour_of_requests_for_a_model_that_cannot_load(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts try it, and one of them starts anew again and again: five loads in all, and the fallback serves all."""
    runtime = Failing(world)
    began = world.now
    asked = served = 0
    other = start(world, runtime, monkeypatch, "gpu2")
    for quarter in range(1, 5):
        first = start(world, runtime, monkeypatch)  # another life: it knows nothing but what Redis holds
        for waker in (first, other):
            await waker._around.tell()
        more, done = await live(world, [first, other], began + quarter * HOUR_MS // 4)
        asked, served = asked + more, served + done

    assert 2 <= len(runtime.loads) <= 5, runtime.loads
    assert (asked, served) == (60, 60)
    facts = world.fleet.picture.facts["big"]
    assert facts.quarantined_until >= world.now and facts.failure == "there is no GGUF file"
    assert first.state == "quarantined"


async def test_time_or_a_reset_clears_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Failing(world)
    waker = start(world, runtime, monkeypatch)
    await waker._around.tell()
    await live(world, [waker], world.now + HOUR_MS // 2)
    assert len(runtime.loads) == 5
    runtime.repaired = True
    await waker._step()
    assert waker.state == "quarantined", "it is not tried before its time"

    await hosts.learn(world.store, "big", **hosts.NOT_FAILED)
    await world.fleet.look()
    await waker._step()

    assert waker.state == "warm"
    facts = world.fleet.picture.facts["big"]
    assert (facts.failures, facts.quarantined_until, facts.failure, facts.failed_at) == (0, 0, "", "")


async def test_time_alone_clears_it_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Failing(world)
    waker = start(world, runtime, monkeypatch)
    await waker._around.tell()
    began = world.now
    await live(world, [waker], began + HOUR_MS // 2)
    runtime.repaired = True

    while waker.state != "warm":
        world.now += STEP_MS
        await world.fleet.look()
        await waker._step()
        assert world.now < began + 2 * HOUR_MS

    assert world.now >= runtime.loads[0] + HOUR_MS


async def test_a_runtime_that_is_not_there_is_looked_for_again_soon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody loaded anything, so nothing is spared by waiting an hour for an Ollama that was started meanwhile."""
    runtime = Failing(world)
    runtime.away = True
    waker = start(world, runtime, monkeypatch)
    await waker._around.tell()
    await live(world, [waker], world.now + HOUR_MS // 5)
    assert len(runtime.loads) > 5
    gaps = [after - before for before, after in zip(runtime.loads, runtime.loads[1:], strict=False)]
    assert max(gaps) <= 30_000 + STEP_MS
    runtime.away, runtime.repaired = False, True
    began = world.now

    while waker.state != "warm":
        world.now += STEP_MS
        await world.fleet.look()
        await waker._step()
        assert world.now <= began + 30_000 + STEP_MS


async def test_a_host_that_has_not_heard_of_a_failure_hears_of_it_under_the_lock(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its picture may be half a second old: without another look two hosts would try twice as often."""
    runtime = Failing(world)
    first, other = (start(world, runtime, monkeypatch, host) for host in ("gpu1", "gpu2"))
    for waker in (first, other):
        await waker._around.tell()
    heard = ModelFacts()

    async def look() -> None:
        nonlocal heard
        heard = (await world.fleet.look()).facts["big"]

    other._around.facts = lambda name: heard
    other._around.look = look
    await first._step()
    assert len(runtime.loads) == 1

    await other._step()

    assert len(runtime.loads) == 1
    assert other.state == "cold"


async def test_only_a_resident_model_is_looked_at_more_often_than_each_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at a cold one asks Redis for the time: a hundred a second would be for nothing."""
    runtime = Failing(world)
    waker = start(world, runtime, monkeypatch)
    assert waker._pause_s() == waker_module.STEP_EVERY_S
    runtime.repaired = True
    await waker._around.tell()
    while waker.state != "warm":
        await waker._step()
    waker.upkeep.suspect()
    assert waker._pause_s() == 0.01
