"""What a caller may hold: its share of a lane while others want in, its own limits, and its tokens of the day."""

import pytest

from broker import errors, jobs, lanes
from broker.lifecycle import State
from broker.records import JobRecord
from tests.support.broker_world import POLICY, World, policy_with, stale
from tests.support.invariants import take

ROOMY = policy_with(("maxQueue: 3", "maxQueue: 8"))
DAY_MS = 86_400_000


async def submit(
    world: World,
    caller: str,
    lane: str = "big",
    *,
    max_waiting: int = 0,
    tokens_per_day: int = 0,
    not_before: int = 0,
) -> str:
    into = world.book.active.lane(lane)
    assert into is not None
    record = JobRecord(id=world.new_id(), asked=lane, caller=caller, not_before=not_before)
    limits = {"max_waiting": max_waiting, "tokens_per_day": tokens_per_day}
    return (await lanes.submit(world.store, world.book.active, world.fleet, record, into, b"x", **limits)).job_id


async def fill(world: World, caller: str, lane: str = "big") -> tuple[int, errors.Refused]:
    """Submits until something refuses; gives how many jobs were taken, and what refused."""
    taken = 0
    while True:
        try:
            await submit(world, caller, lane)
        except errors.Refused as refused:
            return taken, refused
        taken += 1


async def oldest(world: World) -> str:
    return await anext(waiting.job async for waiting in lanes.waiting_entries(world.store, "big", limit=1))


async def test_a_lone_caller_uses_it_all(world: World) -> None:
    await world.apply(ROOMY)
    taken, refused = await fill(world, "ann")
    assert taken == 8 and type(refused) is errors.LaneFull
    await world.healthy()


async def test_two_have_half_each(world: World) -> None:
    await world.apply(ROOMY)
    await submit(world, "bob")
    taken, refused = await fill(world, "ann")
    assert taken == 4 and type(refused) is errors.CallerShare
    assert str(refused) == "4 of your jobs wait here, your share while 2 callers want places is 4"
    assert (await fill(world, "bob"))[0] == 3
    await world.healthy()


async def test_who_comes_late_is_in_by_the_second_try(world: World) -> None:
    """One flooded it alone. The late one is refused once; of the places that become free none is the other's again
    until it is down to its share."""
    await world.apply(ROOMY)
    await world.warm(big=1)
    running = await submit(world, "ann")
    await world.claim(running)
    assert (await fill(world, "ann"))[0] == 8
    with pytest.raises(errors.LaneFull):
        await submit(world, "bob")
    await world.claim(await oldest_waiting(world))
    with pytest.raises(errors.CallerShare):
        await submit(world, "ann")
    await submit(world, "bob")
    await world.healthy()


async def oldest_waiting(world: World) -> str:
    async for waiting in lanes.waiting_entries(world.store, "big", limit=20):
        if (await world.job(waiting.job)).state is State.QUEUED:
            return waiting.job
    raise AssertionError("nothing waits")


async def test_who_wanted_nothing_for_a_minute_shares_nothing(world: World) -> None:
    await world.apply(ROOMY)
    await jobs.cancel(world.store, await submit(world, "bob"))
    world.now += 59_999
    assert (await fill(world, "ann"))[0] == 4
    world.now += 1
    assert (await fill(world, "ann"))[0] == 4
    await world.healthy()


async def test_a_share_is_one_place_at_least(world: World) -> None:
    await world.apply(POLICY)
    for caller in ("ann", "bob", "cid"):
        await submit(world, caller)
    for caller in ("dan", "eva"):
        with pytest.raises(errors.LaneFull):
            await submit(world, caller)
    await jobs.cancel(world.store, await oldest(world))
    with pytest.raises(errors.CallerShare):
        await submit(world, "bob")
    await submit(world, "dan")


async def test_shares_are_of_one_lane(world: World) -> None:
    """Places elsewhere do not count, and a promoted job holds one where it went."""
    await world.apply(ROOMY)
    await submit(world, "bob")
    await submit(world, "bob", "small")
    mine = [await submit(world, "ann") for _ in range(4)]
    with pytest.raises(errors.CallerShare):
        await submit(world, "ann")
    await submit(world, "ann", "side")
    await jobs.cancel(world.store, [*mine].pop())
    await world.promote(mine[0], "small")
    await submit(world, "ann")
    await submit(world, "ann")
    with pytest.raises(errors.LaneFull):
        await submit(world, "ann", "small")
    await world.healthy()


async def test_a_promotion_takes_no_place_that_is_anothers(world: World) -> None:
    """Who floods a lane is tried in its fallback as soon as that has a place: it must leave others theirs."""
    await world.apply(ROOMY)
    mine = [await submit(world, "ann") for _ in range(6)]
    for job_id in mine[:2]:
        await world.promote(job_id, "small")
    with pytest.raises(errors.LaneFull):
        await submit(world, "bob", "small")
    await jobs.cancel(world.store, mine[0])
    async with world.refused(errors.LaneFull):
        await world.promote(mine[2], "small")
    theirs = await submit(world, "bob", "small")
    await jobs.cancel(world.store, theirs)
    async with world.refused(errors.LaneFull):
        await world.promote(mine[2], "small")
    world.now += 60_000
    await world.promote(mine[2], "small")
    await world.healthy()


async def test_what_starts_later_holds_its_place_from_then_on(world: World) -> None:
    """It is no way around the share, and takes nothing from it before."""
    await world.apply(ROOMY)
    later = [await world.submit(caller="ann", not_before=world.now + 100) for _ in range(5)]
    await submit(world, "bob")
    assert (await fill(world, "ann"))[0] == 4
    world.now += 100
    assert [(await world.due.look(job)).outcome for job in later] == ["full"] * 5
    await jobs.cancel(world.store, later.pop())
    await jobs.cancel(world.store, await oldest_of(world, "ann"))
    world.now += 1_000
    assert [(await world.due.look(job)).outcome for job in later] == ["started", "full", "full", "full"]
    await world.healthy()


async def oldest_of(world: World, caller: str) -> str:
    async for waiting in lanes.waiting_entries(world.store, "big", limit=20):
        if waiting.caller == caller:
            return waiting.job
    raise AssertionError("none of that caller's waits")


async def test_free_slots_are_shared_too(world: World) -> None:
    await world.apply(ROOMY)
    await world.warm(big=4)
    await submit(world, "bob")
    assert (await fill(world, "ann"))[0] == 6


async def test_a_caller_waits_with_no_more_than_it_may(world: World) -> None:
    """Over all lanes; what runs does not wait."""
    first = await submit(world, "ann", max_waiting=2)
    await submit(world, "ann", "small", max_waiting=2)
    async with world.refused(errors.CallerLimit):
        await submit(world, "ann", "side", max_waiting=2)
    await submit(world, "bob", "side", max_waiting=2)
    await world.warm(big=1)
    await world.claim(first)
    await submit(world, "ann", max_waiting=2)
    await world.healthy()


async def test_what_starts_later_waits_from_its_start_on(world: World) -> None:
    """Until then it keeps its caller from nothing. At its start it enters its lane once less waits than its key allows:
    planning ahead is no way around that."""
    later = [await submit(world, "ann", max_waiting=2, not_before=world.now + 5_000) for _ in range(3)]
    now = await submit(world, "ann", "small", max_waiting=2)
    world.now += 5_000
    outcomes = [(await world.due.look(job_id)).outcome for job_id in later]
    assert outcomes == ["started", "waits", "waits"]
    assert (await world.healthy()).due[later[2]] == world.now + 1_000
    async with world.refused(errors.CallerLimit):
        await submit(world, "ann", "side", max_waiting=2)
    await jobs.cancel(world.store, now)
    world.now += 1_000
    assert [(await world.due.look(job_id)).outcome for job_id in later[1:]] == ["started", "waits"]
    await world.healthy()


async def test_a_caller_runs_no_more_than_it_may(world: World) -> None:
    """The claim itself refuses, whichever worker asks; the job waits on."""
    await world.warm(big=2)
    mine = [await world.submit(caller="ann", max_running=1) for _ in range(2)]
    theirs = await world.submit(caller="bob", max_running=1)
    held = await world.claim(mine[0])
    async with world.refused(errors.CallerBusy):
        await world.claim(mine[1], host="gpu2", boot="boot2")
    await world.claim(theirs)
    await jobs.end(world.store, held, "fail", error=errors.RuntimeFailed("broke"))
    await world.claim(mine[1])
    await world.healthy()


async def test_an_answer_that_was_cancelled_is_charged(world: World) -> None:
    """By its worker's estimate, and not where the job goes on or nothing of an answer was made."""
    begun, waits = await world.stream(await submit(world, "ann")), await world.claim(await submit(world, "ann"))
    await jobs.spend_cancelled(world.store, begun, 100)
    for held in (begun, waits):
        await jobs.cancel(world.store, held.job_id)
    await jobs.spend_cancelled(world.store, waits, 100)
    await submit(world, "ann", tokens_per_day=1)
    await jobs.spend_cancelled(world.store, stale(begun, begun.attempt + 1), 100)
    await submit(world, "ann", tokens_per_day=1)
    await jobs.spend_cancelled(world.store, begun, 100)
    await submit(world, "ann", tokens_per_day=101)
    async with world.refused(errors.QuotaUsed):
        await submit(world, "ann", tokens_per_day=100)
    await world.healthy()


async def test_the_tokens_of_a_day_are_used_up(world: World) -> None:
    """Cached ones cost nothing; midnight in UTC gives new ones, and says when that is."""
    spends = await world.stream(await submit(world, "ann", tokens_per_day=100))
    usage = {"prompt_tokens": 1_000, "cached_tokens": 940, "completion_tokens": 39}
    await jobs.end(world.store, spends, "finish", usage=usage)
    last = await world.stream(await submit(world, "ann", tokens_per_day=100))
    await jobs.end(world.store, last, "finish", usage={"prompt_tokens": 1})
    async with world.refused(errors.QuotaUsed) as caught:
        await submit(world, "ann", tokens_per_day=100)
    to_midnight_ms = DAY_MS - world.now % DAY_MS
    assert caught.value.retry_after_s == -(-to_midnight_ms // 1000)  # type: ignore[attr-defined]
    await submit(world, "ann", tokens_per_day=101)
    await submit(world, "bob", tokens_per_day=100)
    world.now += to_midnight_ms - 1
    with pytest.raises(errors.QuotaUsed):
        await submit(world, "ann", tokens_per_day=100)
    world.now += 1
    await submit(world, "ann", tokens_per_day=100)
    assert not [name for name in (await take(world.store)).keys if "spent" in name and "ann" not in name]
