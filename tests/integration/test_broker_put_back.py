"""A running batch job goes back to its lane for interactive work: counted, bounded, and nothing of it is lost."""

import pytest

from broker import errors, jobs, lanes
from broker.jobs import PUT_BACK_LEFT_MS, PUT_BACK_MAX
from broker.lifecycle import State
from tests.support.broker_world import World

LONG = {"lane": "big.batch", "mode": "async", "give_up_within_ms": 600_000}


async def test_it_waits_again_as_it_did_before(world: World) -> None:
    """No loss, its old instants, a new entry that every worker sees, nothing of the answer; its attempt is over."""
    job_id = await world.submit(**LONG)
    was = await world.job(job_id)
    held = await world.stream(job_id, b"one", b"two")
    world.now += 5_000

    await jobs.put_back(world.store, held)

    job = await world.job(job_id)
    assert (job.state, job.put_backs, job.losses, job.attempt, job.first_token_at) == (State.QUEUED, 1, 0, 1, 0)
    assert (job.submitted_at, job.give_up_at) == (was.submitted_at, was.give_up_at)
    assert job.entry != was.entry and not await world.log(job_id)
    figures = {figure: amount for (_, figure), amount in (await world.healthy()).counted().items()}
    assert figures == {"put_back": 1, "running_ms": 5_000}
    for late in (jobs.emit(world.store, held, 3, b"three"), jobs.end(world.store, held, "finish", seq=2)):
        async with world.refused(errors.StaleAttempt):
            await late
    again = await world.stream(job_id, b"one")
    await jobs.end(world.store, again, "finish", seq=1)
    assert (await world.job(job_id)).state is State.DONE


async def test_so_often_and_no_more(world: World) -> None:
    job_id = await world.submit(**LONG)
    for count in range(1, PUT_BACK_MAX + 1):
        await jobs.put_back(world.store, await world.claim(job_id))
        assert (await world.job(job_id)).put_backs == count
    waiting = await world.waiting(job_id)
    claimed = await lanes.claim(world.store, world.book.active, waiting, host="gpu1", boot="boot1")
    assert claimed.record.put_backs == PUT_BACK_MAX, "its worker knows, and need not ask"
    held = jobs.Holding(job_id, "big.batch", claimed.attempt, "boot1")
    async with world.refused(errors.NotPutBack):
        await jobs.put_back(world.store, held)
    assert (
        await jobs.release(world.store, held, loss=False, max_losses=3, error=errors.WorkerLost("drains")) == "queued"
    )
    assert (await world.job(job_id)).put_backs == PUT_BACK_MAX, "a drain is no put-back"


async def test_one_that_would_give_up_soon_runs_on(world: World) -> None:
    """It waits no longer for having run: put back, it would be expired for having made way."""
    job_id = await world.submit(**LONG)
    held = await world.claim(job_id)
    world.now += 600_000 - PUT_BACK_LEFT_MS + 1
    async with world.refused(errors.NotPutBack):
        await jobs.put_back(world.store, held)
    world.now -= 1
    await jobs.put_back(world.store, held)


@pytest.mark.parametrize("seen", ["at its submit", "by a reader that came late"])
async def test_what_a_client_has_seen_is_not_taken_back(world: World, seen: str) -> None:
    reader = {"mode": "sync", "stream": True, "reader": "api1/r1"} if seen == "at its submit" else {}
    job_id = await world.submit(**LONG | reader)
    held = await world.claim(job_id)
    if seen != "at its submit":
        await jobs.attach(world.store, job_id, reader="api1/r1", lease_ms=10_000, sees=True)
    await jobs.first_token(world.store, held, b"one")
    async with world.refused(errors.BadTransition):
        await jobs.put_back(world.store, held)
    await jobs.emit(world.store, held, 2, b"two")


async def test_one_that_was_told_nothing_yet_goes_back_whoever_reads(world: World) -> None:
    job_id = await world.submit(**LONG | {"mode": "sync", "stream": True, "reader": "api1/r1"})
    await jobs.put_back(world.store, await world.claim(job_id))
    assert (await world.job(job_id)).state is State.QUEUED


async def test_one_that_ended_meanwhile_has_ended(world: World) -> None:
    job_id = await world.submit(**LONG)
    held = await world.stream(job_id)
    await jobs.end(world.store, held, "finish", seq=1)
    async with world.refused(errors.AlreadyEnded):
        await jobs.put_back(world.store, held)


async def test_whose_worker_is_lost_meanwhile_goes_back_once(world: World) -> None:
    """Whoever comes first, its lease or the put-back: it waits once, and the other is refused."""
    lost, put_back = await world.submit(**LONG), await world.submit(**LONG)
    holds = {job_id: await world.claim(job_id) for job_id in (lost, put_back)}
    await jobs.put_back(world.store, holds[put_back])
    world.now += lanes.JOB_LEASE_MS
    async with world.refused(errors.BadTransition):
        await world.recover(put_back)
    assert await world.recover(lost)
    async with world.refused(errors.StaleAttempt):
        await jobs.put_back(world.store, holds[lost])
    counts = {job_id: await world.job(job_id) for job_id in (lost, put_back)}
    assert [(job.losses, job.put_backs) for job in counts.values()] == [(1, 0), (0, 1)]
    await world.healthy()
