"""A half-told answer that another attempt goes on with: what stands, who may take it, how long it waits."""

import json

import pytest

from broker import errors, jobs, lanes
from broker.jobs import GoOn, Holding
from broker.lifecycle import State
from broker.records import JobRecord
from tests.integration.test_broker_frames import read_on, told
from tests.support.broker_world import World, hub_of, policy_with, stale, turns

LOST = errors.RuntimeFailed("the runtime closed the connection")
WITHIN_MS = 2_000


async def half_told(world: World, *frames: bytes, silent: bool = False, **fields: object) -> tuple[str, Holding]:
    """A job whose client has heard these frames and whose first worker is lost."""
    job_id = await world.submit(**{"stream": True, "reader": "api1/r1", **fields})  # type: ignore[arg-type]
    frames = frames or (b"one", b"two")
    held = await world.stream(job_id, *frames)
    go_on = GoOn(len(frames), WITHIN_MS)
    if silent:
        world.now += lanes.JOB_LEASE_MS
        assert await world.recover(job_id, go_on=go_on)
    else:
        assert await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST, go_on=go_on) == "queued"
    return job_id, held


@pytest.mark.parametrize("silent", [False, True])
async def test_what_a_client_has_seen_stands_and_the_next_attempt_counts_on(world: World, silent: bool) -> None:
    job_id, old = await half_told(world, silent=silent)
    job = await world.job(job_id)
    assert (job.state, job.continues, job.losses, job.last_seq) == (State.QUEUED, 1, 1, 2)
    assert job.first_token_at > 0
    s = await world.healthy()
    assert s.due[job_id] == job.continue_by == world.now + WITHIN_MS

    held = await world.claim(job_id, host="gpu2")
    assert (held.attempt, (await world.job(job_id)).last_seq) == (2, 2)
    await world.healthy()
    async with world.refused(errors.FrameGap):
        await jobs.first_token(world.store, held, b"one")  # as if nothing had been said
    await jobs.first_token(world.store, held, b"three", seq=3)
    await jobs.first_token(world.store, held, b"three", seq=3)
    await jobs.emit(world.store, held, 4, b"four")
    async with world.refused(errors.StaleAttempt):
        await jobs.emit(world.store, stale(held, 1), 3, b"x")
    await jobs.end(world.store, held, "finish", seq=5, data=b"five")
    log = await world.log(job_id)
    assert [f.id for f in log] == ["1-1", "1-2", "2-3", "2-4", "2-5", "2-6"]
    assert b"".join(f.data for f in log[:-1]) == b"onetwothreefourfive"
    done = await world.job(job_id)
    assert (done.state, done.first_token_at) == (State.DONE, job.first_token_at)
    assert old.attempt == 1
    await world.healthy()


async def test_the_claim_tells_from_where_to_go_on(world: World) -> None:
    job_id, _ = await half_told(world)
    waiting = await world.waiting(job_id)
    claimed = await lanes.claim(world.store, world.book.active, waiting, host="gpu2", boot="b")
    assert (claimed.record.continues, claimed.record.last_seq, claimed.attempt) == (1, 2, 2)
    assert (await world.job(job_id)).continue_by == 0


async def test_an_answer_that_ends_with_its_next_frame_ends_in_one_step(world: World) -> None:
    job_id, _ = await half_told(world)
    held = await world.claim(job_id)
    async with world.refused(errors.BadTransition):
        await jobs.end(world.store, held, "finish", seq=1, data=b"x")
    await jobs.end(world.store, held, "finish", seq=3, data=b"three")
    assert [f.id for f in await world.log(job_id)] == ["1-1", "1-2", "2-3", "2-4"]
    await world.healthy()


async def test_a_judgement_on_an_older_log_does_not_count(world: World) -> None:
    """A worker that is only slow says one more word between the look and the script: it is decided again."""
    job_id = await world.submit(stream=True, reader="api1/r1")
    held = await world.stream(job_id, b"one", b"two")
    async with world.refused(errors.Moved):
        await jobs.release(
            world.store, held, loss=True, max_losses=3, error=LOST, go_on=GoOn(last_seq=1, within_ms=WITHIN_MS)
        )
    world.now += lanes.JOB_LEASE_MS
    async with world.refused(errors.Moved):
        await world.recover(job_id, go_on=GoOn(last_seq=1, within_ms=WITHIN_MS))
    assert await world.recover(job_id, go_on=GoOn(last_seq=2, within_ms=WITHIN_MS))


async def test_what_nobody_has_seen_starts_again_whatever_was_judged(world: World) -> None:
    job_id = await world.submit(stream=False, reader="api1/r1")
    held = await world.stream(job_id, b"one", b"two")
    go_on = GoOn(last_seq=2, within_ms=WITHIN_MS)
    assert await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST, go_on=go_on) == "queued"
    job = await world.job(job_id)
    assert (job.continues, job.continue_by, job.first_token_at) == (0, 0, 0)
    assert (await world.healthy()).log(job_id) == []


async def test_no_other_model_finishes_the_sentence(world: World) -> None:
    job_id, _ = await half_told(world)
    async with world.refused(errors.BadTransition):
        await world.promote(job_id, "small")
    held = await world.claim(job_id)
    async with world.refused(errors.BadTransition):
        await world.promote(job_id, "small")
    world.now += 1_000_000
    assert (await world.due.look(job_id, hasten=True)).outcome == "lost"
    assert held.attempt == 2


async def test_no_answer_goes_on_out_of_the_machine(world: World) -> None:
    """The policy makes its model remote while it waits. Whatever its request may: nobody has judged the answer."""
    job_id, _ = await half_told(world, zone="remote")
    await world.apply(policy_with(("weights-big\n", "weights-big\n    trust: remote\n")))
    job = await world.job(job_id)
    args = [world.book.active.version, job.lane, job.entry, world.rules("big"), "hash", "{}"]
    await world.store.run("judge", [world.store.keys.job(job_id), world.store.keys.policy], args)
    async with world.refused(errors.TrustZoneRefused):
        await world.claim(job_id)
    world.now += WITHIN_MS
    assert (await world.due.look(job_id)).outcome == "expired"
    assert (await world.job(job_id)).error == "worker_lost"
    await world.healthy()


async def test_the_wait_to_go_on_has_its_own_end(world: World) -> None:
    """Neither the cold-start deadline nor the give-up instant count any more: they may have passed long ago."""
    job_id, _ = await half_told(world, give_up_within_ms=1, silent=True)
    assert (await world.due.look(job_id)).outcome == "not_due"
    assert (await world.due.look(job_id, hasten=True)).outcome == "not_due"
    world.now += WITHIN_MS - 1
    async with world.refused(errors.NotDue):
        await lanes.expire(world.store, await world.job(job_id), LOST)  # type: ignore[arg-type]
    world.now += 1
    assert (await world.due.look(job_id)).outcome == "expired"
    job = await world.job(job_id)
    last = (await world.log(job_id))[-1]
    assert (job.state, job.error, last.id, last.kind) == (State.EXPIRED, "worker_lost", "1-3", "expired")
    assert json.loads(last.data)["code"] == "worker_lost"
    await world.healthy()


async def test_a_second_loss_before_another_word_goes_on_from_the_same_place(world: World) -> None:
    job_id, _ = await half_told(world)
    held = await world.claim(job_id)
    world.now += 5_000
    async with world.refused(errors.BadTransition):
        await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST)
    go_on = GoOn(2, WITHIN_MS)
    assert await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST, go_on=go_on) == "queued"
    job = await world.job(job_id)
    assert (job.continues, job.last_seq, job.continue_by) == (2, 2, world.now + WITHIN_MS)
    held = await world.claim(job_id)
    await jobs.first_token(world.store, held, b"three", seq=3)
    assert [f.id for f in await world.log(job_id)] == ["1-1", "1-2", "3-3"]
    await world.healthy()


async def test_losses_end_it_too(world: World) -> None:
    job_id, _ = await half_told(world)
    held = await world.claim(job_id)
    go_on = GoOn(2, WITHIN_MS)
    assert await jobs.release(world.store, held, loss=True, max_losses=1, error=LOST, go_on=go_on) == "failed"
    assert (await world.log(job_id))[-1].id == "2-3"
    await world.healthy()


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_cancel_while_it_waits_to_go_on(world: World, claimed: bool) -> None:
    async with hub_of(world) as hub:
        job_id, _ = await half_told(world)
        if claimed:
            await world.claim(job_id)
        reader = hub.open(job_id, after=(1, 2))
        await jobs.cancel(world.store, job_id)
        assert told(await read_on(reader)) == [f"{1 + claimed}-3 cancelled"]
        assert told(await read_on(hub.open(job_id)))[2:] == [f"{1 + claimed}-3 cancelled"]
        await turns(20)  # fakeredis swallows a cancellation that comes with its last message
    await world.healthy()


async def test_a_reader_hears_no_seam(world: World) -> None:
    """Whoever follows by messages, reads late, resumes before or behind the seam, or slept through all of it."""
    async with hub_of(world) as hub:
        job_id = await world.submit(reader="api1/r", stream=True)
        live, idle = hub.open(job_id), hub.open(job_id)
        held = await world.stream(job_id, b"one", b"two")
        assert [(await live.next(timeout_s=5)).id for _ in range(2)] == ["1-1", "1-2"]  # type: ignore[union-attr]
        await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST, go_on=GoOn(2, WITHIN_MS))
        again = await world.claim(job_id, host="gpu2")
        await jobs.first_token(world.store, again, b"three", seq=3)
        assert (await live.next(timeout_s=5)).id == "2-3"  # type: ignore[union-attr]
        await jobs.emit(world.store, again, 4, b"four")
        await jobs.end(world.store, again, "finish")
        rest = ["2-3 content", "2-4 content", "2-5 done"]
        assert told(await read_on(live)) == rest[1:]
        assert told(await read_on(idle)) == ["1-1 content", "1-2 content", *rest]
        for after, expected in (((1, 1), ["1-2 content", *rest]), ((1, 2), rest), ((2, 3), rest[1:])):
            assert told(await read_on(hub.open(job_id, after=after))) == expected


async def test_who_has_more_than_the_log_is_told_that_it_began_again(world: World) -> None:
    """Redis lost what this reader has been given: what follows does not fit behind it."""
    job_id, _ = await half_told(world)
    held = await world.claim(job_id)
    await jobs.first_token(world.store, held, b"three", seq=3)
    await jobs.end(world.store, held, "finish")
    async with hub_of(world) as hub:
        assert told(await read_on(hub.open(job_id, after=(1, 7))))[0] == "restarted 2"


async def test_whoever_missed_a_new_begin_is_told_although_the_number_fits(world: World) -> None:
    """Attempt 2 began anew, unseen, and broke off behind as many frames; attempt 3 goes on from those."""
    job_id = await world.submit(reader="api1/r", stream=True, mode="async")
    held = await world.stream(job_id, b"one", b"two")
    await jobs.release(world.store, held, loss=True, max_losses=3, error=LOST)
    await world.stream(job_id, b"uno", b"dos")
    async with hub_of(world) as hub:
        reader = hub.open(job_id, after=(1, 2))
        reader._look = False  # it believes that it has heard everything
        hub._heard("", f"{job_id} 3-3 content\ntres".encode())
        found = told([x for x in [await reader.next(timeout_s=5)] if x])
        assert found == ["restarted 2"]


def test_the_record_tells_clients_that_it_went_on() -> None:
    told = JobRecord(id="a", continues=2, continue_by=5).public()
    assert (told["continues"], told["continue_by"]) == (2, 5)
