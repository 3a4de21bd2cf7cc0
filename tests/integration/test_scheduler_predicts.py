"""Promotion at once, where the first token is predicted to come too late: which jobs go, and which stay."""

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from broker import hosts
from broker.lifecycle import State
from broker.records import ModelOnHost
from tests.support.broker_world import World, fake_world
from workers.scheduler import Scheduler

POLICY = """
models:
  big:
    backend: simulated
    model: weights-big
    maxConcurrent: 2
    maxQueue: 9
    coldStartBudgetMs: 25000
    fallback: small
  small:
    backend: simulated
    model: weights-small
    maxConcurrent: 4
    maxQueue: 2
    contextTokens: 60000
lanes:
  edits:
    target: big
    maxQueue: 90
    fallback: null
  side:
    target: small
    maxQueue: 90
  night:
    target: small
    priority: batch
    maxQueue: 90
"""


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    """Both models warm and measured: `big` reads 1,000 tokens a second, `small` 5,000."""
    async with fake_world() as world:
        await world.apply(POLICY)
        await hosts.learn(world.store, "big", service_ms=10_000, load_ms=20_000, prefill_tps=1_000)
        await hosts.learn(world.store, "small", service_ms=2_000, load_ms=5_000, prefill_tps=5_000)
        yield world


async def beat(world: World, big: str = "warm", *, slots: int = 2, cached: dict[str, int] | None = None) -> None:
    told = {
        "big": ModelOnHost(state=big, slots_total=slots, first_token_ewma_ms=500, prompts=json.dumps(cached or {})),
        "small": ModelOnHost(state="warm", slots_total=4, first_token_ewma_ms=200),
    }
    await world.tell("gpu1", told)


async def hasten(world: World) -> None:
    """One look of a scheduler that has been there for long."""
    scheduler = Scheduler(world.store)
    await scheduler._book.reload()
    await scheduler._fleet.look()
    await scheduler._hasten_hopeless()


async def lane_of(world: World, job_id: str) -> str:
    return (await world.job(job_id)).lane


async def all_slots_taken(world: World) -> None:
    for _ in range(2):
        await world.stream(await world.submit())


async def test_a_long_prompt_goes_at_once_and_a_short_one_waits_for_its_turn(world: World) -> None:
    """5 s until one of two slots is free and 30 s to read do not fit into 25 s; the fallback answers after 6."""
    await beat(world)
    await all_slots_taken(world)
    short, long = await world.submit(tokens=100), await world.submit(tokens=30_000)
    await hasten(world)
    assert (await lane_of(world, short), await lane_of(world, long)) == ("big", "small")
    job = await world.job(long)
    assert (job.promotions, job.promoted_at, job.state) == (1, world.now, State.QUEUED)


async def test_those_before_it_in_another_lane_of_its_model_count(world: World) -> None:
    """Eight people who came before it take 40 s of two slots; those who came after it take none of its time."""
    await beat(world)
    await all_slots_taken(world)
    first = await world.submit(tokens=100)
    world.now += 1
    for _ in range(8):
        await world.submit("edits")
    world.now += 1
    last = await world.submit(tokens=100)
    await hasten(world)
    assert (await lane_of(world, first), await lane_of(world, last)) == ("big", "small")


@pytest.mark.parametrize(("lane", "goes_to"), [("side", "big"), ("night", "small")])
async def test_a_fallback_is_as_busy_as_all_lanes_of_its_model(world: World, lane: str, goes_to: str) -> None:
    """36 s are too long, but behind sixty people on four slots it would be longer; batch work is behind it."""
    await beat(world)
    await all_slots_taken(world)
    for _ in range(4):
        await world.claim(await world.submit(lane))
    for _ in range(60):
        await world.submit(lane)
    job_id = await world.submit(tokens=30_000)
    await hasten(world)
    assert await lane_of(world, job_id) == goes_to


async def test_a_job_whose_deadline_has_passed_is_not_behind_those_who_have_none(world: World) -> None:
    """Its turn comes in 5 s, as that of a job in need; on the fallback it would come in 10."""
    await beat(world)
    await all_slots_taken(world)
    for _ in range(4):
        await world.claim(await world.submit("side"))
    for _ in range(20):
        await world.submit("side")
    job_id = await world.submit(tokens=100)
    world.now += 1
    for _ in range(8):
        await world.submit("edits")
    world.now += 25_000
    await beat(world)
    assert (await world.due.look(job_id)).outcome == "waits"


async def test_what_its_session_has_in_a_cache_need_not_be_read(world: World) -> None:
    await beat(world, cached={"s1": 29_500, "s2": 100})
    await all_slots_taken(world)
    known = await world.submit(tokens=30_000, session="s1")
    barely = await world.submit(tokens=30_000, session="s2")
    await hasten(world)
    assert (await lane_of(world, known), await lane_of(world, barely)) == ("big", "small")


@pytest.mark.parametrize("why", ["a slot is free", "it does not fit into the fallback", "the fallback is slower"])
async def test_a_long_prompt_on_a_warm_model_stays(world: World, why: str) -> None:
    """Nor does it expire: its claim will end the clock."""
    await beat(world)
    if why != "a slot is free":
        await all_slots_taken(world)
    if why == "the fallback is slower":
        await hosts.learn(world.store, "small", prefill_tps=500)
    job_id = await world.submit(tokens=61_000 if why == "it does not fit into the fallback" else 40_000)
    await hasten(world)
    world.now += 26_000
    await beat(world)
    assert (await world.due.look(job_id)).outcome == ("promoted" if why == "a slot is free" else "waits")
    assert (await world.job(job_id)).live


async def test_a_load_that_ends_in_time_may_still_be_followed_by_too_long_a_read(world: World) -> None:
    await beat(world, "cold", slots=0)
    short, long = await world.submit(tokens=100), await world.submit(tokens=30_000)
    await hasten(world)
    assert (await lane_of(world, short), await lane_of(world, long)) == ("big", "small")


async def test_those_behind_a_job_that_goes_move_up(world: World) -> None:
    """Four wait behind it for two slots of 10 s: the last is served after 20 s and read in 2, which is in time."""
    await beat(world)
    await all_slots_taken(world)
    first = await world.submit(tokens=30_000)
    others = [await world.submit(tokens=2_000) for _ in range(4)]
    await hasten(world)
    assert await lane_of(world, first) == "small"
    assert [await lane_of(world, job) for job in others] == ["big"] * 4


async def test_a_record_that_nobody_can_read_keeps_no_other_where_it_is(world: World) -> None:
    """Written by hand or by another version; the job behind it goes all the same."""
    await beat(world)
    await all_slots_taken(world)
    broken, long = [await world.submit(tokens=30_000) for _ in range(2)]
    await world.store.command("HSET", world.store.keys.job(broken), "state", "weird")
    await hasten(world)
    assert await lane_of(world, long) == "small"


async def test_no_more_go_than_the_fallback_can_serve_sooner(world: World) -> None:
    """Each one that goes is counted at once: else all would go to a place that only the first of them would get."""
    await world.apply(POLICY.replace("maxConcurrent: 4", "maxConcurrent: 1"))
    await hosts.learn(world.store, "small", service_ms=30_000)
    told = {
        "big": ModelOnHost(state="warm", slots_total=2, first_token_ewma_ms=500),
        "small": ModelOnHost(state="warm", slots_total=1, first_token_ewma_ms=200),
    }
    await world.tell("gpu1", told)
    await all_slots_taken(world)
    waiting = [await world.submit(tokens=20_000) for _ in range(3)]
    await hasten(world)
    assert [await lane_of(world, job) for job in waiting] == ["small", "big", "big"]


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize(("tried_again_ms", "state"), [(60_000, State.EXPIRED), (20_000, State.QUEUED)])
async def test_a_model_that_does_not_load_is_not_waited_for_in_vain(
    world: World, fallback: bool, tried_again_ms: int, state: State
) -> None:
    """Without a fallback, or with one that is full: who gives up before the next load is told so at once."""
    await world.apply(POLICY if fallback else POLICY.replace("    fallback: small\n", ""))
    await hosts.learn(
        world.store, "big", failures=3, failure="no such file", quarantined_until=world.now + tried_again_ms
    )
    await beat(world, "quarantined")
    await world.fill("small")
    job_id = await world.submit("big", give_up_within_ms=50_000)
    await hasten(world)
    job = await world.job(job_id)
    assert (job.state, job.lane) == (state, "big")
    if state is State.EXPIRED:
        assert (job.error, job.error_message) == (
            "cold_start_deadline", "big does not load, and is not tried again in time: no such file"
        )  # fmt: skip
