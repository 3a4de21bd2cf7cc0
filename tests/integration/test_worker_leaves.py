"""How a worker goes: drained, stopped at once, or killed; and what becomes of its jobs, its name and its runtimes."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker import hosts
from broker.lifecycle import State
from broker.records import HostRecord
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, until, words, worker_world
from workers import chores

pytestmark = pytest.mark.real
SLOW = {"decodeTps": 15}


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def test_sigterm_finishes_what_runs_claims_no_more_and_leaves_at_once(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=1, options=SLOW)})
    worker = world.process("workers.host")
    await world.until_model("big", "warm")
    runs = await world.submit("big", tokens=15)
    await runs.until_state(State.STREAMING)
    waits = await world.submit("big")

    worker.terminate()
    record = await runs.end()
    code = await worker.exit()

    assert (record.state, runs.text, code) == (State.DONE, words(15), 0)
    assert (await waits.record()).state is State.QUEUED
    assert (await waits.record()).attempt == 0
    assert await hosts.read(world.store, "gpu1") is None
    assert (await world.model("big")).state == "absent"
    assert "Traceback" not in worker.log


async def test_a_drain_that_takes_too_long_gives_the_unseen_away_and_tells_the_seen(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=2)}, drainTimeoutMs=300)
    worker = world.process("workers.host", "gpu1")
    await world.until_model("big", "warm")
    await world.host("gpu2")
    seen, unseen = await world.seen_and_unseen("big")

    worker.terminate()

    record = await seen.end()
    assert (record.state, seen.said["code"]) == (State.FAILED, "worker_lost")
    assert seen.said["message"] == "the worker on gpu1 was stopped while it served this request"
    assert seen.text == words(2)
    record = await unseen.end()
    assert (record.state, record.served_by, record.losses) == (State.DONE, "big@gpu2", 0)
    assert unseen.text == words(9)
    assert await worker.exit() == 0


async def test_a_second_sigterm_stops_at_once(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=1)}, drainTimeoutMs=60_000)
    worker = world.process("workers.host")
    await world.until_model("big", "warm")
    await world.runtime("big").break_with(stall_after_tokens=1)
    ask = await world.submit("big", tokens=9)
    await ask.until_state(State.STREAMING)
    worker.terminate()

    async def drains() -> bool:
        record = await hosts.read(world.store, "gpu1")
        return record is not None and record.draining

    await eventually(drains, what="the worker says that it drains")
    began = time.monotonic()
    worker.terminate()

    assert await worker.exit(5) == 0
    assert time.monotonic() - began < 2
    assert (await ask.end()).error == "worker_lost"


async def test_a_killed_worker_is_found_out_by_its_leases(world: World) -> None:
    """Nobody restarts it: the seen stream is told within a lease and two seconds, the unseen answer comes from another
    host."""
    await world.apply({"big": simulated(maxConcurrent=2)})
    await world.scheduler()
    worker = world.process("workers.host", "gpu1")
    await world.until_model("big", "warm")
    await world.host("gpu2")
    seen, unseen = await world.seen_and_unseen("big")
    for ask in (seen, unseen):
        await ask.next()
    worker.kill()
    began = time.monotonic()

    record, other = await asyncio.gather(seen.end(14), unseen.end(14))

    assert time.monotonic() - began < 12
    assert (record.state, seen.said["code"]) == (State.FAILED, "worker_lost")
    assert seen.said["message"] == "the worker on gpu1 went away while it served this request"
    assert seen.text == words(2)
    assert (other.state, other.served_by, other.losses) == (State.DONE, "big@gpu2", 1)
    assert (unseen.text, unseen.restarts) == (words(9), 1)


async def test_a_restarted_worker_deals_with_its_earlier_life_at_once(world: World) -> None:
    """It holds the name's lock, so the earlier one is dead: nobody waits for its leases."""
    await world.apply({"big": simulated(maxConcurrent=2)})
    worker = world.process("workers.host")
    await world.until_model("big", "warm")
    seen, unseen = await world.seen_and_unseen("big")
    worker.kill()
    began = time.monotonic()
    again = world.process("workers.host")

    assert (await seen.end()).error == "worker_lost"
    assert (await unseen.end()).state is State.DONE
    assert time.monotonic() - began < 5
    assert unseen.text == words(9)
    again.terminate()
    assert await again.exit() == 0


async def test_what_a_killed_worker_left_of_a_model_that_nobody_wants_is_cleared_away(world: World) -> None:
    """Its server went with it, but its pidfile would stay for as long as the model is not loaded again."""
    await world.apply({"old": simulated(), "big": simulated(keepWarm=False)})
    first = world.process("workers.host")
    await world.until_model("old", "warm")
    pidfile = world.state_dir() / "old.pid"
    assert pidfile.exists()
    first.kill()
    await world.apply({"big": simulated(keepWarm=False)})
    await chores.sweep(world.store, world.book)  # it retires no more, or it would be loaded again
    host = await world.host()
    await until(lambda: hasattr(host, "residents") and host.residents.wakers, what="it has begun")
    assert host.residents.wakers.keys() == {"big"}
    assert not pidfile.exists()


async def test_a_name_belongs_to_one_worker(world: World) -> None:
    """A second worker of the name says so in a sentence and touches nothing of the first."""
    await world.apply({"big": simulated()})
    first = world.process("workers.host")
    await world.until_model("big", "warm")
    boot = (await hosts.read(world.store, "gpu1") or HostRecord(name="")).boot

    second = world.process("workers.host")
    assert await second.exit() == 4
    assert second.log.splitlines()[-1] == "a worker named gpu1 runs on this machine already"
    spelled = world.process("workers.host", GATEWAY_REDIS_URL=world.url + "?db=0")
    assert await spelled.exit() == 4
    assert "Traceback" not in second.log + spelled.log

    record = await hosts.read(world.store, "gpu1")
    assert record is not None and (record.boot, record.pid) == (boot, first.pid)
    assert (await (await world.submit("big")).end()).served_by == "big@gpu1"


async def test_a_name_that_is_alive_on_another_machine_is_not_taken(world: World) -> None:
    await world.apply({"big": simulated()})
    other = HostRecord(name="gpu1", boot="theirs", machine="elsewhere/1", pid=1)
    await hosts.beat(world.store, other, {}, lease_ms=60_000)

    worker = world.process("workers.host")

    assert await worker.exit() == 4
    assert worker.log.splitlines()[-1] == (
        "a worker named gpu1 is alive on another machine: give this one another name (GATEWAY_HOST_NAME)"
    )
    assert "Traceback" not in worker.log
    record = await hosts.read(world.store, "gpu1")
    assert record is not None and record.boot == "theirs"


async def test_a_worker_whose_name_was_taken_stops(world: World) -> None:
    """It was silent for longer than its lease, and somebody else has its name now: two must not go on as one."""
    await world.apply({"big": simulated()})
    worker = world.process("workers.host")
    await world.until_model("big", "warm")
    theirs = HostRecord(name="gpu1", boot="theirs", machine="elsewhere/1")
    await hosts.beat(world.store, theirs, {}, take=True, lease_ms=60_000)

    assert await worker.exit() == 4
    assert "Traceback" not in worker.log
    record = await hosts.read(world.store, "gpu1")
    assert record is not None and record.boot == "theirs"


async def test_no_redis_is_one_sentence(world: World, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gone = f"redis://127.0.0.1:{port}/0"
    for module in ("workers.host", "workers.scheduler"):
        process = world.process(module, GATEWAY_REDIS_URL=gone)
        assert await process.exit() == 3
        assert len(process.log.splitlines()) == 1 and f"127.0.0.1:{port}" in process.log, process.log
