"""What an operator asks of a worker: models warm, unloaded, reset, pinned, and the host drained."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker import errors, hosts, jobs, operator
from broker.lifecycle import State
from broker.snapshots import Snapshots
from tests.support.redis_server import RedisServer
from tests.support.waiting import until
from tests.support.worker_world import World, eventually, simulated, words, worker_world
from workers import residents, waker
from workers.host import Host
from workers.runtimes.simulated import Simulated

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def test_a_model_unloaded_by_hand_stays_cold_until_somebody_asks(world: World) -> None:
    """Keep-warm would bring it back within half a second, and the operator who wants the GPU would lose that race."""
    await world.apply({"big": simulated()})
    host = await world.warm_host()
    await operator.unload(world.store, world.book.active, world.fleet, "big")
    await world.until_model("big", "cold")
    await _steps(host, "big")  # each of which would wake it
    assert host.residents.wakers["big"].state == "cold"
    assert world.fleet.picture.facts["big"].unloaded_until > await world.store.now_ms() + 3_000_000
    ask = await world.submit("big", tokens=3)
    assert (await ask.end()).state is State.DONE and ask.text == words(3)
    await world.fleet.look()
    assert world.fleet.picture.facts["big"].unloaded_until == 0, "who asked ended the pause of keep-warm"


async def test_unloading_a_cold_keep_warm_model_keeps_it_cold(world: World) -> None:
    await world.apply({"big": simulated()})
    await operator.unload(world.store, world.book.active, world.fleet, "big")
    host = await world.host()
    await _steps(host, "big")
    assert host.residents.wakers["big"].state == "cold"
    await operator.warm(world.store, world.book.active, world.fleet, "big")
    told = await world.until_model("big", "warm")
    assert told.last_load_ms > 0 and told.progress == -1


async def test_a_busy_model_is_not_unloaded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody reads its answer."""
    monkeypatch.setattr(operator, "BUSY_S_MAX", 0.2)
    monkeypatch.setattr(hosts, "BEAT_EVERY_S", 0.3)
    await world.apply({"big": simulated(maxConcurrent=2)})
    await world.warm_host()
    await world.runtime("big").break_with(stall_after_tokens=1)
    ask = await world.submit("big", tokens=5)
    await ask.until_state(State.STREAMING)
    await eventually(lambda: _used(world, "big"), what="the heartbeat tells of the slot")
    with pytest.raises(errors.WishRefused, match="big is at work in 1 slot; try again when it is idle"):
        await operator.unload(world.store, world.book.active, world.fleet, "big")
    assert (await world.model("big")).state == "warm"
    assert world.fleet.picture.facts["big"].unloaded_until == 0, "a refusal leaves no wish"
    await jobs.cancel(world.store, ask.job_id)
    await ask.end()


async def test_a_pinned_model_is_not_unloaded_for_being_idle(world: World) -> None:
    await world.apply({"big": simulated(keepWarm=False, idleUnloadMs=1)})
    host = await world.host()
    await operator.pin(world.store, "big", pinned=True)
    await world.fleet.look()
    await operator.warm(world.store, world.book.active, world.fleet, "big")
    await world.until_model("big", "warm")
    # the demand of `warm` ends: only the pin holds it now
    await world.store.command("HSET", world.store.keys.model("big"), "wanted_until", 0)
    big = host.residents.wakers["big"]

    async def seen_unwanted() -> bool:
        return not await big._demand.wants(big.warmth)

    await eventually(seen_unwanted, what="nobody wants it")
    await _steps(host, "big")
    assert big.state == "warm"
    await operator.pin(world.store, "big", pinned=False)
    await world.until_model("big", "cold")


async def test_a_pinned_model_is_not_evicted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one cannot fit until it is unpinned: its job waits, new ones hear it in numbers."""
    monkeypatch.setattr(waker, "NO_ROOM_PAUSE_S", 0.3)
    monkeypatch.setattr(residents, "WATCH_EVERY_S", 0.2)
    await world.apply(
        {
            "big": simulated(keepWarm=False, memoryMb=80, minStayMs=0, coldStartBudgetMs=60_000),
            "other": simulated(keepWarm=False, memoryMb=80, minStayMs=0, coldStartBudgetMs=60_000),
        }
    )
    await world.host(memory_mb=100)
    await operator.pin(world.store, "big", pinned=True)
    ask = await world.submit("big")
    await ask.end()
    waiting = await world.submit("other")
    said = "other needs 80 MB; 20 MB are free and the other models could leave 0 MB, of 100 MB in all"

    async def unfit() -> bool:
        told = await world.model("other")
        return told.unfit and told.reason == said

    await eventually(unfit, what="nobody leaves it any room")
    assert (await world.model("big")).state == "warm"
    await operator.pin(world.store, "big", pinned=False)
    assert (await waiting.end(timeout_s=30)).state is State.DONE
    assert (await world.model("big")).state == "cold"


async def test_another_goes_instead_of_a_pinned_model(world: World) -> None:
    """Though nothing is worth less than the pinned one, and nothing was idle for longer."""
    model = simulated(keepWarm=False, memoryMb=40, minStayMs=0)
    await world.apply({"pinned": {**model, "weight": 0.001}, "other": model, "third": model})
    await world.host(memory_mb=100)
    for name in ("pinned", "other"):
        await (await world.submit(name)).end()
    await operator.pin(world.store, "pinned", pinned=True)
    await world.fleet.look()
    assert (await (await world.submit("third")).end()).served_by == "third@gpu1"
    assert [(await world.model(name)).state for name in ("pinned", "other")] == ["warm", "cold"]


async def test_a_load_tells_how_far_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it goes on, and no longer."""

    async def half(_runtime: Simulated) -> float:
        return 0.5

    monkeypatch.setattr(Simulated, "progress", half)
    await world.apply({"big": simulated(options={"coldStartMs": 1_500})})
    await world.host()

    async def told() -> bool:
        there = await world.model("big")
        return there.state == "waking" and there.progress == 0.5

    await eventually(told, what="the heartbeat tells of the load")
    assert (await world.until_model("big", "warm")).progress == -1


async def test_a_model_that_is_warm_is_not_told_as_loading(world: World) -> None:
    """Though its wake still has something to count."""
    await world.apply({"big": simulated()})
    host = await world.host()
    waker = host.residents.wakers["big"]
    waker.state, waker.progress = "warm", 0.5
    assert waker.told(1).progress == -1


async def test_reset_ends_a_quarantine(world: World) -> None:
    """Without it the third failed load is tried again after half a minute."""
    await world.apply({"big": simulated(keepWarm=False, options={"loadFails": -1})})
    await world.host()
    await operator.warm(world.store, world.book.active, world.fleet, "big")
    await world.until_model("big", "quarantined")
    with pytest.raises(errors.WishRefused, match="gateway model reset big"):
        await operator.warm(world.store, world.book.active, world.fleet, "big")
    failures = world.fleet.picture.facts["big"].failures
    await world.store.command("HSET", world.store.keys.model("big"), "quarantined_until", 2**52)
    await operator.reset(world.store, world.fleet, "big")

    async def tried_again() -> bool:
        facts = (await world.fleet.look()).facts["big"]
        return 0 < facts.quarantined_until < 2**52

    await eventually(tried_again, what="it is tried again")
    assert world.fleet.picture.facts["big"].failures <= failures, "what failed before is forgotten"
    await world.until_model("big", "quarantined")


async def test_a_drained_host_finishes_what_runs_and_claims_no_more(world: World) -> None:
    """And is there again when it is undrained; it wakes nothing meanwhile."""
    await world.apply({"big": simulated(), "cold": simulated(keepWarm=False)})
    host = await world.host()
    await world.until_model("big", "warm")
    await world.runtime("big").break_with(first_token_delay_ms=300, times=1)
    running = await world.submit("big", tokens=4)
    await running.until_state(State.CLAIMED, State.STREAMING)
    waiting = await world.submit("big", tokens=4)
    await operator.drain(world.store, world.fleet, "gpu1", drained=True)
    assert (await running.end()).state is State.DONE
    await until(lambda: not host.dispatcher.busy, what="nothing runs any more")
    assert (await waiting.record()).state is State.QUEUED
    with pytest.raises(errors.ModelUnavailable, match="no host that serves it takes new work"):
        await world.submit("big")
    with pytest.raises(errors.WishRefused, match="stays cold, because no host"):
        await operator.warm(world.store, world.book.active, world.fleet, "cold")
    wanted_until = await world.store.now_ms() + 60_000  # by a request that came before
    await world.store.command("HSET", world.store.keys.model("cold"), "wanted_until", wanted_until)
    await _steps(host, "cold")
    assert host.residents.wakers["cold"].state == "cold"
    await operator.drain(world.store, world.fleet, "gpu1", drained=False)
    assert (await waiting.end()).state is State.DONE
    await world.until_model("cold", "warm")


async def test_a_host_that_drains_has_the_slots_that_are_in_use_and_no_others(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=3, options={"decodeTps": 100})})
    await world.warm_host()
    running = await world.submit("big", tokens=900)
    await running.until_state(State.STREAMING)
    await operator.drain(world.store, world.fleet, "gpu1", drained=True)

    async def told() -> tuple[int, int] | None:
        big = await world.model("big")
        return (big.slots_total, big.slots_used) if big.slots_total < 3 else None

    assert await eventually(told, what="it is drained") == (1, 1)
    shown = (await Snapshots(world.store, world.book, world.fleet).latest()).models[0]
    assert (shown.slots_total, shown.slots_used) == (1, 1)
    await jobs.cancel(world.store, running.job_id)

    async def none_left() -> bool:
        return (await world.model("big")).slots_total == 0

    await eventually(none_left, what="nothing runs any more")


async def test_a_host_that_is_not_there_is_named(world: World) -> None:
    await world.apply({"big": simulated()})
    await world.host()
    with pytest.raises(errors.UnknownHost, match="no live host is called 'gpu2'; did you mean gpu1"):
        await operator.drain(world.store, world.fleet, "gpu2", drained=True)


async def test_a_drained_worker_still_ends_when_it_is_told_to(world: World) -> None:
    await world.apply({"big": simulated()})
    host = await world.warm_host()
    await operator.drain(world.store, world.fleet, "gpu1", drained=True)
    draining = asyncio.create_task(host.drain())
    await world.ended()
    await draining


async def _used(world: World, model: str) -> int:
    return (await world.model(model)).slots_used


async def _steps(host: Host, model: str) -> None:
    """Waits for three whole steps of a model's waker."""
    mine = host.residents.wakers[model]
    for _ in range(3):
        mine.kick()
        await until(lambda: not mine._kick.is_set(), what="a step of the waker")
