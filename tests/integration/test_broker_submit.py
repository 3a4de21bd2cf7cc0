"""How a job gets in: the queue budget, a lost reply, the Idempotency-Key, the later start."""

import asyncio
from typing import Any

import pytest

from broker import admission, errors, jobs, lanes
from broker.hosts import Fleet
from broker.lifecycle import State
from broker.records import JobRecord, ModelOnHost
from tests.support.broker_world import POLICY, World, policy_with
from tests.support.invariants import take


async def test_a_job_waits_with_its_entry_instants_and_body(world: World) -> None:
    """Everything that the design promises of an accepted job is there before the client hears of it."""
    job_id = await world.submit(reader="api1/r1", grace_ms=0, stream=True, session="s1", tokens=99, body=b"\xff\x00")
    job = await world.job(job_id)
    assert job.state is State.QUEUED
    assert (job.submitted_at, job.promote_at, job.give_up_at) == (world.now, world.now + 2000, world.now + 20_000)
    assert job.abandon_at == world.now + lanes.READER_LEASE_MS
    assert job.seen and job.apis == "api1"
    s = await world.healthy()
    assert s.keys[world.store.keys.request(job_id)].value == b"\xff\x00"
    wanted_for_ms = int(s.keys[world.store.keys.model("big")].value[b"wanted_until"]) - world.now
    assert lanes.WANTED_FOR_MS <= wanted_for_ms <= lanes.WANTED_FOR_MS * 1.25
    [entry] = [w async for w in lanes.waiting_entries(world.store, "big", limit=9)]
    assert (entry.job, entry.session, entry.tokens, entry.promote_at) == (job_id, "s1", 99, job.promote_at)


@pytest.mark.parametrize("key", ["", "k"])
async def test_a_lost_reply_is_harmless(world: World, key: str) -> None:
    """Submitting the same id again answers the same and changes nothing, whatever the lane and however full."""
    await world.submit(id="once", reader="api1/r1", key=key)
    for lane in ("big", "small"):
        await world.fill(lane)
    before = await take(world.store)
    for lane in ("big", "small"):
        assert await world.submit(lane, id="once", reader="api1/r1", key=key) == "once"
    assert not before.marks(await take(world.store))


async def test_a_cold_lane_takes_its_budget_and_no_more(world: World) -> None:
    assert len(await world.fill("big")) == 3
    async with world.refused(errors.LaneFull) as caught:
        await world.submit()
    assert caught.value.lane == "big"  # type: ignore[attr-defined]
    await world.healthy()


async def test_a_budget_of_zero_still_lets_one_in_while_nothing_runs(world: World) -> None:
    """Otherwise a cold lane with maxQueue 0 could never ask for its model."""
    await world.apply(policy_with(("maxQueue: 3", "maxQueue: 0")))
    [first] = await world.fill("big")
    await world.warm(big=1)
    await world.claim(first)
    assert await world.fill("big") == []


async def test_free_slots_widen_the_budget_and_settling_ones_do_not(world: World) -> None:
    await world.warm(big=2)
    assert len(await world.fill("big")) == 5
    told = {"big": ModelOnHost(state="warm", slots_total=4, slots_settling=1)}
    await world.tell("gpu2", told, boot="boot2")
    assert len(await world.fill("big")) == 3
    await world.tell("gpu2", {"big": ModelOnHost(state="waking", slots_total=4)}, boot="boot2")
    assert await world.fill("big") == []


async def test_running_jobs_of_a_sister_lane_use_the_models_slots(world: World) -> None:
    """Two lanes of one model share its slots: `side` must not count the slot that `small` uses."""
    await world.warm(small=1)
    await world.claim(await world.submit("small"))
    assert len(await world.fill("side")) == 1


async def test_sixty_at_once_are_six_and_twelve_and_the_rest_refused(world: World) -> None:
    """Both slots and all four of the fallback are held; the lanes take their budgets exactly, from the records."""
    six, twelve = ("maxQueue: 3", "maxQueue: 6"), ("maxQueue: 2", "maxQueue: 12")
    await world.apply(policy_with(six, twelve, ("fallback: far", "fallback: null")))
    await world.warm(big=2, small=4)
    for lane, slots in (("big", 2), ("small", 4)):
        for _ in range(slots):
            await world.claim(await world.submit(lane))

    async def one() -> str:
        record = JobRecord(id=world.new_id(), asked="big")
        try:
            return (await admission.admit(world.store, world.book, world.fleet, record, b"{}")).lane
        except errors.LaneFull as full:
            assert 1 <= full.retry_after_s <= 30
            return "refused"

    answers = await asyncio.gather(*(one() for _ in range(60)))
    assert {a: answers.count(a) for a in set(answers)} == {"big": 6, "small": 12, "refused": 42}
    s = await world.healthy()
    queued = [job.lane for job in s.jobs.values() if job.state is State.QUEUED]
    assert (queued.count("big"), queued.count("small")) == (6, 12)


async def test_a_retry_with_its_key_finds_the_same_job(world: World) -> None:
    """Live or done, full lane or not, the key leads to the job; its lane does not grow."""
    first = await world.submit(key="k")
    await world.fill("big")
    before = await take(world.store)
    assert await world.submit(key="k") == first
    assert not before.marks(await take(world.store))
    held = await world.stream(first)
    await jobs.end(world.store, held, "finish")
    assert await world.submit(key="k") == first
    assert await world.submit("small", key="k", caller="other") != first
    await world.healthy()


async def test_a_key_with_another_body_or_endpoint_is_refused(world: World) -> None:
    await world.submit(key="k")
    async with world.refused(errors.IdempotencyMismatch):
        await world.submit(key="k", body=b"other")
    async with world.refused(errors.IdempotencyMismatch):
        await world.submit(key="k", zone="remote")
    async with world.refused(errors.IdempotencyMismatch):
        await world.submit(key="k", endpoint="/v1/completions")


@pytest.mark.parametrize("how", ["fail", "cancel", "expire"])
async def test_a_job_that_did_not_get_done_frees_its_key(world: World, how: str) -> None:
    first = await world.submit(key="k")
    if how == "fail":
        await jobs.end(world.store, await world.claim(first), "fail", error=errors.RuntimeFailed("broke"))
    elif how == "cancel":
        await jobs.cancel(world.store, first)
    else:
        world.now += 20_000
        await lanes.expire(world.store, await world.job(first), errors.JobExpired("late"))
    second = await world.submit(key="k")
    assert second != first
    s = await world.healthy()
    assert s.idem(world.store.keys.idem("anonymous", "k")) == second


async def test_a_retry_finds_its_job_even_when_the_model_went_away(world: World) -> None:
    """The job exists; that its model has no host now is no reason to answer the retry with a refusal."""
    await world.warm(big=2)

    async def ask() -> admission.Admitted:
        record = JobRecord(id=world.new_id(), asked="big", keep_ms=600_000)
        return await admission.admit(world.store, world.book, world.fleet, record, b"{}", idempotency_key="k")

    first = await ask()
    world.fleet.picture.on_host.clear()
    again = await ask()
    assert (again.job_id, again.attached) == (first.job_id, True)


async def test_a_key_lives_as_long_as_its_waiting_job(world: World) -> None:
    """keepMs is counted from the end: a job that waits longer than that must not be generated twice."""
    job_id = await world.submit(key="k", keep_ms=1_000)
    ttl_ms = int(await world.store.command("PTTL", world.store.keys.idem("anonymous", "k")))
    job = await world.job(job_id)
    assert ttl_ms == -1 or ttl_ms > job.give_up_at - world.now


async def test_the_key_of_a_done_job_lives_as_long_as_its_record(world: World) -> None:
    """Whoever may still read the answer may also ask for it by its key."""
    job_id = await world.submit(key="k", keep_ms=600_000)
    await jobs.end(world.store, await world.stream(job_id), "finish")
    keys = world.store.keys
    left_ms = [int(await world.store.command("PTTL", k)) for k in (keys.idem("anonymous", "k"), keys.job(job_id))]
    assert all(590_000 < ms <= 600_000 for ms in left_ms), left_ms


async def test_a_host_that_has_just_come_is_looked_for_before_anybody_is_refused(world: World) -> None:
    """The picture of a process is up to half a second old; its word is not enough for a refusal."""
    fleet = Fleet(world.store, world.book)
    await world.warm(big=2)
    record = JobRecord(id=world.new_id(), asked="big")
    assert (await admission.admit(world.store, world.book, fleet, record, b"{}")).lane == "big"


async def test_a_later_start_takes_no_place_until_it_comes(world: World) -> None:
    job_id = await world.submit(not_before=world.now + 5_000, mode="async")
    await world.fill("big")
    assert (await world.job(job_id)).state is State.SCHEDULED
    s = await world.healthy()
    assert s.due[job_id] == world.now + 5_000
    async with world.refused(errors.NotDue):
        job, lane = await world.job(job_id), world.book.active.lane("big")
        assert lane is not None
        await lanes.release_due(world.store, world.book.active, world.fleet, job, lane)
    world.now += 5_000
    assert (await world.due.look(job_id)).outcome == "full"
    assert (await world.healthy()).due[job_id] == world.now + 1_000
    await jobs.cancel(world.store, next(iter(s.lanes["big"].entries))[1][1].decode())
    world.now += 1_000
    assert (await world.due.look(job_id)).outcome == "started"
    assert (await world.job(job_id)).state is State.QUEUED
    await world.healthy()


async def test_a_job_that_starts_later_than_its_lane_would_wait_does_start(world: World) -> None:
    job_id = await world.submit(not_before=world.now + 60_000, mode="async")
    assert (await world.healthy()).due[job_id] == world.now + 60_000


async def test_a_policy_decided_under_and_gone_is_stale(world: World) -> None:
    old = world.book.active
    job = await world.job(await world.submit())
    await world.apply(policy_with(("maxQueue: 3", "maxQueue: 4")))
    lane, small = old.lane("big"), old.lane("small")
    assert lane is not None and small is not None
    async with world.refused(errors.StalePolicy):
        await lanes.submit(world.store, old, world.fleet, JobRecord(id="new"), lane, b"")
    async with world.refused(errors.StalePolicy):
        await lanes.claim(world.store, old, await world.waiting(job.id), host="h", boot="b")
    async with world.refused(errors.StalePolicy):
        await lanes.promote(world.store, old, world.fleet, job, small)


async def test_admission_spills_passes_over_and_says_why(world: World) -> None:
    """Full lanes spill; lanes without a host, out of zone or too short are passed over; the best reason is told."""
    await world.apply(POLICY.replace("weights-small\n", "weights-small\n    contextTokens: 100\n"))

    async def ask(**fields: object) -> str:
        record = JobRecord(**{"id": world.new_id(), "asked": "big"} | fields)  # type: ignore[arg-type]
        return (await admission.admit(world.store, world.book, world.fleet, record, b"{}")).lane

    async with world.refused(errors.ModelUnavailable):
        await ask()
    await world.warm(small=1)
    assert await ask() == "small"
    async with world.refused(errors.ModelUnavailable):
        await ask(tokens=135)
    async with world.refused(errors.ContextTooLong):
        await ask(tokens=135, asked="side")
    async with world.refused(errors.UnknownModel):
        await ask(asked="bigg")
    await world.warm("gpu2", boot="b2", far=1)
    async with world.refused(errors.TrustZoneRefused):
        await ask(asked="far")
    assert await ask(asked="far", zone="remote") == "far"
    await world.tell("gpu1", {"small": ModelOnHost(state="degraded", slots_total=1)})
    async with world.refused(errors.ModelUnavailable):
        await ask()
    await world.healthy()


async def test_what_may_fit_is_left_to_the_runtime_where_nothing_has_room_for_sure(world: World) -> None:
    """An agent asks for the longest answer that there may be, and a prompt is estimated by its bytes: neither is what
    the runtime counts. A model that has room for sure goes first, and what surely is too long is refused at once."""
    tight = POLICY.replace("weights-big\n", "weights-big\n    contextTokens: 100\n")
    await world.apply(tight)
    await world.warm(big=1, small=1)

    async def ask(**fields: int) -> str:
        record = JobRecord(id=world.new_id(), asked="big", **fields)  # type: ignore[arg-type]
        return (await admission.admit(world.store, world.book, world.fleet, record, b"{}")).lane

    assert await ask(tokens=90, max_tokens=1000) == "small"
    await world.apply(tight.replace("weights-small\n", "weights-small\n    contextTokens: 100\n"))
    assert await ask(tokens=90, max_tokens=1000) == "big"
    assert await ask(tokens=134) == "big"
    async with world.refused(errors.ContextTooLong):
        await ask(tokens=135)
    await world.healthy()


async def test_a_job_that_entered_a_fallback_says_why(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It made no move, so nothing else tells why another model answered: the refusal of the lane that it asked for."""
    tight = POLICY.replace("weights-big\n", "weights-big\n    contextTokens: 100\n")
    await world.apply(tight.replace("lanes:\n", "lanes:\n  out: { target: far, fallback: side }\n"))
    await world.warm(big=1, small=1, far=1)

    async def spilled(**fields: object) -> str:
        record = JobRecord(**{"id": world.new_id(), "asked": "big", "caller": "ann"} | fields)  # type: ignore[arg-type]
        with caplog.at_level("INFO"):
            admitted = await admission.admit(world.store, world.book, world.fleet, record, b"{}")
        job = await world.job(admitted.job_id)
        told = f" spilled={job.spilled}" if job.spilled else "tokens=1"
        assert job.public()["spilled"] == job.spilled and caplog.messages[-1].endswith(told)
        await jobs.cancel(world.store, job.id)
        return f"{job.spilled} {job.lane}"

    assert await spilled(tokens=1) == " big"
    assert await spilled(tokens=101) == "context_length_exceeded small"
    assert await spilled(asked="out", tokens=1) == "trust_zone side"
    await world.tell("gpu1", {m: ModelOnHost(state="warm", slots_total=1) for m in ("big", "small")})
    await world.claim(await world.submit(caller="ann"))
    waiting = await world.fill("big", caller="ann")
    assert await spilled(tokens=1, caller="bob") == "lane_full small"
    with pytest.raises(errors.LaneFull):
        await world.submit(caller="bob")
    await jobs.cancel(world.store, waiting[0])
    assert await spilled(tokens=1) == "caller_share small", "bob is in line"
    await world.tell(
        "gpu1", {m: ModelOnHost(state=s, slots_total=1) for m, s in (("big", "quarantined"), ("small", "warm"))}
    )
    assert await spilled(tokens=1) == "model_unavailable small"
    await world.healthy()


async def test_batch_work_that_spills_is_batch_work_still(world: World) -> None:
    """A key may say that its caller's work is no more urgent; a lane that has no room is no way out of that. What asked
    for a batch lane by itself is people's work again where it spills to a lane of theirs."""
    await world.apply(POLICY.replace("lanes:\n", "lanes:\n  big.batch: { fallback: small }\n"))
    await world.warm(small=1)
    for priority, asked in (("batch", "big"), ("interactive", "big.batch")):
        record = JobRecord(id=world.new_id(), asked=asked, priority=priority)
        admitted = await admission.admit(world.store, world.book, world.fleet, record, b"{}")
        job = await world.job(admitted.job_id)
        assert (job.lane, job.priority) == ("small", priority)


async def test_as_many_may_start_later_as_may_wait(world: World) -> None:
    """Of each caller, in each lane: whoever plans ahead fills no Redis. The refusal says when the first of them starts,
    and not how an empty lane drains."""
    for after_ms in (60_000, 45_500, 90_000):
        await world.submit("big", caller="ann", not_before=world.now + after_ms)
    later = {"not_before": world.now + 5_000}
    async with world.refused(errors.ScheduleFull) as full:
        await world.submit("big", caller="ann", **later)
    assert full.value.retry_after_s == 46
    assert str(full.value) == "as many of your jobs as may start later in big are scheduled; the first starts in 46 s"
    await world.submit("big", caller="bob", **later)
    await world.submit("small", caller="ann", **later)
    assert await world.submit("big", caller="ann")
    world.now += 100_000
    async with world.refused(errors.ScheduleFull) as full:
        await world.submit("big", caller="ann", not_before=world.now + 5_000)
    assert full.value.retry_after_s == 1, "its start has come, and nobody has looked yet"


async def test_more_that_start_later_are_bound_to_no_fallback(world: World) -> None:
    """The lane is empty: nothing that happens there is a reason for another model, or to leave the machine."""
    await world.warm(big=1, small=1, far=1)

    async def ask() -> str:
        record = JobRecord(id=world.new_id(), asked="big", zone="remote", not_before=world.now + 20_000)
        return (await admission.admit(world.store, world.book, world.fleet, record, b"{}")).lane

    assert [await ask() for _ in range(3)] == ["big"] * 3
    async with world.refused(errors.ScheduleFull):
        await ask()


@pytest.mark.parametrize(
    ("kept", "key", "places"),
    [
        (0, {"priority": "batch"}, 3 + 2),
        (1, {"priority": "batch"}, 3 + 1),
        (1, {}, 3 + 2),
        (0, {"max_running": 1}, 3 + 1),
        (0, {"max_running": 9}, 3 + 2),
    ],
)
async def test_a_lane_lets_in_for_the_free_slots_that_a_job_may_have(
    world: World, kept: int, key: dict[str, Any], places: int
) -> None:
    """One is kept for people, or its key allows one at a time: those let in beyond `maxQueue` would wait."""
    await world.tell("gpu1", {"big": ModelOnHost(state="warm", slots_total=2, slots_kept=kept)})
    assert len(await world.fill("big", caller="ci", **key)) == places
    await world.healthy()


async def test_who_runs_all_that_its_key_allows_has_no_free_slot(world: World) -> None:
    await world.warm(big=2)
    await world.claim(await world.submit(caller="ci", max_running=1))
    assert len(await world.fill("big", caller="ci", max_running=1)) == 3
    assert len(await world.fill("big", caller="ci")) == 1, "one that came without a limit"
