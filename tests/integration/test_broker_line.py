"""Who finds no place in a lane and has none there is in line for the next: it may have fewer places than callers."""

import pytest

from broker import admission, errors, jobs
from broker.errors import LaneFull
from broker.records import JobRecord
from tests.support.broker_world import World, policy_with

ONE_PLACE = policy_with(("maxQueue: 3", "maxQueue: 1"))


async def asks(world: World, *callers: str) -> list[str]:
    """Each asks once; tells who was let in."""
    let_in = []
    for caller in callers:
        world.now += 1
        try:
            await world.submit(caller=caller)
        except (errors.LaneFull, errors.CallerShare):
            continue
        let_in.append(caller)
    return let_in


async def taken_by(world: World, caller: str) -> str:
    """One place of the lane, and nothing else there: whose job waits in it."""
    await world.apply(ONE_PLACE)
    await world.warm(big=1)
    await world.claim(await world.submit(caller="runs"))
    return await world.submit(caller=caller)


async def test_the_next_place_is_for_who_was_refused_first(world: World) -> None:
    """Not for who asks first: a flood asks more often than one who keeps to Retry-After."""
    job_id = await taken_by(world, "ann")
    assert await asks(world, "bob", "cay", "ann") == []
    with pytest.raises(LaneFull) as refused:
        await world.submit(caller="cay")
    assert refused.value.before == 1
    await jobs.cancel(world.store, job_id)
    assert await asks(world, "ann", "cay", "ann", "bob") == ["bob"]
    assert await asks(world, "cay", "bob") == []
    (job_id,) = [job.id for job in (await world.healthy()).jobs.values() if job.live and job.caller == "bob"]
    await jobs.cancel(world.store, job_id)
    assert await asks(world, "bob", "ann", "cay") == ["cay"], "ann and bob had a place since"
    await world.healthy()


async def test_a_free_slot_is_kept_for_nobody(world: World) -> None:
    """A client that was refused may never come back."""
    job_id = await taken_by(world, "ann")
    assert await asks(world, "bob", "cay") == []
    await jobs.cancel(world.store, job_id)
    await world.warm(big=2)
    assert await asks(world, "ann", "ann") == ["ann"]


async def test_who_does_not_come_back_loses_its_turn(world: World) -> None:
    job_id = await taken_by(world, "ann")
    assert await asks(world, "bob") == []
    await jobs.cancel(world.store, job_id)
    world.now += 30_990
    assert await asks(world, "ann") == []
    world.now += 8
    assert await asks(world, "ann") == ["ann"]


async def test_who_has_a_place_is_in_no_line(world: World) -> None:
    job_id = await taken_by(world, "ann")
    assert await asks(world, "ann", "ann") == []
    await jobs.cancel(world.store, job_id)
    assert await asks(world, "cay") == ["cay"]
    assert not (await world.healthy()).of("line:<lane>")


async def test_who_had_a_place_lines_up_behind_the_others(world: World) -> None:
    job_id = await taken_by(world, "ann")
    assert await asks(world, "bob") == []
    await jobs.cancel(world.store, job_id)
    taken = await world.submit(caller="bob")
    await world.claim(taken)
    assert await asks(world, "ann") == ["ann"]


async def test_who_is_served_by_the_fallback_stands_in_no_line(world: World) -> None:
    """Its turn would keep a place empty that nobody comes for."""
    await world.apply(ONE_PLACE)
    await world.warm(big=1, small=1)
    await world.claim(await world.submit(caller="runs"))
    waits = await world.submit(caller="ann")
    job = JobRecord(id=world.new_id(), asked="big", caller="bob")
    assert (await admission.admit(world.store, world.book, world.fleet, job, b"{}")).lane == "small"
    await jobs.cancel(world.store, waits)
    assert await asks(world, "cay") == ["cay"]
    await world.healthy()
