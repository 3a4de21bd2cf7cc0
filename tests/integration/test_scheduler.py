"""The scheduler: twice, not at all, with its chores' engine dead, and with Redis gone for a moment."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from arq.worker import Worker

from broker import errors, jobs
from broker.due import Due, Looked
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.store import Store
from tests.support.counted import counted
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, until, words, worker_world
from workers import chores, clockwork, scheduler

pytestmark = pytest.mark.real


@pytest_asyncio.fixture
async def world(server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(server.socket_url, tmp_path) as world:
        yield world


def cold_and_warm(budget_ms: int, **small: object) -> dict[str, dict[str, object]]:
    return {
        "big": simulated(
            keepWarm=False, maxQueue=60, coldStartBudgetMs=budget_ms, fallback="small", options={"coldStartMs": 60_000}
        ),
        "small": simulated(**{"maxConcurrent": 4, "maxQueue": 60} | small),
    }


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When sweeps began; there is one every second."""
    monkeypatch.setattr(clockwork, "SWEEP_SECONDS", set(range(60)))
    monkeypatch.setattr(clockwork, "RESTART_PAUSE_S", 0.2)
    began: list[float] = []
    sweep = chores.sweep

    async def counted(store: Store, book: PolicyBook) -> None:
        began.append(time.monotonic())
        await sweep(store, book)

    monkeypatch.setattr(chores, "sweep", counted)
    return began


async def test_two_schedulers_at_once_do_everything_once(world: World) -> None:
    await world.apply(
        cold_and_warm(300) | {"lonely": simulated(maxQueue=60, maxWaitMs=500, options={"coldStartMs": 60_000})}
    )
    await world.scheduler()
    await world.scheduler()
    await world.host()
    await world.until_model("small", "warm")

    promoted = await asyncio.gather(*(world.submit("big") for _ in range(30)))
    expired = await asyncio.gather(*(world.submit("lonely") for _ in range(30)))
    first = await asyncio.gather(*(ask.end() for ask in promoted))
    second = await asyncio.gather(*(ask.end() for ask in expired))

    assert {(r.state, r.served_by, r.promotions, r.attempt) for r in first} == {(State.DONE, "small@gpu1", 1, 1)}
    assert {(r.state, r.error) for r in second} == {(State.EXPIRED, "cold_start_deadline")}
    late = [r.promoted_at - r.submitted_at - 300 for r in first] + [r.ended_at - r.give_up_at for r in second]
    assert min(late) >= 0 and max(late) <= 500, sorted(late)
    used = await counted(world.store)
    assert used["anonymous:big:big:big"] == {"promoted/small": 30}
    assert used["anonymous:lonely:lonely:lonely"]["expired/no_token"] == 30
    assert await world.store.command("ZCARD", world.store.keys.due) == 0


async def test_without_a_scheduler_everything_waits_and_is_caught_up_with(world: World) -> None:
    await world.apply(cold_and_warm(100) | {"lonely": simulated(maxWaitMs=200, options={"coldStartMs": 60_000})})
    await world.host()
    await world.until_model("small", "warm")
    promoted = [await world.submit("big") for _ in range(5)]
    expired = [await world.submit("lonely") for _ in range(3)]

    async def all_overdue() -> bool:
        now = await world.store.now_ms()
        return int(await world.store.command("ZCOUNT", world.store.keys.due, "-inf", now - 300)) == 8

    await eventually(all_overdue, what="every instant is long past")
    assert {(await ask.record()).state for ask in promoted + expired} == {State.QUEUED}

    process = world.process("workers.scheduler")

    assert {(await ask.end()).served_by for ask in promoted} == {"small@gpu1"}
    assert {(await ask.end()).state for ask in expired} == {State.EXPIRED}
    process.terminate()
    assert await process.exit() == 0
    assert "Traceback" not in process.log


async def test_a_job_that_cannot_be_settled_does_not_keep_the_others_from_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Redis refuses for one it may do for the next: a page of such jobs is not all that is ever looked at."""
    look = Due.look
    await world.apply({"big": simulated(keepWarm=False, maxQueue=9, maxWaitMs=200, options={"coldStartMs": 60_000})})
    await world.host()
    stuck, other = [await world.submit("big") for _ in range(2)]

    async def refused(due: Due, job_id: str, **more: Any) -> Looked:
        if job_id == stuck.job_id:
            raise errors.BrokerUnavailable("Redis cannot work at the moment")
        return await look(due, job_id, **more)

    monkeypatch.setattr(Due, "look", refused)
    monkeypatch.setattr(scheduler, "PAGE", 1)
    await world.scheduler()
    assert (await other.end()).state is State.EXPIRED
    assert (await stuck.record()).state is State.QUEUED
    monkeypatch.setattr(Due, "look", look)
    assert (await stuck.end()).state is State.EXPIRED


async def test_a_job_that_cannot_move_goes_as_soon_as_its_fallback_has_a_place(world: World) -> None:
    """Not at its next try a second later: somebody else would take the place."""
    await world.apply(cold_and_warm(150, maxConcurrent=1, maxQueue=1))
    await world.scheduler()
    await world.host()
    await world.until_model("small", "warm")
    await world.runtime("small").break_with(stall_after_tokens=1, times=1)
    held = await world.submit("small", tokens=9)
    await held.until_state(State.STREAMING)
    in_line = await world.submit("small")
    ask = await world.submit("big")
    key = world.store.keys.job(ask.job_id)

    async def tried() -> int:
        return int(await world.store.command("HGET", key, "retry_at") or 0)

    first_try = await eventually(tried, what="the full fallback was tried")

    async def tried_again() -> bool:
        return await tried() > first_try

    await eventually(tried_again, what="and again")
    assert (await ask.record()).lane == "big"
    freed = await world.store.now_ms()
    await jobs.cancel(world.store, in_line.job_id)

    async def moved() -> int:
        return (await ask.record()).promoted_at

    assert await eventually(moved, what="it moved") - freed < 400
    await jobs.cancel(world.store, held.job_id)
    assert (await ask.end()).served_by == "small@gpu1"


async def test_chores_go_on_after_arq_died_and_the_due_loop_does_not_notice(
    world: World, sweeps: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """arq's poll loop ends with the first error of its connection."""
    polls = 0
    poll = Worker._poll_iteration

    async def broken_once(worker: Worker) -> None:
        nonlocal polls
        if sweeps and not polls:
            polls = 1
            raise ConnectionError("cut")
        await poll(worker)

    monkeypatch.setattr(Worker, "_poll_iteration", broken_once)
    await world.apply(cold_and_warm(800))
    await world.scheduler()
    await world.host()
    await world.until_model("small", "warm")
    ask = await world.submit("big")

    with caplog.at_level(logging.WARNING, "warmlane.clockwork"):
        await until(lambda: "event=arq_restart" in caplog.text, what="arq died")
    count = len(sweeps)
    record = await ask.end()
    await until(lambda: len(sweeps) > count, what="sweeps after arq's end")

    assert 0 <= record.promoted_at - record.submitted_at - 800 <= 500


async def test_the_chores_of_two_gateways_on_one_redis_do_not_take_turns(
    world: World, server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arq tells cron runs apart by their name and second, in keys that know no namespace."""
    monkeypatch.setattr(clockwork, "SWEEP_SECONDS", set(range(60)))
    swept: Counter[str] = Counter()

    async def counted(store: object, book: object) -> None:
        swept[store.keys.namespace] += 1  # type: ignore[attr-defined]

    monkeypatch.setattr(chores, "sweep", counted)
    async with worker_world(server.socket_url, tmp_path) as other:
        for each in (world, other):
            await each.apply({"small": simulated()})
            await each.scheduler()
        await until(lambda: min(swept[world.namespace], swept[other.namespace]) >= 2, what="both sweep")


async def test_a_stream_survives_a_restart_of_redis(world: World, server: RedisServer) -> None:
    """Every frame once and in order, for a reader that was there and for one that reads the log afterwards."""
    await world.apply({"big": simulated(maxConcurrent=2, options={"decodeTps": 60})})
    await world.scheduler()
    await world.host()
    await world.until_model("big", "warm")
    ask = await world.submit("big", tokens=150)
    waits = [await world.submit("big", tokens=20) for _ in range(3)]
    await ask.until_state(State.STREAMING)
    for _ in range(20):
        await ask.next()

    await asyncio.to_thread(server.restart)

    record = await ask.end(20)
    assert (record.state, record.attempt) == (State.DONE, 1)
    assert ask.text == words(150)
    ids = [(frame.attempt, frame.seq) for frame in ask.frames]
    assert ids == [(1, seq) for seq in range(1, len(ids) + 1)]
    assert {(await other.end(20)).state for other in waits} == {State.DONE}
    assert {other.text for other in waits} == {words(20)}


async def test_redis_away_for_a_while_ends_nobody(world: World, server: RedisServer, sweeps: list[float]) -> None:
    """Worker and scheduler wait; what was admitted before is served after, and new requests are too."""
    # under `everysec` a kill may take the last writes with it while a sync is going on: not what this is about
    await world.store.command("CONFIG", "SET", "appendfsync", "always")
    await world.apply(cold_and_warm(200))
    await world.scheduler()
    host = await world.host()
    await world.until_model("small", "warm")
    ask = await world.submit("big")
    await asyncio.to_thread(server.kill)
    with pytest.raises(errors.BrokerUnavailable):
        await world.store.now_ms()
    await asyncio.to_thread(server.start)

    assert (await ask.end()).served_by == "small@gpu1"
    assert (await (await world.submit("small")).end()).state is State.DONE
    assert host.residents.wakers["small"].state == "warm"
    count = len(sweeps)
    await until(lambda: len(sweeps) > count, what="chores after the outage")
