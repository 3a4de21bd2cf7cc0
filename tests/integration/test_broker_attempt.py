"""What a worker does with a job: claim, first token, frames, the end, giving it back; and what a late one may not."""

import json

import pytest

from broker import errors, jobs, lanes
from broker.jobs import Holding
from broker.lifecycle import State
from broker.records import Waiting
from tests.support.broker_world import World, stale
from tests.support.counted import counted
from tests.support.invariants import take

LOST = errors.RuntimeFailed("the runtime closed the connection", status=502)


async def test_an_attempt_from_claim_to_done(world: World) -> None:
    """The straight road: every step leaves its instant, the log ends with its terminal frame, the place is free."""
    job_id = await world.submit(body=b"body", stream=True)
    got = await lanes.claim(world.store, world.book.active, await world.waiting(job_id), host="gpu1", boot="b1")
    assert (got.attempt, got.body, got.record.owner, got.record.state) == (1, b"body", "gpu1", State.CLAIMED)
    assert got.record.lease_until == world.now + lanes.JOB_LEASE_MS
    held = Holding(job_id, "big", got.attempt, "b1")
    await world.healthy()
    world.now += 300
    await jobs.first_token(world.store, held, b"\x00first\xff\n")
    await jobs.emit(world.store, held, 2, b"second")
    await world.healthy()
    world.now += 100
    usage = {"prompt_tokens": 7, "cached_tokens": 5, "completion_tokens": 2}
    await jobs.end(world.store, held, "finish", seq=3, data=b"third", served_by="big@gpu1", usage=usage)
    job, log = await world.job(job_id), await world.log(job_id)
    assert [f"{f.id} {f.kind}" for f in log] == ["1-1 content", "1-2 content", "1-3 content", "1-4 done"]
    assert [f.data for f in log[:3]] == [b"\x00first\xff\n", b"second", b"third"]
    assert (job.first_token_at, job.ended_at, job.served_by) == (world.now - 100, world.now, "big@gpu1")
    assert job.public()["usage"] == usage
    s = await world.healthy()
    assert not s.lanes["big"].entries and not s.due
    figures = {"done/in_time/320": 1, "tokens_in": 7, "tokens_cached": 5, "tokens_out": 2, "running_ms": 400}
    assert await counted(world.store) == {"anonymous:big:big:big": figures}


async def test_an_answer_that_came_whole_begins_and_ends_in_one_step(world: World) -> None:
    """Its first token comes with its end: the record and the log say what they would have said of two steps."""
    claimed = await world.claim(await world.submit(stream=True, reader="api1/r1"))
    world.now += 70
    await jobs.end(world.store, claimed, "finish", seq=1, data=b"all of it", served_by="big@gpu1")
    job, log = await world.job(claimed.job_id), await world.log(claimed.job_id)
    assert (job.state, job.first_token_at, job.ended_at) == (State.DONE, world.now, world.now)
    assert [f"{f.id} {f.kind}" for f in log] == ["1-1 content", "1-2 done"]
    assert log[0].data == b"all of it"
    await world.healthy()


async def test_every_lost_reply_may_be_repeated(world: World) -> None:
    """A worker that did not hear the answer asks again: nothing is logged twice, nothing moves."""
    held = await world.stream(await world.submit(), b"one", b"two", b"three")
    before = await take(world.store)
    await jobs.first_token(world.store, held, b"one")
    for seq in (1, 2, 3):
        await jobs.emit(world.store, held, seq, b"again")
    assert not before.marks(await take(world.store))
    await jobs.end(world.store, held, "finish", seq=3, data=b"three")
    assert [f.data for f in (await world.log(held.job_id))[:3]] == [b"one", b"two", b"three"]
    async with world.refused(errors.AlreadyEnded):
        await jobs.end(world.store, held, "finish", seq=3, data=b"three")


async def test_a_gap_is_refused(world: World) -> None:
    claimed = await world.claim(await world.submit())
    async with world.refused(errors.FrameGap):
        await jobs.emit(world.store, claimed, 1, b"before the first token")
    async with world.refused(errors.FrameGap):
        await jobs.end(world.store, claimed, "fail", seq=2, data=b"x", error=LOST)
    held = await world.stream(await world.submit(), b"one")
    async with world.refused(errors.FrameGap):
        await jobs.emit(world.store, held, 3, b"three")
    async with world.refused(errors.FrameGap):
        await jobs.end(world.store, held, "finish", seq=3, data=b"three")


async def test_a_stale_attempt_changes_nothing(world: World) -> None:
    """Promise 5: the worker that lost its lease is refused in every write, while the next attempt runs and after."""
    job_id = await world.submit()
    old = await world.claim(job_id, lease_ms=1_000)
    world.now += 1_000
    assert await world.recover(job_id)

    async def refused_everywhere(error: type[errors.BrokerError]) -> None:
        for write in (
            lambda: jobs.first_token(world.store, old, b"x"),
            lambda: jobs.emit(world.store, old, 1, b"x"),
            lambda: jobs.end(world.store, old, "fail", error=LOST),
            lambda: jobs.release(world.store, old, loss=True, max_losses=3, error=LOST),
            lambda: jobs.renew(world.store, old, lease_ms=1_000),
        ):
            async with world.refused(error):
                await write()

    await refused_everywhere(errors.StaleAttempt)
    held = await world.stream(job_id, host="gpu2")
    assert held.attempt == 2
    await refused_everywhere(errors.StaleAttempt)
    async with world.refused(errors.StaleAttempt):
        await jobs.renew(world.store, Holding(job_id, "big", 2, "another boot"), lease_ms=1_000)
    await jobs.end(world.store, held, "finish")
    await refused_everywhere(errors.AlreadyEnded)


async def test_a_job_that_nobody_knows_is_named(world: World) -> None:
    ghost = Holding("ghost", "big", 1, "b")
    for write in (
        lambda: jobs.first_token(world.store, ghost, b"x"),
        lambda: jobs.emit(world.store, ghost, 1, b"x"),
        lambda: jobs.end(world.store, ghost, "finish"),
        lambda: jobs.release(world.store, ghost, loss=True, max_losses=3, error=LOST),
        lambda: jobs.renew(world.store, ghost, lease_ms=1),
        lambda: jobs.attach(world.store, "ghost", reader="a/1", lease_ms=1, sees=False),
        lambda: jobs.cancel(world.store, "ghost"),
        lambda: world.job("ghost"),
        lambda: lanes.claim(world.store, world.book.active, Waiting("ghost", "big", "1-1"), host="h", boot="b"),
    ):
        async with world.refused(errors.NoSuchJob) as caught:
            await write()  # type: ignore[no-untyped-call]
        assert "ghost" in str(caught.value)
    assert await jobs.detach(world.store, "ghost", reader="a/1") == 0


async def test_a_claim_takes_exactly_the_job_it_names(world: World) -> None:
    """A worker's picture may be old: the wrong entry, the wrong lane, a job that is held or over are refused."""
    first, second = await world.submit(), await world.submit()
    entry = await world.waiting(second)
    await world.claim(second)
    job = await world.job(first)
    assert (job.state, job.attempt) == (State.QUEUED, 0)
    for wrong, error in (
        (entry, errors.BadTransition),
        (Waiting(first, "big", entry.entry), errors.Moved),
        (Waiting(first, "small", job.entry), errors.Moved),
        (Waiting(first, "nowhere", job.entry), errors.StalePolicy),
    ):
        async with world.refused(error):
            await lanes.claim(world.store, world.book.active, wrong, host="gpu1", boot="b")
    await jobs.cancel(world.store, first)
    async with world.refused(errors.AlreadyEnded):
        await lanes.claim(world.store, world.book.active, Waiting(first, "big", job.entry), host="gpu1", boot="b")


async def test_a_local_job_is_not_claimed_in_a_lane_that_leads_out(world: World) -> None:
    """Promise 7, at its last gate: whatever put the job there, the claim refuses."""
    job_id = await world.submit("far")
    async with world.refused(errors.TrustZoneRefused):
        await world.claim(job_id)
    await world.claim(await world.submit("far", zone="remote"))


async def test_a_local_job_is_not_claimed_for_a_runtime_that_leads_out(world: World) -> None:
    """A model that was remote may be local by the policy already, while its worker still holds the remote runtime."""
    job_id = await world.submit("big")
    waiting, active = await world.waiting(job_id), world.book.active
    async with world.refused(errors.TrustZoneRefused):
        await lanes.claim(world.store, active, waiting, host="gpu1", boot="boot1", runtime=active.models()["far"])
    await lanes.claim(world.store, active, waiting, host="gpu1", boot="boot1")


async def test_a_finish_needs_a_first_token(world: World) -> None:
    """Success is a finish reason after content; an empty answer is a failure that somebody must name."""
    held = await world.claim(await world.submit())
    async with world.refused(errors.BadTransition):
        await jobs.end(world.store, held, "finish")
    await jobs.end(world.store, held, "fail", error=LOST, served_by="big@gpu1")
    [said] = await world.log(held.job_id)
    assert json.loads(said.data) == {"code": "runtime_failed", "message": str(LOST), "status": 502}
    job = await world.job(held.job_id)
    assert (job.error, job.error_message, said.kind) == ("runtime_failed", str(LOST), "failed")
    [dead] = (await world.healthy()).keys[world.store.keys.dead].value.entries
    assert held.job_id.encode() in dead[1]


async def test_a_requests_own_fault_is_not_among_the_dead(world: World) -> None:
    held = await world.claim(await world.submit())
    await jobs.end(world.store, held, "fail", error=errors.RuntimeRefused("bad tools", status=422))
    assert world.store.keys.dead not in (await world.healthy()).keys


async def test_a_released_job_waits_again_as_it_waited_before(world: World) -> None:
    """A new entry that tailing workers see, the old instants, an empty log, and no loss where there was none."""
    job_id = await world.submit(stream=False, reader="api1/r1", grace_ms=0)
    was = await world.job(job_id)
    held = await world.stream(job_id, b"one", b"two")
    assert await jobs.release(world.store, held, loss=False, max_losses=3, error=LOST) == "queued"
    now = await world.job(job_id)
    assert (now.submitted_at, now.promote_at, now.give_up_at) == (was.submitted_at, was.promote_at, was.give_up_at)
    assert now.entry != was.entry and now.losses == 0 and now.first_token_at == 0
    s = await world.healthy()
    assert s.log(job_id) == [] and len(s.lanes["big"].entries) == 1
    assert (await world.claim(job_id)).attempt == 2


async def test_putting_back_into_a_full_lane_takes_the_place_it_held(world: World) -> None:
    await world.warm(big=1)
    held = await world.claim(await world.submit())
    await world.warm(big=0)
    await world.fill("big")
    length = len((await take(world.store)).lanes["big"].entries)
    await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST)
    assert len((await world.healthy()).lanes["big"].entries) == length


async def test_a_seen_answer_cannot_be_given_back(world: World) -> None:
    held = await world.stream(await world.submit(stream=True, reader="api1/r1", grace_ms=0))
    async with world.refused(errors.BadTransition):
        await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST)


async def test_a_seen_job_without_a_first_token_can(world: World) -> None:
    held = await world.claim(await world.submit(stream=True, reader="api1/r1", grace_ms=0))
    assert await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST) == "queued"
    await world.healthy()


async def test_losses_are_counted_and_bounded(world: World) -> None:
    """A poison job ends with the error of its last loss instead of killing workers for ever."""
    job_id = await world.submit()
    for _ in range(2):
        held = await world.claim(job_id)
        assert await jobs.release(world.store, held, loss=True, max_losses=2, error=LOST) == "queued"
    held = await world.claim(job_id)
    assert await jobs.release(world.store, held, loss=True, max_losses=2, error=LOST) == "failed"
    job = await world.job(job_id)
    assert (job.state, job.error, job.losses) == (State.FAILED, "runtime_failed", 3)
    await world.healthy()


async def test_a_drain_ends_no_job_although_the_policy_now_allows_fewer_losses(world: World) -> None:
    """Only a loss can be one too many."""
    job_id = await world.submit()
    for _ in range(2):
        held = await world.claim(job_id)
        await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST)
    held = await world.claim(job_id)
    assert await jobs.release(world.store, held, loss=False, max_losses=1, error=LOST) == "queued"


async def test_renewing_moves_the_lease_and_its_instant(world: World) -> None:
    held = await world.claim(await world.submit(), lease_ms=10_000)
    world.now += 9_000
    await jobs.renew(world.store, held, lease_ms=10_000)
    s = await world.healthy()
    assert s.due[held.job_id] == s.jobs[held.job_id].lease_until == world.now + 10_000
    world.now += 9_999
    async with world.refused(errors.NotDue):
        await world.recover(held.job_id)


@pytest.mark.parametrize("state", ["claimed", "streaming unseen", "streaming seen"])
async def test_a_lost_worker(world: World, state: str) -> None:
    """Its job waits again, unless a client has seen part of the answer: then it ends, and the client is told."""
    seen = state == "streaming seen"
    job_id = await world.submit(stream=seen, reader="api1/r1", grace_ms=LONG_GRACE)
    held = await (world.claim(job_id) if state == "claimed" else world.stream(job_id))
    async with world.refused(errors.NotDue):
        await world.recover(job_id)
    world.now += lanes.JOB_LEASE_MS
    assert await world.recover(job_id) is not seen
    job = await world.job(job_id)
    assert (job.state, job.losses) == (State.FAILED if seen else State.QUEUED, 1)
    if seen:
        last = (await world.log(job_id))[-1]
        assert json.loads(last.data)["code"] == "worker_lost" and "gpu1" in json.loads(last.data)["message"]
    await world.healthy()
    async with world.refused(errors.AlreadyEnded if seen else errors.StaleAttempt):
        await jobs.emit(world.store, stale(held, 1), 2, b"x")
    async with world.refused(errors.AlreadyEnded if seen else errors.BadTransition):
        await world.recover(job_id)


LONG_GRACE = 10**7


async def test_a_worker_lost_too_often(world: World) -> None:
    job_id = await world.submit()
    for _ in range(2):
        await world.claim(job_id)
        world.now += lanes.JOB_LEASE_MS
        await world.recover(job_id, max_losses=1)
    job = await world.job(job_id)
    assert (job.state, job.error) == (State.FAILED, "worker_lost")
    await world.healthy()
