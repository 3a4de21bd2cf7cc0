"""What moves or ends a job from outside: promotion, giving up, cancel, readers that come and go, and the due look."""

import asyncio
from dataclasses import replace

import pytest

from broker import errors, jobs, lanes
from broker.due import Due
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import ModelOnHost
from broker.store import Store
from tests.support.broker_world import World, heard_on, policy_with, real_world
from tests.support.invariants import take
from tests.support.redis_server import RedisServer
from tests.support.worker_world import eventually


@pytest.mark.parametrize("held", [False, True])
async def test_promotion_moves_the_job_and_fences_its_worker(world: World, held: bool) -> None:
    """One entry, in the fallback, with that lane's budget; the give-up instant stays; the old worker is refused."""
    job_id = await world.submit()
    holding = await world.claim(job_id) if held else None
    world.now += 1_500
    await world.promote(job_id, "small")
    job = await world.job(job_id)
    assert (job.state, job.lane, job.model, job.promotions) == (State.QUEUED, "small", "small", 1)
    assert (job.promote_at, job.give_up_at) == (world.now + 1_000, job.submitted_at + 20_000)
    s = await world.healthy()
    assert not s.lanes["big"].entries
    assert int(s.keys[world.store.keys.model("small")].value[b"wanted_until"]) >= world.now + lanes.WANTED_FOR_MS
    if holding is not None:
        async with world.refused(errors.StaleAttempt):
            await jobs.first_token(world.store, holding, b"late")


async def test_promotion_never_outlives_the_give_up_instant(world: World) -> None:
    job_id = await world.submit(give_up_within_ms=2_500)
    world.now += 2_000
    await world.promote(job_id, "small")
    job = await world.job(job_id)
    assert job.promote_at == job.give_up_at == job.submitted_at + 2_500


async def test_promotion_is_refused(world: World) -> None:
    """Into a full lane, out of the zone, with an old picture, after the first token, after the end."""
    job_id = await world.submit()
    job, active = await world.job(job_id), world.book.active
    small, far = active.policy.lane("small"), active.policy.lane("far")
    assert small is not None and far is not None

    async def promote(picture: object = job, to: object = small) -> None:
        await lanes.promote(world.store, active, world.fleet, picture, to)  # type: ignore[arg-type]

    async with world.refused(errors.TrustZoneRefused):
        await promote(to=far)
    may_leave = await world.job(await world.submit(zone="remote"))
    async with world.refused(errors.TrustZoneRefused):  # by no promotion, whoever allowed it to leave
        await promote(may_leave, to=far)
    await jobs.cancel(world.store, may_leave.id)
    async with world.refused(errors.Moved):
        await promote(replace(job, entry="1-1"))
    async with world.refused(errors.Moved):
        await promote(replace(job, lane="side"))
    async with world.refused(errors.NoSuchJob):
        await promote(replace(job, id="ghost"))
    taken = await world.fill("small")
    async with world.refused(errors.LaneFull):
        await promote()
    await jobs.cancel(world.store, taken[0])
    await world.claim(job_id)
    async with world.refused(errors.StaleAttempt):
        await promote()
    streaming = await world.submit()
    await world.stream(streaming)
    async with world.refused(errors.BadTransition):
        await world.promote(streaming, "small")
    await jobs.cancel(world.store, streaming)
    async with world.refused(errors.AlreadyEnded):
        await world.promote(streaming, "small")


async def test_a_job_that_waited_to_its_end_expires_with_the_reason(world: World) -> None:
    job_id = await world.submit()
    world.now += 19_999
    async with world.refused(errors.NotDue):
        await lanes.expire(world.store, await world.job(job_id), errors.JobExpired("late"))
    job = await world.job(job_id)
    world.now += 1
    await lanes.expire(world.store, job, errors.ColdStartDeadline("it never came"))
    job_now = await world.job(job_id)
    assert (job_now.state, job_now.error, job_now.error_message) == (
        State.EXPIRED, "cold_start_deadline", "it never came",
    )  # fmt: skip
    await world.healthy()
    async with world.refused(errors.AlreadyEnded):
        await lanes.expire(world.store, job, errors.JobExpired("late"))


@pytest.mark.parametrize("state", ["scheduled", "queued", "claimed", "streaming", "put back"])
async def test_cancel_in_every_state(world: World, state: str) -> None:
    later = world.now + 1_000 if state == "scheduled" else 0
    job_id = await world.submit(not_before=later, mode="async" if later else "sync")
    if state in ("streaming", "put back"):
        held = await world.stream(job_id, b"one", b"two")
        if state == "put back":
            await jobs.release(world.store, held, loss=False, max_losses=3, error=errors.WorkerLost("drained"))
    elif state == "claimed":
        await world.claim(job_id)
    was = await jobs.cancel(world.store, job_id, message="not wanted")
    assert was == ("queued" if state == "put back" else state)
    job = await world.job(job_id)
    assert (job.state, job.error_message) == (State.CANCELLED, "not wanted")
    s = await world.healthy()
    assert not s.due and not any(lane.entries for lane in s.lanes.values())
    async with world.refused(errors.AlreadyEnded):
        await jobs.cancel(world.store, job_id)


async def test_cancel_tells_the_worker_that_holds_it(world: World) -> None:
    job_id = await world.submit()
    held = await world.claim(job_id)
    async with heard_on(world, world.store.keys.control_channel("gpu1")) as messages:
        await jobs.cancel(world.store, job_id)
        async with asyncio.timeout(5):
            assert await messages.get() == f"cancel {job_id} {held.attempt}".encode()


async def test_a_reader_keeps_its_job_and_its_leaving_ends_it(world: World) -> None:
    """grace 0: the job lives exactly as long as somebody reads it, whether the reader leaves or just falls silent."""
    job_id = await world.submit(reader="api1/r1", grace_ms=0)
    world.now += 8_000
    await jobs.attach(world.store, job_id, reader="api1/r1", lease_ms=10_000, sees=False)
    assert (await world.job(job_id)).abandon_at == world.now + 10_000
    async with world.refused(errors.NotDue):
        await jobs.cancel(world.store, job_id, only="abandoned")
    assert await jobs.detach(world.store, job_id, reader="api1/r1") == 0
    assert (await world.job(job_id)).abandon_at == world.now
    await world.healthy()
    await jobs.cancel(world.store, job_id, only="abandoned")
    silent = await world.submit(reader="api1/r1", grace_ms=500)
    world.now += 10_500
    assert (await world.due.look(silent)).outcome == "abandoned"
    await world.healthy()


async def test_a_retry_within_the_grace_saves_the_job(world: World) -> None:
    job_id = await world.submit(reader="api1/r1", grace_ms=4_000)
    await jobs.detach(world.store, job_id, reader="api1/r1")
    world.now += 3_999
    assert (await world.due.look(job_id)).outcome in ("not_due", "waits")
    state, attempt, last = await jobs.attach(world.store, job_id, reader="api2/r9", lease_ms=10_000, sees=False)
    assert (state, attempt, last) == ("queued", 0, 0)
    world.now += 1
    assert (await world.due.look(job_id)).outcome in ("not_due", "waits")
    assert set((await world.job(job_id)).apis.split(",")) >= {"api2"}
    await world.healthy()


async def test_a_dead_apis_reader_does_not_delay_the_end(world: World) -> None:
    """Only readers whose lease runs count: when the last of those leaves, the job ends at once."""
    job_id = await world.submit(reader="dead/r1", grace_ms=0)
    world.now += 9_000
    await jobs.attach(world.store, job_id, reader="api2/r2", lease_ms=10_000, sees=False)
    world.now += 2_000
    assert await jobs.detach(world.store, job_id, reader="api2/r2") == 0
    assert (await world.job(job_id)).abandon_at == world.now


async def test_who_says_that_it_leaves_is_gone_though_no_lease_may_be_judged_yet(redis_server: RedisServer) -> None:
    """A scheduler that has just connected judges no lease: whoever fell silent may renew it. But it waits for nobody
    who left since then; who left before that may have come again, and Redis may have forgotten it."""
    async with real_world(redis_server.url) as world:
        await world.apply()
        world.real_time()
        left_before = await world.submit("small", reader="api1/r1", grace_ms=0)
        await jobs.detach(world.store, left_before, reader="api1/r1")
        await the_clock_goes_on(world.store)
        own = await Store.open(redis_server.url, namespace=world.store.keys.namespace, name="scheduler")
        try:
            left, silent, one_left = [await world.submit(reader="api1/r1", grace_ms=0) for _ in range(3)]
            for job_id, reader in ((silent, "api1/r1"), (one_left, "dead/r2")):
                await jobs.attach(world.store, job_id, reader=reader, lease_ms=1, sees=False)
            for job_id in (left, one_left):
                await jobs.detach(world.store, job_id, reader="api1/r1")
            await the_clock_goes_on(world.store)
            due = Due(own, await following(world), world.fleet)
            assert (await due.look(left)).outcome == "abandoned"
            assert [(await due.look(job)).outcome for job in (silent, one_left, left_before)] == ["not_due"] * 3
        finally:
            await own.close()
        assert (await world.job(left)).error_message == "its client went away"


async def the_clock_goes_on(store: Store) -> None:
    """Returns some milliseconds later by Redis's clock."""
    end = await store.now_ms() + 5

    async def over() -> bool:
        return await store.now_ms() >= end

    await eventually(over, what="5 ms")


async def test_leaving_twice_or_without_having_come_changes_nothing(world: World) -> None:
    job_id = await world.submit(reader="api1/r1", grace_ms=1_000)
    before = await take(world.store)
    assert await jobs.detach(world.store, job_id, reader="api1/never") == 1
    assert not before.marks(await take(world.store))
    await jobs.detach(world.store, job_id, reader="api1/r1")
    world.now += 500
    before = await take(world.store)
    assert await jobs.detach(world.store, job_id, reader="api1/r1") == 0
    assert not before.marks(await take(world.store))


async def test_readers_of_one_job_are_bounded_and_the_silent_do_not_count(world: World) -> None:
    job_id = await world.submit(mode="async")
    for n in range(jobs.MAX_READERS):
        await jobs.attach(world.store, job_id, reader=f"api1/{n}", lease_ms=10_000, sees=False)
    async with world.refused(errors.BadRequest):
        await jobs.attach(world.store, job_id, reader="api1/more", lease_ms=10_000, sees=False)
    await jobs.attach(world.store, job_id, reader="api1/0", lease_ms=10_000, sees=False)
    world.now += 10_001
    await jobs.attach(world.store, job_id, reader="api1/more", lease_ms=10_000, sees=False)
    await world.healthy()


async def test_only_a_streaming_reader_sees(world: World) -> None:
    job_id = await world.submit(stream=True)
    await jobs.attach(world.store, job_id, reader="api1/r1", lease_ms=1_000, sees=False)
    assert not (await world.job(job_id)).seen
    await jobs.attach(world.store, job_id, reader="api1/r2", lease_ms=1_000, sees=True)
    assert (await world.job(job_id)).seen
    assert not (await world.job(await world.submit(stream=False, reader="api1/r1"))).seen
    assert not (await world.job(await world.submit(stream=True, reader="api1/r1", mode="async"))).seen


async def test_an_ended_job_notes_no_reader(world: World) -> None:
    job_id = await world.submit()
    await jobs.cancel(world.store, job_id)
    before = await take(world.store)
    assert await jobs.attach(world.store, job_id, reader="a/1", lease_ms=1, sees=True) == ("cancelled", 0, 1)
    assert await jobs.detach(world.store, job_id, reader="a/1") == 0
    assert not before.marks(await take(world.store))


async def test_an_abandoned_job_with_a_later_start_ends_before_it(world: World) -> None:
    job_id = await world.submit(reader="api1/r1", grace_ms=0, not_before=world.now + 15_000)
    assert (await world.healthy()).due[job_id] == world.now + lanes.READER_LEASE_MS


async def test_a_later_start_does_not_wake_the_model_before(world: World) -> None:
    await world.submit(not_before=world.now + 1_000)
    assert world.store.keys.model("big") not in (await world.healthy()).keys


async def test_the_due_look_promotes_retries_and_expires(world: World) -> None:
    """The whole road of a job whose model never comes: one lane, its fallback, the end of patience."""
    job_id = await world.submit()
    assert (await world.due.look(job_id)).outcome == "not_due"
    assert await world.due.next(limit=9) == ([], 2_000)
    taken = await world.fill("small")
    world.now += 2_000
    assert await world.due.next(limit=1) in (([job_id], 0), ([taken[0]], 0))
    assert (await world.due.look(job_id)).outcome == "waits"  # no host: the fallback would not be sooner
    await world.warm(small=1)
    world.now += 1_000
    looked = await world.due.look(job_id)
    assert (looked.outcome, looked.lane, looked.late_ms) == ("promoted", "small", 1_000)
    await world.warm(small=0)
    other = await world.submit()
    await world.tell("gpu1", {"small": ModelOnHost(state="warm", slots_total=0)})
    world.now += 2_000
    assert (await world.due.look(other)).outcome == "full"
    assert (await world.healthy()).due[other] == world.now + 1_000
    world.now += 20_000
    for job in (job_id, other, *taken):
        assert (await world.due.look(job)).outcome == "expired"
        assert (await world.due.look(job)).outcome == "gone"
    assert not (await world.healthy()).due
    assert (await world.due.look("ghost")).outcome == "gone"


async def test_the_due_look_recovers(world: World) -> None:
    job_id = await world.submit()
    await world.claim(job_id)
    assert (await world.due.look(job_id)).outcome == "not_due"
    world.now += lanes.JOB_LEASE_MS
    assert (await world.due.look(job_id)).outcome == "recovered"
    await world.healthy()


@pytest.mark.parametrize("race", ["expire", "recover", "release_due", "promote"])
async def test_two_schedulers_at_once_are_harmless(world: World, race: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a scheduler's read and its verb anybody may act: the script refuses, and the look says so quietly."""
    job_id = await world.submit(not_before=world.now + 500 if race == "release_due" else 0)
    if race == "recover":
        held = await world.claim(job_id)
    old = await world.job(job_id)
    world.now += {"expire": 20_000, "recover": 10_000, "release_due": 500, "promote": 2_000}[race]
    if race == "expire":
        await world.claim(job_id)
    elif race == "recover":
        await jobs.release(world.store, held, loss=False, max_losses=3, error=errors.WorkerLost("drained"))
    elif race == "release_due":
        assert (await world.due.look(job_id)).outcome == "started"
    else:
        await world.warm(small=2)
        await world.stream(job_id)

    async def old_picture(*_: object) -> object:
        return old

    before = await take(world.store)
    monkeypatch.setattr("broker.jobs.read", old_picture)
    second = Due(world.store, await following(world), world.fleet)
    assert (await second.look(job_id)).outcome == "not_due"
    assert not before.marks(await take(world.store))


async def following(world: World) -> PolicyBook:
    """Another process's picture of the policy."""
    book = PolicyBook(world.store)
    await book.reload()
    return book


async def test_a_promotion_looks_at_zone_context_and_prediction(world: World) -> None:
    text = policy_with(("weights-small\n", "weights-small\n    contextTokens: 100\n"))
    await world.apply(text)
    await world.warm(small=2)
    too_long = await world.submit(tokens=101)
    local = await world.submit("small")
    world.now += 2_000
    assert (await world.due.look(too_long)).outcome == "waits"
    await world.warm("gpu2", boot="b2", far=1)
    await world.warm(small=0)
    assert (await world.due.look(local)).outcome == "waits"
    allowed = await world.submit("small", zone="remote")
    world.now += 1_000
    assert (await world.due.look(allowed)).outcome == "waits", "no promotion leads out of the machine"
    await world.healthy()
