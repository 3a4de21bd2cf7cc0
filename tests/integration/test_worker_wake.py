"""A cold model: how long its callers wait, who serves them meanwhile, and that it is loaded once."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker import hosts, wake
from broker.lifecycle import State
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, words, worker_world

pytestmark = pytest.mark.real
BUDGET_MS = 600


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def test_a_waiting_job_is_promoted_at_its_deadline_and_the_wake_goes_on(world: World, tmp_path: Path) -> None:
    """The promise of the gateway: an answer in time from the small model, and the big one for the next request."""
    load_log = tmp_path / "loads"
    await world.apply(
        {
            "deep-coder": simulated(
                keepWarm=False,
                coldStartBudgetMs=BUDGET_MS,
                fallback="coder-small",
                options={"coldStartMs": 2500, "loadLog": str(load_log)},
            ),
            "coder-small": simulated(maxConcurrent=4),
        }
    )
    await world.scheduler()
    await world.host()
    await world.until_model("coder-small", "warm")

    ask = await world.submit("deep-coder")
    assert ask.lane == "deep-coder"
    record = await ask.end()

    assert record.state is State.DONE
    assert (record.lane, record.model, record.asked_model) == ("coder-small", "coder-small", "deep-coder")
    assert record.served_by == "coder-small@gpu1"
    assert record.promotions == 1
    assert ask.models == {"coder-small"}
    assert ask.text == words(3)
    late_ms = record.promoted_at - record.submitted_at - BUDGET_MS
    assert 0 <= late_ms <= 500, f"promoted {late_ms} ms after its deadline"
    assert (await world.model("deep-coder")).state == "waking"

    await world.until_model("deep-coder", "warm")
    next_one = await world.submit("deep-coder")
    record = await next_one.end()
    assert (record.served_by, record.promotions) == ("deep-coder@gpu1", 0)
    assert next_one.models == {"deep-coder"}
    assert len(load_log.read_text().splitlines()) == 1


async def test_sixty_callers_of_a_cold_model_load_it_once(world: World, tmp_path: Path) -> None:
    load_log = tmp_path / "loads"
    await world.apply(
        {
            "big": simulated(
                keepWarm=False, maxConcurrent=4, maxQueue=60, options={"coldStartMs": 800, "loadLog": str(load_log)}
            )
        }
    )
    await world.host()

    asks = await asyncio.gather(*(world.submit("big") for _ in range(60)))
    records = await asyncio.gather(*(ask.end() for ask in asks))

    assert {record.state for record in records} == {State.DONE}
    assert {record.attempt for record in records} == {1}
    assert len(load_log.read_text().splitlines()) == 1
    again = await asyncio.gather(*(world.submit("big") for _ in range(10)))
    assert {(await ask.end()).state for ask in again} == {State.DONE}
    assert len(load_log.read_text().splitlines()) == 1
    assert await world.store.command("GET", world.store.keys.wake_epoch("big")) == b"1"
    assert await wake.holder(world.store, "big") == ""


async def test_two_workers_of_different_names_load_a_model_once(world: World, tmp_path: Path) -> None:
    load_log = tmp_path / "loads"
    await world.apply(
        {"big": simulated(keepWarm=False, maxConcurrent=4, maxQueue=60, options={"loadLog": str(load_log)})}
    )
    workers = [world.process("workers.host", name) for name in ("gpu1", "gpu2")]
    for name in ("gpu1", "gpu2"):
        await world.until_host(name)

    asks = await asyncio.gather(*(world.submit("big") for _ in range(60)))
    records = await asyncio.gather(*(ask.end() for ask in asks))

    assert {record.state for record in records} == {State.DONE}
    assert len({record.served_by for record in records}) == 1
    states = {(await world.model("big", name)).state for name in ("gpu1", "gpu2")}
    assert states == {"warm", "cold"}
    more = await asyncio.gather(*(world.submit("big") for _ in range(20)))
    await asyncio.gather(*(ask.end() for ask in more))
    assert len(load_log.read_text().splitlines()) == 1
    for worker in workers:
        worker.terminate()
    assert [await worker.exit() for worker in workers] == [0, 0]


async def test_who_gets_the_lock_second_sees_that_the_model_is_warm(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load may be shorter than the picture of other hosts is old: only a fresh look under the lock can tell."""
    load_log = tmp_path / "loads"
    monkeypatch.setattr(hosts, "LOOK_EVERY_S", 60.0)
    await world.apply({"big": simulated(keepWarm=False, options={"coldStartMs": 600, "loadLog": str(load_log)})})
    both = [await world.host(name) for name in ("gpu1", "gpu2")]

    ask = await world.submit("big")
    await asyncio.gather(*(host._fleet.look() for host in both))  # both see the demand, neither the other's wake

    async def both_had_the_lock() -> bool:
        had = int(await world.store.command("GET", world.store.keys.wake_epoch("big")) or 0)
        return had >= 2 and not await wake.holder(world.store, "big")

    await eventually(both_had_the_lock, what="the second host took the lock too, and gave it back")
    assert (await ask.end()).state is State.DONE
    assert len(load_log.read_text().splitlines()) == 1


async def test_another_host_wakes_a_model_that_its_host_takes_along(world: World) -> None:
    """A drained host leaves at once; whoever is left serves what waits."""
    await world.apply({"big": simulated(maxConcurrent=1)})
    await world.host("gpu1")
    await world.until_model("big", "warm", host="gpu1")
    await world.host("gpu2")
    assert (await world.model("big", "gpu2")).state == "cold"

    await world.leave("gpu1")
    ask = await world.submit("big")

    assert (await ask.end()).served_by == "big@gpu2"


async def test_another_host_wakes_a_model_while_its_host_still_drains(world: World) -> None:
    """It claims no more, so what it has warm is of no use to those who come now."""
    await world.apply({"big": simulated(maxConcurrent=1)}, drainTimeoutMs=60_000)
    leaving = await world.host("gpu1")
    await world.until_model("big", "warm", host="gpu1")
    await world.host("gpu2")
    await world.runtime("big", "gpu1").break_with(stall_after_tokens=1)
    held = await world.submit("big", tokens=9)
    await held.until_state(State.STREAMING)
    draining = asyncio.create_task(leaving.drain(), name="drain")

    ask = await world.submit("big")

    assert (await ask.end()).served_by == "big@gpu2"
    assert (await held.record()).state is State.STREAMING
    await world.leave("gpu1")
    await draining


async def test_only_another_holder_stops_a_load(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that fell free is taken again; one that somebody else holds ends the load, and the model is cold."""
    monkeypatch.setattr(wake, "WAKE_RENEW_S", 0.1)
    await world.apply({"big": simulated(options={"coldStartMs": 1500})})
    await world.host()
    await world.until_model("big", "waking")
    key = world.store.keys.wake("big")
    await world.store.command("DEL", key)

    async def taken() -> str:
        return await wake.holder(world.store, "big")

    assert (await eventually(taken, what="the holder takes its lock again")).startswith("gpu1/")
    await world.store.command("SET", key, "gpu9/boot/7")
    await world.store.command("SET", world.store.keys.wake_epoch("big"), "7")
    told = await world.until_model("big", "cold")
    assert told.reason == "somebody else wakes big now"
    assert not (world.state_dir() / "big.pid").exists()
