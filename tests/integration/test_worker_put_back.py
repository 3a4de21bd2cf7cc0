"""A worker makes way for people: the batch job that began last goes back to its lane, and what races with that."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker import jobs
from broker.jobs import Holding
from broker.lifecycle import State
from broker.store import Store
from tests.support.redis_server import RedisServer
from tests.support.worker_world import Ask, World, eventually, simulated, worker_world

pytestmark = pytest.mark.real

BATCH = {"mode": "async", "stream": False}
NOW = {"coldStartBudgetMs": 500}
"""Shorter than a stop takes: whoever waits is in need at once."""


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def batch_runs(world: World, count: int = 1, *, tokens: int = 100) -> list[Ask]:
    """Batch jobs that run for seconds, begun in this order."""
    running = []
    for _ in range(count):
        running.append(await world.submit("big.batch", tokens=tokens, **BATCH))
        await running[-1].until_state(State.STREAMING)
    return running


def before_put_back(
    monkeypatch: pytest.MonkeyPatch, first: Callable[[Holding], Awaitable[Any]]
) -> asyncio.Queue[Exception | None]:
    """Has something happen between a worker's decision and its put-back; tells how each put-back went."""
    put_back, told = jobs.put_back, asyncio.Queue[Exception | None]()

    async def late(store: Store, held: Holding) -> None:
        await first(held)
        try:
            await put_back(store, held)
        except Exception as e:
            told.put_nowait(e)
            raise
        told.put_nowait(None)

    monkeypatch.setattr(jobs, "put_back", late)
    return told


async def test_the_batch_job_that_began_last_makes_way_and_is_served_after(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=2, **NOW, options={"decodeTps": 100})})
    await world.warm_host()
    (older,), (younger,) = await batch_runs(world, tokens=900), await batch_runs(world, tokens=60)

    person = await (await world.submit("big")).end()

    assert person.state is State.DONE
    first = await older.record()
    assert (first.state, first.put_backs, first.attempt) == (State.STREAMING, 0, 1), "no slot became free by itself"
    await jobs.cancel(world.store, older.job_id)  # of two slots the last free one is kept for people
    last = await younger.end()
    assert (last.state, last.put_backs, last.losses, last.attempt) == (State.DONE, 1, 0, 2)
    assert younger.restarts == 1 and last.claimed_at >= person.claimed_at


async def test_two_people_and_one_batch_job(world: World) -> None:
    """Only its slot can be freed: the second person waits for the first."""
    await world.apply({"big": simulated(maxConcurrent=1, **NOW, options={"decodeTps": 100})})
    await world.warm_host()
    (batch,) = await batch_runs(world, tokens=60)
    people = [await world.submit("big", tokens=10) for _ in range(2)]

    records = [await ask.end() for ask in people]
    assert [record.state for record in records] == [State.DONE, State.DONE]
    assert records[0].ended_at <= records[1].claimed_at
    record = await batch.end()
    assert (record.state, record.put_backs) == (State.DONE, 1)


async def test_one_slot_is_freed_for_one_person(world: World) -> None:
    """While it settles it is on its way: the other batch jobs run on."""
    await world.apply({"big": simulated(maxConcurrent=3, **NOW, options={"decodeTps": 100})})
    host = await world.warm_host()
    batch = await batch_runs(world, 3, tokens=80)

    person = await (await world.submit("big", tokens=5)).end()
    assert person.state is State.DONE
    host.dispatcher.dispatch()
    assert [(await ask.end()).put_backs for ask in batch] == [0, 0, 1]


async def test_one_that_ends_by_itself_meanwhile_is_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.apply({"big": simulated(maxConcurrent=1, **NOW, options={"decodeTps": 100})})
    await world.warm_host()
    (batch,) = await batch_runs(world, tokens=40)
    told = before_put_back(monkeypatch, lambda _: batch.until_state(State.DONE))

    person = await (await world.submit("big")).end()

    assert type(await told.get()).__name__ == "AlreadyEnded"
    record = await batch.end()
    assert (record.state, record.put_backs, record.attempt, person.state) == (State.DONE, 0, 1, State.DONE)


async def test_one_that_becomes_seen_meanwhile_runs_on_undisturbed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its client has been given cannot be taken back: the attempt does not even notice."""
    await world.apply({"big": simulated(maxConcurrent=1, **NOW, options={"decodeTps": 100})})
    await world.warm_host()
    (batch,) = await batch_runs(world, tokens=80)

    async def somebody_reads(held: Holding) -> None:
        await jobs.attach(world.store, held.job_id, reader="test/another", lease_ms=60_000, sees=True)

    told = before_put_back(monkeypatch, somebody_reads)
    person = await world.submit("big")

    record = await batch.end()
    assert type(await told.get()).__name__ == "BadTransition"
    assert (record.state, record.put_backs, record.attempt, batch.restarts) == (State.DONE, 0, 1, 0)
    assert (await person.end()).state is State.DONE
    assert told.empty(), "one refusal is enough"


async def test_one_whose_worker_dies_meanwhile_is_served_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The put-back was written, and nobody was left to stop the attempt."""
    await world.apply({"big": simulated(maxConcurrent=1, **NOW, options={"decodeTps": 100})})
    host = await world.warm_host()
    (batch,) = await batch_runs(world, tokens=100)
    put_back, written = jobs.put_back, asyncio.Event()

    async def dies(store: Store, held: Holding) -> None:
        await put_back(store, held)
        host.dispatcher.stopped = True
        written.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(jobs, "put_back", dies)
    person = await world.submit("big")
    await asyncio.wait_for(written.wait(), 5)

    async def stopped_itself() -> bool:
        return not host.dispatcher.attempts

    await eventually(stopped_itself, what="its next write is refused")
    monkeypatch.setattr(jobs, "put_back", put_back)
    for task in asyncio.all_tasks():
        if task.get_name().startswith("put back"):
            task.cancel()
    host.dispatcher.stopped = False
    host.dispatcher.dispatch()
    assert (await person.end()).state is State.DONE
    record = await batch.end()
    assert (record.state, record.put_backs, record.losses) == (State.DONE, 1, 0)


async def test_nothing_makes_way_for_a_job_that_may_not_run(world: World) -> None:
    """Its caller runs as many as its key allows: a slot would do nothing for it, and batch work would be lost."""
    await world.apply({"big": simulated(maxConcurrent=2, **NOW, options={"decodeTps": 100})})
    await world.warm_host()
    (batch,) = await batch_runs(world, tokens=900)
    bounded = {"caller": "ci", "max_running": 1}
    first = await world.submit("big", tokens=150, **bounded)
    await first.until_state(State.STREAMING)
    second = await world.submit("big", **bounded)

    records = [await ask.end() for ask in (first, second)]
    assert [record.state for record in records] == [State.DONE, State.DONE]
    assert records[0].ended_at <= records[1].claimed_at
    record = await batch.record()
    assert (record.state, record.put_backs, record.attempt) == (State.STREAMING, 0, 1)
    await jobs.cancel(world.store, batch.job_id)


async def test_a_slot_that_is_being_put_back_is_still_peoples(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither free nor counted as soon free, it would send people to a fallback for as long as the stop takes."""
    await world.apply({"big": simulated(maxConcurrent=1, **NOW, options={"decodeTps": 100})})
    host = await world.warm_host()
    (batch,) = await batch_runs(world, tokens=200)
    put_back, reached, goes_on = jobs.put_back, asyncio.Event(), asyncio.Event()

    async def late(*args: Any) -> None:
        reached.set()
        await goes_on.wait()
        await put_back(*args)

    monkeypatch.setattr(jobs, "put_back", late)
    person = await world.submit("big")
    await asyncio.wait_for(reached.wait(), 5)
    yielding = host.dispatcher.yielding("big")
    goes_on.set()
    assert yielding == 1
    assert [(await ask.end()).state for ask in (person, batch)] == [State.DONE, State.DONE]


async def test_people_are_not_promoted_off_slots_that_are_put_back_for_them(world: World) -> None:
    """Batch work holds every slot for long: its model answers in time all the same, so nobody is downgraded."""
    await world.apply(
        {
            "big": simulated(maxConcurrent=1, coldStartBudgetMs=3_000, fallback="small", options={"decodeTps": 100}),
            "small": simulated(),
        }
    )
    await world.scheduler()
    await world.warm_host()
    await (await world.submit("big", tokens=100)).end()  # how long a job takes is known
    (batch,) = await batch_runs(world, tokens=400)

    async def told() -> bool:
        return (await world.model("big")).slots_yielding == 1

    await eventually(told, what="the worker tells")
    person = await (await world.submit("big")).end()
    assert (person.served_by, person.promotions) == ("big@gpu1", 0)
    assert person.first_token_at <= person.first_token_by
    assert (await batch.record()).put_backs == 1
    await jobs.cancel(world.store, batch.job_id)
