"""Two models that cannot be in memory together, with a real worker, under load that does not end."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from broker import jobs, operator
from broker.lifecycle import State
from broker.records import JobRecord
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, worker_world
from workers import picture, turns

pytestmark = pytest.mark.real
LIMIT_MB = 1000
STAY_MS = 500


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


def models(load_log: Path, **more: object) -> dict[str, dict[str, object]]:
    """Each answer of `chat` takes a tenth of a second."""
    shared = {"keepWarm": False, "minStayMs": STAY_MS, "maxQueue": 20, **more}
    return {
        "chat": simulated(memoryMb=700, options={"decodeTps": 100, "loadLog": str(load_log)}, **shared),
        "coder": simulated(memoryMb=600, options={"loadLog": str(load_log)}, **shared),
    }


@asynccontextmanager
async def steady(world: World, model: str, clients: int = 3, **fields: object) -> AsyncIterator[list[JobRecord]]:
    """Clients that ask again as soon as they are served, and are never refused; gives the records of what they got."""
    served: list[JobRecord] = []

    async def client(number: int) -> None:
        while True:
            served.append(await (await world.submit(model, tokens=10, **fields)).end(timeout_s=60))

    tasks = [asyncio.create_task(client(n)) for n in range(clients)]
    try:
        yield served
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


async def test_two_models_take_turns_and_neither_starves(world: World, tmp_path: Path) -> None:
    """Whoever waits for the second is served after one minimum stay and one batch; then the first comes back."""
    load_log = tmp_path / "loads"
    await world.apply(models(load_log))
    host = await world.host(memory_mb=LIMIT_MB)
    async with steady(world, "chat") as served:
        await eventually_some(served)
        asked = await (await world.submit("coder")).end(timeout_s=30)
        assert asked.served_by == "coder@gpu1"
        await eventually_some(served)
        assert sum(w.memory_bytes for w in host.residents.wakers.values()) <= LIMIT_MB << 20

    assert {record.state for record in served} == {State.DONE}
    assert {record.attempt for record in served} == {1}, "a job was thrown out of a runtime"
    assert len(load_log.read_text().splitlines()) <= 3, "they swapped more often than somebody asked"


async def test_a_batch_is_so_many_jobs_whatever_their_session(world: World, tmp_path: Path) -> None:
    """The session whose prompt is cached has no privilege beyond the batch either."""
    await world.apply(models(tmp_path / "loads", minStayMs=0))
    await world.host(memory_mb=LIMIT_MB)
    async with steady(world, "chat", session="agent") as served:
        await world.until_model("chat", "warm")
        await eventually_some(served)
        ask = await world.submit("coder")
        record = await ask.end(timeout_s=30)

    between = [r for r in served if record.submitted_at < r.claimed_at < record.claimed_at]
    # one more may have been claimed before the worker heard of the other's job
    assert len(between) <= turns.BATCH_PER_SLOT + 1, "the batch was longer than its bound"


async def eventually_some(served: list[JobRecord], more: int = 3) -> None:
    """Waits for so many more answers."""
    before = len(served)

    async def some() -> bool:
        return len(served) >= before + more

    await eventually(some, what=f"{more} more answers", timeout_s=30)


async def test_while_it_makes_room_it_says_so_and_takes_nobody_on(world: World, tmp_path: Path) -> None:
    await world.apply(models(tmp_path / "loads", minStayMs=0))
    host = await world.host(memory_mb=LIMIT_MB)
    await (await world.submit("chat")).end()
    await world.runtime("chat").break_with(stall_after_tokens=1, times=1)
    held = await world.submit("chat", tokens=5)
    await held.until_state(State.STREAMING)
    wanted = await world.submit("coder")
    host.residents.swaps._turns["chat"] = turns.Turn("coder", begun_ms=1, over=True)

    async def makes_room() -> bool:
        told = await world.model("chat")
        return (told.state, told.reason, told.slots_total) == ("warm", "makes room for coder", 1)

    await eventually(makes_room, what="chat says that it makes room")
    waits = await world.submit("chat")
    assert (await world.model("coder")).reason == "waits for the memory of chat"
    assert (await waits.record()).state is State.QUEUED
    await world.store.command("PUBLISH", world.store.keys.control_channel("gpu1"), f"cancel {held.job_id} 1")

    assert (await wanted.end()).served_by == "coder@gpu1"
    assert (await waits.end()).served_by == "chat@gpu1"


async def test_who_waits_while_the_other_loads_is_not_refused(world: World, tmp_path: Path) -> None:
    """A load takes a minute or two: who asked for the other model meanwhile was called quarantined and sent away, and
    without a fallback that was a 503 for every client of it, once in each turn."""
    known = models(tmp_path / "loads", minStayMs=0)
    known["coder"]["options"] = {"coldStartMs": 1_500}
    await world.apply(known)
    await world.host(memory_mb=LIMIT_MB)
    first = await world.submit("coder")
    await world.until_model("coder", "waking")
    waits = [await world.submit("chat")]

    async def says_why() -> bool:
        told = await world.model("chat")
        return (told.state, told.reason) == ("cold", "waits for the memory of coder") and told.room_at > 0

    await eventually(says_why, what="chat says whose memory it waits for")
    waits.append(await world.submit("chat"))
    assert (await world.model("coder")).state == "waking"
    assert (await first.end()).served_by == "coder@gpu1"
    assert [(await ask.end()).served_by for ask in waits] == ["chat@gpu1"] * 2


async def test_it_goes_on_when_nobody_waits_any_more(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "RESYNC_EVERY_S", 0.3)  # only then a job is missed that left its lane unserved
    await world.apply(models(tmp_path / "loads", minStayMs=0))
    host = await world.host(memory_mb=LIMIT_MB)
    await (await world.submit("chat")).end()
    await world.runtime("chat").break_with(stall_after_tokens=1, times=1)
    held = await world.submit("chat", tokens=5)
    await held.until_state(State.STREAMING)
    wanted = await world.submit("coder")
    host.residents.swaps._turns["chat"] = turns.Turn("coder", begun_ms=1, over=True)
    waker = host.residents.wakers["chat"]

    async def makes_room() -> bool:
        return waker.makes_room_for == "coder"

    await eventually(makes_room, what="chat makes room")
    await jobs.cancel(world.store, wanted.job_id)
    await world.store.command("HSET", world.store.keys.model("coder"), "wanted_until", "0")

    async def goes_on() -> bool:
        return waker.makes_room_for == "" and (await world.model("chat")).reason == ""

    await eventually(goes_on, what="chat goes on")


async def test_who_would_wait_too_long_for_its_turn_is_promoted_at_once(world: World, tmp_path: Path) -> None:
    """The other has just been loaded and stays for a minute: the deadline of 30 s cannot be met, and nobody waits it
    out."""
    known = models(tmp_path / "loads", minStayMs=60_000)
    known["coder"] |= {"fallback": "small", "coldStartBudgetMs": 30_000}
    await world.apply(known | {"small": simulated(memoryMb=100)})
    await world.scheduler()
    await world.host(memory_mb=LIMIT_MB)
    await world.until_model("small", "warm")
    await (await world.submit("chat")).end()

    ask = await world.submit("coder")
    assert ask.lane == "coder"
    record = await ask.end()

    assert (record.served_by, record.promotions) == ("small@gpu1", 1)
    assert record.promoted_at - record.submitted_at < 10_000


async def test_who_nobody_waits_for_comes_as_soon_as_room_is_made_for_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All its requests went to its fallback. It had looked in vain a moment ago, and the slots that were emptied for it
    stood empty until its pause was over."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(turns, "ASKED_LEAST_MS", 0)
    monkeypatch.setattr(turns, "BATCH_PER_SLOT", 15)  # it looks for room in vain meanwhile
    await world.apply(models(tmp_path / "loads", minStayMs=0))
    await world.host(memory_mb=LIMIT_MB)

    async def evicted() -> bool:
        return "event=evict model=chat for=coder" in caplog.text

    async with steady(world, "chat") as served:
        await eventually_some(served)
        await operator.warm(world.store, world.book.active, world.fleet, "coder")
        await eventually(evicted, what="chat is evicted for coder", timeout_s=30)

    makes_room_at, evicted_at = (
        next(r.created for r in caplog.records if f"event={event} model=chat for=coder" in r.getMessage())
        for event in ("makes_room", "evict")
    )
    assert evicted_at - makes_room_at < 2
