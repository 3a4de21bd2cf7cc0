"""The cap on downgrades, the sessions that stay on a fallback, and whose first token came in time."""

import asyncio

import pytest

from broker import admission, downgrades, errors, jobs
from broker.lifecycle import State
from broker.records import Downgrades, JobRecord, ModelOnHost
from broker.snapshots import Snapshots
from broker.status import Snapshot
from broker.today import Today, by_model
from broker.usage import today
from tests.support.broker_world import World, policy_with

ROOMY = (("maxQueue: 3", "maxQueue: 999"), ("maxQueue: 2", "maxQueue: 999"))


def capped(share: float, *changes: tuple[str, str], sticky_ms: int = 0) -> str:
    keys = f"weights-big\n    maxDowngradeShare: {share}\n    stickyPromotionMs: {sticky_ms}\n"
    return policy_with(("weights-big\n", keys), *changes)


async def asked(world: World, count: int) -> list[str]:
    """So many jobs that ask for `big` and wait in its lane."""
    return [await world.submit() for _ in range(count)]


async def spill(world: World, **fields: object) -> str:
    """A job that asked for `big` and enters `small`."""
    return await world.submit("small", instead_of="big", **fields)  # type: ignore[arg-type]


async def counted(world: World) -> Downgrades:
    return await downgrades.read(world.store, "big")


@pytest.fixture
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downgrades, "WINDOW", 5)
    monkeypatch.setattr(downgrades, "BINDING_FROM", 2)


async def test_the_cap_binds_from_the_twentieth_job(world: World) -> None:
    """And a refusal of the script leaves no mark."""
    await world.apply(capped(0, *ROOMY))
    for _ in range(19):
        await spill(world)
    waits = await world.submit()
    async with world.refused(errors.DowngradesCapped):
        await spill(world)
    async with world.refused(errors.DowngradesCapped):
        await world.promote(waits, "small")
    assert await counted(world) == Downgrades(asked=20, downgraded=19)
    await world.healthy()


async def test_of_the_last_two_hundred_the_share_and_no_more(world: World) -> None:
    """A tenth of 200, however many asked before them."""
    await world.apply(capped(0.1, *ROOMY))
    waiting = await asked(world, 205)
    for job_id in waiting[-20:]:
        await world.promote(job_id, "small")
    async with world.refused(errors.DowngradesCapped):
        await world.promote(waiting[10], "small")
    async with world.refused(errors.DowngradesCapped):
        await spill(world)
    assert await counted(world) == Downgrades(asked=205, downgraded=20)


async def test_a_downgrade_counts_until_two_hundred_more_have_asked(world: World, short_window: None) -> None:
    """Here: five. The place of the oldest is the place of the newest."""
    await world.apply(capped(0.4, *ROOMY))
    await asked(world, 3)
    await spill(world)
    await spill(world)  # two of five
    async with world.refused(errors.DowngradesCapped):
        await spill(world)
    await asked(world, 3)  # the two are the oldest of the last five now
    assert (await counted(world)).downgraded == 2
    await spill(world)  # it takes the place of one of them
    assert await counted(world) == Downgrades(asked=9, downgraded=2)
    await asked(world, 1)
    assert await counted(world) == Downgrades(asked=10, downgraded=1)


async def test_many_at_once_keep_to_the_cap_exactly(world: World) -> None:
    """Sixty promotions and spills race for ten places: what decides is read in the script that writes."""
    await world.apply(capped(0.1, *ROOMY))
    waiting = await asked(world, 100)

    async def tried(job_id: str | None) -> int:
        try:
            await (spill(world) if job_id is None else world.promote(job_id, "small"))
        except errors.DowngradesCapped:
            return 0
        return 1

    went = sum(await asyncio.gather(*(tried(job_id) for job_id in waiting[:60])))
    assert went == 10
    went += sum(await asyncio.gather(*(tried(None if n % 2 else waiting[n]) for n in range(60, 100))))
    s = await world.healthy()
    moved = sum(job.model != "big" for job in s.jobs.values())
    assert went == moved == (await counted(world)).downgraded == 10


async def test_a_job_that_moves_twice_counts_once(world: World, short_window: None) -> None:
    await world.apply(capped(0.4, *ROOMY, ("trust: remote", "trust: local"), ("fallback: null", "fallback: big")))
    first, second, third, *_ = await asked(world, 5)
    for job_id in (first, second):
        await world.promote(job_id, "small")
    await world.promote(first, "far")  # it is a downgrade already: the cap has nothing against it
    assert (await counted(world)).downgraded == 2
    async with world.refused(errors.DowngradesCapped):
        await world.promote(third, "small")
    await world.promote(second, "big")  # what waits for the model that it asked for is none
    assert (await counted(world)).downgraded == 1
    await world.promote(third, "small")
    await world.healthy()


async def test_an_old_job_is_judged_by_the_window_and_not_counted_in_it(world: World, short_window: None) -> None:
    await world.apply(capped(0.2, *ROOMY))
    old, *_ = await asked(world, 9)
    await world.promote(old, "small")
    assert await counted(world) == Downgrades(asked=9)
    await spill(world)
    other = (await world.healthy()).lanes["big"].entries[0][1][1].decode()
    async with world.refused(errors.DowngradesCapped):
        await world.promote(other, "small")


async def test_a_model_without_a_cap_keeps_no_count(world: World) -> None:
    await world.apply(policy_with(*ROOMY))
    await world.promote(await world.submit(), "small")
    await spill(world)
    s = await world.healthy()
    assert not s.of("downgrades:<model>") and not s.of("sticky:<model>")


async def test_the_same_id_again_and_a_repeated_key_ask_once(world: World) -> None:
    await world.apply(capped(0.5, *ROOMY))
    for _ in range(3):
        await world.submit(id="once", key="k")
    await world.submit(key="k")
    assert (await counted(world)).asked == 1


async def test_at_the_cap_a_waiting_job_waits_until_it_gives_up(world: World, short_window: None) -> None:
    await world.apply(capped(0, *ROOMY))
    await world.warm(small=1, big=0)
    waits, _ = await asked(world, 2)
    world.now += 2_000
    assert (await world.due.look(waits)).outcome == "waits"
    assert (await world.job(waits)).retry_at == world.now + 1_000
    assert (await world.due.look(waits, hasten=True)).outcome == "waits"
    world.now += 18_000
    assert (await world.due.look(waits)).outcome == "expired"
    await world.healthy()


async def enter(world: World, **fields: object) -> str:
    record = JobRecord(**{"id": world.new_id(), "asked": "big", "keep_ms": 10**9} | fields)  # type: ignore[arg-type]
    return (await admission.admit(world.store, world.book, world.fleet, record, b"{}")).lane


async def test_at_the_cap_a_new_job_is_refused_if_its_lane_is_full(world: World, short_window: None) -> None:
    """In the words of its own lane; where that has no host, because no host has it."""
    await world.apply(capped(0))
    await world.warm(big=1, small=1)
    await world.claim(await world.submit())
    await world.fill("big")
    async with world.refused(errors.LaneFull) as full:
        await enter(world)
    assert full.value.lane == "big"  # type: ignore[attr-defined]
    await world.tell("gpu1", {"small": ModelOnHost(state="warm", slots_total=1)})
    await world.store.command("DEL", world.store.keys.model_on_host("big", "gpu1"))
    await world.fleet.look()
    async with world.refused(errors.ModelUnavailable):
        await enter(world)


async def test_a_session_that_was_promoted_stays_on_the_fallback_for_a_while(world: World) -> None:
    await world.apply(capped(1, *ROOMY, sticky_ms=60_000))
    await world.warm(big=2, small=1)
    assert await enter(world, session="s1") == "big"
    first = await world.submit(session="s1")
    await world.promote(first, "small")
    assert await enter(world, session="s1") == "small"
    assert await enter(world, session="s2") == "big"
    assert await enter(world) == "big"
    assert await enter(world, session="s1", asked="side") == "side"  # it was promoted from `big`, not from here
    assert await downgrades.sessions_on_fallback(world.store, "big") == 1
    key = (await world.healthy()).keys[world.store.keys.sticky("big")]
    assert key.expires
    world.now += 59_999
    assert await enter(world, session="s1") == "small"
    world.now += 1  # going there again was no new promotion
    assert await enter(world, session="s1") == "big"
    assert await downgrades.sessions_on_fallback(world.store, "big") == 0


async def test_a_session_that_stays_on_its_fallback_says_so(world: World) -> None:
    """No lane refused it; and where the fallback cannot take it, it came to the lane that it asked for."""

    async def spilled() -> str:
        record = JobRecord(id=world.new_id(), asked="big", session="s1", keep_ms=10**9)
        admitted = await admission.admit(world.store, world.book, world.fleet, record, b"{}")
        return (await world.job(admitted.job_id)).spilled

    await world.apply(capped(1, ("maxQueue: 3", "maxQueue: 4"), sticky_ms=60_000))
    await world.warm(big=1, small=1)
    await world.promote(await world.submit(session="s1"), "small")
    assert await spilled() == "sticky"
    await world.fill("small")
    assert await spilled() == ""


async def test_a_session_whose_spill_was_its_first_downgrade_stays_too(world: World) -> None:
    await world.apply(capped(1, sticky_ms=60_000))
    await world.warm(big=1, small=1)
    await world.claim(await world.submit())
    for job_id in await world.fill("big"):
        assert await enter(world, session="s1") == "small"
        await jobs.cancel(world.store, job_id)
        break
    assert await enter(world, session="s1") == "small"


async def test_nobody_stays_on_a_remote_fallback(world: World) -> None:
    """A request that spilled out of the machine once does not go there again while there is room here."""
    await world.apply(capped(1, sticky_ms=60_000))
    await world.warm(big=1, small=1, far=1)
    await world.claim(await world.submit())
    waiting = await world.fill("big")
    await world.fill("small")
    assert await enter(world, session="s1", zone="remote") == "far"
    await jobs.cancel(world.store, waiting[0])
    assert await enter(world, session="s1", zone="remote") == "big"
    assert await downgrades.sessions_on_fallback(world.store, "big") == 0


@pytest.mark.parametrize("why", ["full", "degraded", "too long", "capped"])
async def test_a_session_goes_back_to_its_own_lane_where_the_fallback_cannot_take_it(
    world: World, why: str, short_window: None
) -> None:
    share = 0.2 if why == "capped" else 1
    room = [("maxQueue: 3", "maxQueue: 999")]
    await world.apply(
        capped(share, *room, ("weights-small\n", "weights-small\n    contextTokens: 100\n"), sticky_ms=60_000)
    )
    await world.warm(big=2, small=1)
    await asked(world, 5)
    await world.promote(await world.submit(session="s1"), "small")
    if why == "full":
        await world.fill("small")
    if why == "degraded":
        await world.tell(
            "gpu1", {m: ModelOnHost(state=s, slots_total=1) for m, s in (("big", "warm"), ("small", "degraded"))}
        )
    assert await enter(world, session="s1", tokens=101 if why == "too long" else 1) == "big"


async def serve(world: World, job_id: str, *, after_ms: int = 0) -> None:
    """Claims a job, has its first token after a while, and finishes it."""
    held = await world.claim(job_id)
    world.now += after_ms
    await jobs.first_token(world.store, held, b"one")
    await jobs.end(world.store, held, "finish", seq=1)


async def judged(world: World, model: str = "big") -> tuple[int, int, int]:
    """First tokens of those who asked for a model: in time from it, in time from any, judged."""
    found = by_model(await today(world.store)).get(model, Today())
    return found.in_time_asked, found.in_time_any, found.judged


async def test_first_tokens_are_judged_by_the_budget_of_the_lane_that_was_asked_for(world: World) -> None:
    """In time from the model asked for, in time from another, late, or none at all: each job once, at its end."""
    await world.apply(policy_with(*ROOMY))
    await serve(world, await world.submit(), after_ms=2_000)
    await serve(world, await world.submit(), after_ms=2_001)
    promoted = await world.submit()
    await world.promote(promoted, "small")  # the budget of `small` is 1 s, that of `big` 2 s
    await serve(world, promoted, after_ms=1_500)
    assert await judged(world) == (1, 2, 3)

    whole = await world.claim(await world.submit())
    await jobs.end(world.store, whole, "finish", seq=1, data=b"all of it")  # the first token comes with the end
    hurried = await world.submit(promote_within_ms=500)
    await serve(world, hurried, after_ms=600)
    assert await judged(world) == (2, 3, 5)

    lost = await world.stream(await world.submit())
    await jobs.release(world.store, lost, loss=True, max_losses=3, error=errors.RuntimeFailed("broke"))
    assert await judged(world) == (2, 3, 5), "it is not over yet"
    world.now += 3_000
    await serve(world, lost.job_id)  # what nobody has seen does not count
    failed = await world.claim(await world.submit())
    await jobs.end(world.store, failed, "fail", error=errors.RuntimeFailed("broke"))
    patient, quick = await world.submit(), await world.submit()
    await jobs.cancel(world.store, quick)
    world.now += 2_001
    await jobs.cancel(world.store, patient)  # its client waited longer than the budget
    await serve(world, await world.submit("big.batch", priority="batch"), after_ms=1)
    assert await judged(world) == (2, 3, 8)


async def test_a_spilled_job_is_judged_as_one_that_asked_for_the_model(world: World) -> None:
    await world.apply(policy_with(*ROOMY))
    await serve(world, await spill(world), after_ms=1_999)
    assert await judged(world) == (0, 1, 1)


async def test_a_start_that_comes_later_is_when_the_clock_begins(world: World) -> None:
    await world.apply(policy_with(*ROOMY))
    job_id = await world.submit(not_before=world.now + 60_000, mode="async")
    world.now += 60_000
    assert (await world.due.look(job_id)).outcome == "started"
    assert (await world.job(job_id)).state is State.QUEUED
    await serve(world, job_id, after_ms=2_000)
    assert await judged(world) == (1, 1, 1)


async def test_status_shows_both_figures_and_who_stays_on_the_fallback(world: World) -> None:
    """And the share of prompt tokens that came out of a cache, under the model that served them."""
    await world.apply(capped(0.5, *ROOMY, sticky_ms=60_000))
    await world.warm(big=2, small=1)
    await serve(world, await world.submit(session="s1"))
    promoted = await world.submit(session="s2")
    await world.promote(promoted, "small")
    held = await world.stream(promoted)
    usage = {"prompt_tokens": 100, "cached_tokens": 60, "completion_tokens": 5}
    await jobs.end(world.store, held, "finish", seq=1, usage=usage)
    shown = Snapshot.from_json((await Snapshots(world.store, world.book, world.fleet).latest()).as_json())
    big, small, _far = shown.models
    assert (big.judged, big.in_time_asked, big.in_time_any) == (2, 1, 2)
    assert (big.asked, big.downgraded, big.sessions_on_fallback) == (2, 1, 1)
    assert (small.prompt_tokens, small.cached_tokens) == (100, 60)
    assert (small.judged, small.asked, small.sessions_on_fallback, big.prompt_tokens) == (0, 0, 0, 0)
