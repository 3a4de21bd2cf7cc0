"""A job that its client comes back to by its id: no retry is led to it, and it can be deleted before its time."""

import pytest

from broker import errors, jobs, lanes
from broker.lifecycle import State
from broker.records import JobRecord
from tests.support.broker_world import World
from tests.support.invariants import take

BODY = b'{"model":"big"}'


async def submitted(world: World, **fields: object) -> JobRecord:
    """A job in lane big that an SDK sent, read by api1/r."""
    record = JobRecord(id=world.new_id(), asked="big", mode="async", session="s", keep_ms=60_000, **fields)  # type: ignore[arg-type]
    lane = world.book.active.lane("big")
    assert lane is not None
    await lanes.submit(
        world.store, world.book.active, world.fleet, record, lane, BODY, reader="api1/r", retried=True
    )  # fmt: skip
    return record


async def found_by_a_retry(world: World, job: JobRecord) -> str:
    found = await lanes.rejoin(world.store, job, BODY, reader="api1/again")
    return found.job_id if found else ""


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_retry_is_led_to_what_its_client_was_not_told_of(world: World, comes_back: bool) -> None:
    job = await submitted(world)
    assert await found_by_a_retry(world, job) == ""  # its client is being told just now
    await jobs.detach(world.store, job.id, reader="api1/r", comes_back=comes_back)
    assert await found_by_a_retry(world, job) == ("" if comes_back else job.id)
    await world.healthy()


async def test_of_two_alike_the_one_that_was_told_stays_its_clients_own(world: World) -> None:
    told, untold = await submitted(world), await submitted(world)
    await jobs.detach(world.store, untold.id, reader="api1/r")
    await jobs.detach(world.store, told.id, reader="api1/r", comes_back=True)
    assert await found_by_a_retry(world, told) == untold.id
    await jobs.detach(world.store, told.id, reader="api1/r", comes_back=True)  # a repeat after a lost reply
    await world.healthy()


async def test_a_job_is_forgotten_only_after_its_end(world: World) -> None:
    waits = await world.submit(mode="async")
    async with world.refused(errors.NotDue):
        await jobs.forget(world.store, waits)
    await world.warm(big=5)
    held = await world.stream(waits, b"1")
    async with world.refused(errors.NotDue):
        await jobs.forget(world.store, waits)
    await jobs.end(world.store, held, "finish", seq=2, data=b"2")
    before = await take(world.store)
    await jobs.forget(world.store, waits)
    left = await take(world.store)
    assert {name for name in before.keys if name not in left.keys} == {
        world.store.keys.job(waits),
        world.store.keys.request(waits),
        world.store.keys.frames(waits),
    }
    async with world.refused(errors.NoSuchJob):
        await jobs.forget(world.store, waits)
    async with world.refused(errors.NoSuchJob):
        await jobs.emit(world.store, held, 3, b"late")
    await world.healthy()


async def test_its_idempotency_key_is_free_again_and_another_jobs_is_not(world: World) -> None:
    first = await world.submit(mode="async", key="k")
    await world.warm(big=5)
    await jobs.end(world.store, await world.stream(first, b"1"), "finish", seq=2, data=b"2")
    assert await world.submit(key="k") == first
    await jobs.forget(world.store, first)
    second = await world.submit(mode="async", key="k")
    assert second != first
    await jobs.cancel(world.store, second)  # frees the key
    third = await world.submit(mode="async", key="k")
    await jobs.forget(world.store, second)
    assert await world.submit(key="k") == third
    assert (await world.job(third)).state is State.QUEUED
    await world.healthy()


async def test_an_answer_that_nobody_heard_is_handed_out_no_more(world: World) -> None:
    job = await submitted(world)
    await jobs.detach(world.store, job.id, reader="api1/r")
    await world.warm(big=5)
    await jobs.end(world.store, await world.stream(job.id, b"1"), "finish", seq=2, data=b"2")
    await jobs.forget(world.store, job.id)
    assert await found_by_a_retry(world, job) == ""
    await world.healthy()
