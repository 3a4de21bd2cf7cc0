"""Who gets a slot, who waits and who is refused, counted from the job records of a running worker."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker import errors, jobs, lanes
from broker.lifecycle import State
from tests.support.invariants import take, violations
from tests.support.redis_server import RedisServer
from tests.support.worker_world import Ask, World, eventually, simulated, until, worker_world

pytestmark = pytest.mark.real


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def test_sixty_more_than_the_slots_fill_both_lanes_and_the_rest_is_refused(world: World) -> None:
    await world.apply(
        {
            "deep-coder": simulated(maxConcurrent=2, maxQueue=6, fallback="coder-small"),
            "coder-small": simulated(maxConcurrent=4, maxQueue=12),
        }
    )
    await world.scheduler()
    await world.host()
    for model, slots in (("deep-coder", 2), ("coder-small", 4)):
        await world.until_model(model, "warm")
        await world.runtime(model).break_with(stall_after_tokens=1)
        held = [await world.submit(model, tokens=9) for _ in range(slots)]
        for ask in held:
            await ask.until_state(State.STREAMING)

    tried = await asyncio.gather(*(world.submit("deep-coder") for _ in range(60)), return_exceptions=True)

    refused = [error for error in tried if isinstance(error, errors.LaneFull)]
    let_in = [ask for ask in tried if isinstance(ask, Ask)]
    assert (len(let_in), len(refused)) == (18, 42), tried
    assert all(1 <= error.retry_after_s <= 30 for error in refused)
    records = [await ask.record() for ask in let_in]
    assert Counter((record.lane, record.state) for record in records) == {
        ("deep-coder", State.QUEUED): 6,
        ("coder-small", State.QUEUED): 12,
    }
    assert (await world.waiting("deep-coder"), await world.waiting("coder-small")) == (6, 12)


async def test_a_job_that_leaves_the_lane_frees_its_place(world: World) -> None:
    """Cancelled or given up while it waits: the next one is let in at once."""
    await world.apply({"big": simulated(maxConcurrent=1, maxQueue=2, maxWaitMs=700)})
    await world.scheduler()
    await world.warm_host()
    await world.runtime("big").break_with(stall_after_tokens=1)
    await (await world.submit("big", tokens=9)).until_state(State.STREAMING)
    first, second = [await world.submit("big") for _ in range(2)]
    with pytest.raises(errors.LaneFull):
        await world.submit("big")

    assert await jobs.cancel(world.store, first.job_id) == "queued"
    assert (await first.end()).state is State.CANCELLED
    third = await world.submit("big")
    with pytest.raises(errors.LaneFull):
        await world.submit("big")
    record = await second.end()

    assert (record.state, record.error) == (State.EXPIRED, "expired")
    assert second.said["message"].startswith("no slot of big was free")
    assert record.ended_at - record.submitted_at < 1200
    await world.submit("big")
    assert (await third.record()).submitted_at > record.submitted_at


async def test_a_promoted_job_frees_its_place(world: World) -> None:
    await world.apply(
        {
            "big": simulated(maxConcurrent=1, maxQueue=1, coldStartBudgetMs=300, fallback="small"),
            "small": simulated(maxConcurrent=4),
        }
    )
    await world.scheduler()
    await world.warm_host()
    await world.runtime("big").break_with(stall_after_tokens=1)
    await (await world.submit("big", tokens=9)).until_state(State.STREAMING)
    waits = await world.submit("big")
    spilled = await world.submit("big")
    assert (waits.lane, spilled.lane) == ("big", "small")

    record = await waits.end()

    assert (record.served_by, record.promotions) == ("small@gpu1", 1)
    assert (await world.submit("big")).lane == "big"


async def test_interactive_work_goes_first_and_one_slot_is_kept_for_it(world: World) -> None:
    """Batch never delays a person: with two slots it gets one, and the other only when nobody has asked lately."""
    await world.apply({"big": simulated(maxConcurrent=2, maxQueue=20, options={"decodeTps": 100})})
    await world.warm_host()
    await (await world.submit("big")).end()  # interactive work lately
    batch = [await world.submit("big.batch", tokens=20) for _ in range(4)]
    await batch[0].until_state(State.STREAMING)

    people = [await world.submit("big", tokens=20) for _ in range(2)]
    records = await asyncio.gather(*(ask.end() for ask in people))
    assert all(record.state is State.DONE for record in records)
    assert {record.priority for record in records} == {"interactive"}
    last = await asyncio.gather(*(ask.end() for ask in batch))

    assert {record.priority for record in last} == {"batch"}
    assert records[0].claimed_at < last[1].claimed_at, "a batch job overtook a person's"
    assert records[1].claimed_at <= last[1].claimed_at
    by_claim = sorted(last, key=lambda record: record.claimed_at)
    for before, after in itertools.pairwise(by_claim):
        assert before.ended_at <= after.claimed_at, "batch work took the slot that is kept for people"

    async def told() -> bool:
        return (await world.model("big")).slots_kept == 1

    await eventually(told, what="the worker tells so")


async def test_an_urgent_job_overtakes_an_older_one(world: World) -> None:
    """Earliest deadline first among those that would miss it, age among the others."""
    await world.apply({"big": simulated(maxConcurrent=1, maxQueue=20, fallback="small"), "small": simulated()})
    await world.warm_host()
    await world.runtime("big").break_with(first_token_delay_ms=1000, times=1)
    await (await world.submit("big")).until_state(State.CLAIMED)

    old, older = [await world.submit("big") for _ in range(2)]
    urgent = await world.submit("big", promote_within_ms=1500)
    most_urgent = await world.submit("big", promote_within_ms=1400)
    records = await asyncio.gather(*(ask.end() for ask in (most_urgent, urgent, old, older)))

    assert {record.served_by for record in records} == {"big@gpu1"}
    claimed = [record.claimed_at for record in records]
    assert claimed == sorted(claimed), claimed


async def test_the_streams_and_the_records_tell_the_same_at_any_moment(world: World) -> None:
    """The waiting count from the stream is the number of records in state queued, in the middle of a busy run."""
    await world.apply(
        {
            "big": simulated(maxConcurrent=2, maxQueue=10, coldStartBudgetMs=100, fallback="small"),
            "small": simulated(maxConcurrent=2, maxQueue=30, options={"decodeTps": 300}),
        }
    )
    await world.scheduler()
    await world.warm_host()
    await world.runtime("big").break_with(first_token_delay_ms=40)
    asks: list[Ask] = []

    async def client() -> None:
        for _ in range(12):
            try:
                asks.append(ask := await world.submit("big", tokens=4))
            except errors.LaneFull:
                continue
            if len(asks) % 5 == 0:
                await asyncio.gather(jobs.cancel(world.store, ask.job_id), return_exceptions=True)
            await ask.end()

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client()) for _ in range(14)]
        looks = 0
        while not all(task.done() for task in clients):
            found = violations(await take(world.store))
            assert not found, "\n".join(found)
            looks += 1
            await asyncio.wait(clients, timeout=0.02)

    assert looks >= 10
    ended = Counter([(await ask.record()).state for ask in asks])
    assert ended.keys() <= {State.DONE, State.CANCELLED} and ended[State.DONE] > 80, ended


async def test_a_job_that_comes_back_is_a_user_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last attempt may still be ending when it is claimed again; one slot must not become two jobs."""
    await world.apply({"big": simulated(maxConcurrent=2, options={"decodeTps": 30})})
    host = await world.warm_host()
    release = jobs.release
    old_goes = asyncio.Event()

    async def slow_release(*args: Any, **more: Any) -> str:
        where = await release(*args, **more)
        await until(lambda: len(host.dispatcher.attempts) == 2, what="the job is claimed again")
        old_goes.set()
        return where

    monkeypatch.setattr(jobs, "release", slow_release)
    await world.runtime("big").break_with(error_status=503, times=1)
    ask = await world.submit("big", tokens=20)
    await asyncio.wait_for(old_goes.wait(), 5)
    await until(lambda: len(host.dispatcher.attempts) == 1, what="the old attempt is over")

    slots = host.residents.wakers["big"].slots
    assert (len(slots.using), slots.free) == (1, 1)
    assert (await ask.end()).attempt == 2
    await until(lambda: slots.idle, what="both slots are free again")


async def test_a_lost_job_that_this_worker_claims_again_does_not_upset_it(world: World) -> None:
    """A worker that slept through its leases finds its own job waiting again while the old attempt still runs."""
    await world.apply({"big": simulated(maxConcurrent=2)})
    host = await world.warm_host()
    await world.runtime("big").break_with(stall_after_tokens=1, times=1)
    ask = await world.submit("big", stream=False, tokens=5)
    await ask.until_state(State.STREAMING)
    key = world.store.keys.job(ask.job_id)
    await world.store.command("HSET", key, "lease_until", "1")

    assert await lanes.recover(world.store, await ask.record(), max_losses=3)
    record = await ask.end()

    assert (record.state, record.attempt) == (State.DONE, 2)
    assert len(host.dispatcher.attempts) == 1, "the old attempt has not heard yet"

    async def old_one_stopped() -> bool:
        return not host.dispatcher.attempts

    await eventually(old_one_stopped, what="the renewal tells the old attempt")
    assert (await (await world.submit("big")).end()).state is State.DONE
