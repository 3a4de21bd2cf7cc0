"""When those who wait are told that their first token should come: all lanes of a model share its slots."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from broker import hosts, looks
from broker.records import ModelOnHost
from broker.snapshots import Snapshots
from broker.status import JobStatus
from broker.waits import Waits
from tests.support.broker_world import World, fake_world

POLICY = """
models:
  small:
    backend: simulated
    model: weights-small
    maxConcurrent: 3
    maxQueue: 400
lanes:
  edits:
    target: small
    maxQueue: 400
  night:
    target: small
    priority: batch
    maxQueue: 400
  tests:
    target: small
    priority: batch
    maxQueue: 400
"""


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    """A job holds a slot for 4.5 s, and its first token takes 100 ms."""
    async with fake_world() as world:
        await world.apply(POLICY)
        await hosts.learn(world.store, "small", service_ms=4_500)
        yield world


async def beat(world: World, *, slots: int = 3, kept: int = 0) -> None:
    there = ModelOnHost(state="warm", slots_total=slots, slots_kept=kept, first_token_ewma_ms=100)
    await world.tell("gpu1", {"small": there})


async def fill(world: World, lane: str, count: int, **fields: int | str) -> list[str]:
    """Lets jobs in, each a moment after the one before."""
    found = []
    for _ in range(count):
        world.now += 1
        found.append(await world.submit(lane, **fields))
    return found


async def run(world: World, lane: str, count: int, **fields: int | str) -> None:
    """Lets jobs in that take a slot each."""
    for job_id in await fill(world, lane, count, **fields):
        await world.claim(job_id)


async def told(world: World, job_id: str) -> int | None:
    """The time that a job's own page tells; the snapshot of the same moment must tell the same."""
    snapshot = await Snapshots(world.store, world.book, world.fleet).latest()
    wait = await Waits(world.store, world.book, world.fleet).of(await world.job(job_id))
    shown = {job.id: job for lane in snapshot.lanes for job in lane.jobs}
    assert wait is not None and wait.first_token_in_ms == shown[job_id].first_token_in_ms
    return wait.first_token_in_ms


async def test_batch_work_waits_for_all_people_of_its_model_and_for_the_slot_kept_for_them(world: World) -> None:
    """Six people go before it, on three slots; then two slots must be free, and that one of three stays free."""
    await beat(world, kept=1)
    await run(world, "small", 3)
    await fill(world, "small", 4)
    first, second = await fill(world, "night", 2)
    late = await fill(world, "edits", 2)
    assert await told(world, first) == 3 * 4_500 + 100
    assert await told(world, second) == 3.5 * 4_500 + 100
    assert await told(world, late[0]) == 5 * 1_500 + 100


async def test_the_slot_kept_for_people_is_not_free_for_batch_work(world: World) -> None:
    await beat(world, kept=1)
    await run(world, "night", 2)
    (job,) = await fill(world, "night", 1)
    assert await told(world, job) == 4_500 / 2 + 100
    (person,) = await fill(world, "small", 1)
    assert await told(world, person) == 100


async def test_lanes_of_one_model_share_its_slots_by_age(world: World) -> None:
    await beat(world)
    await run(world, "small", 3)
    first, *_ = await fill(world, "edits", 16)
    (job,) = await fill(world, "small", 1)
    assert await told(world, job) == 17 * 1_500 + 100
    assert await told(world, first) == 1_500 + 100


async def test_batch_work_in_an_interactive_lane_goes_behind_people_of_that_lane_too(world: World) -> None:
    """Its key says that it is batch work, wherever it asks."""
    await beat(world)
    await run(world, "small", 3)
    (job,) = await fill(world, "small", 1, priority="batch")
    (person,) = await fill(world, "small", 1)
    assert (await told(world, person), await told(world, job)) == (1_500 + 100, 2 * 1_500 + 100)


async def test_whose_caller_runs_all_that_it_may_is_told_no_time(world: World) -> None:
    """Its turn comes when one of its caller's ends, and others may go before it."""
    await beat(world)
    ours = await fill(world, "night", 2, caller="ci", max_running=1)
    (other,) = await fill(world, "night", 1)
    assert [await told(world, job) for job in ours] == [100, None]
    await world.claim(ours[0])
    assert await told(world, ours[1]) is None
    assert await told(world, other) == 100


async def test_a_lane_that_is_longer_than_the_look_at_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind all people of a lane is a number; among those that nobody looked at is none."""
    monkeypatch.setattr(looks, "TOLD_INTERACTIVE", 4)
    await beat(world)
    await run(world, "small", 3)
    (early,) = await fill(world, "edits", 1)
    await fill(world, "small", 6)
    (late,) = await fill(world, "edits", 1)
    (job,) = await fill(world, "night", 1)
    snapshot = await Snapshots(world.store, world.book, world.fleet).latest()
    shown: dict[str, JobStatus] = {job.id: job for lane in snapshot.lanes for job in lane.jobs}
    assert [shown[one].first_token_in_ms for one in (early, late, job)] == [1_600, None, 9 * 1_500 + 100]
