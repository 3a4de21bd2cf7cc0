"""A policy that changes under load: nothing is dropped, nobody decides under an old one, removed lanes drain."""

import asyncio
import json
from contextlib import suppress

import pytest

from broker import admission, errors, jobs, lanes, policies
from broker.lifecycle import State
from broker.policies import APPLY_TRIES, HISTORY_KEPT, PolicyBook
from broker.policy import Policy
from broker.records import JobRecord
from tests.support.broker_world import POLICY, World, a_later_version_applies, policy_with, running, turns
from tests.support.counted import counted
from tests.support.invariants import take, undone
from workers import chores

WITHOUT_SMALL = """
models:
  big:
    backend: simulated
    model: weights-big
    maxConcurrent: 2
    maxQueue: 3
"""


async def test_the_same_policy_again_changes_nothing(world: World) -> None:
    before = await take(world.store)
    assert await world.apply("# a comment more\n" + POLICY) == 1
    assert not before.marks(await take(world.store))
    async with world.refused(errors.PolicyInvalid):
        await world.apply("models: {}")


async def test_history_and_rollback(world: World) -> None:
    for n in range(4, HISTORY_KEPT + 6):
        await world.apply(policy_with(("maxQueue: 3", f"maxQueue: {n}")))
    versions = [past["version"] for past in await world.book.history()]
    newest = HISTORY_KEPT + 3
    assert versions == list(range(newest, newest - HISTORY_KEPT, -1))
    assert await world.book.rollback(versions[-1]) == newest + 1
    assert world.book.active.policy.models["big"].max_queue == versions[-1] + 2
    with pytest.raises(errors.BadRequest):
        await world.book.rollback(1)


async def test_the_policies_that_were_in_force_since_an_instant_are_known(world: World) -> None:
    """The first is the one that was in force then; what a later version wrote, or a hand, is passed over."""
    begun, texts = world.now, [POLICY, WITHOUT_SMALL, policy_with(("maxQueue: 3", "maxQueue: 4"))]
    for text in texts[1:]:
        world.now += 100
        await world.apply(text)
    digests = [Policy.parse(text).digest for text in texts]

    async def since(at_ms: int) -> list[str]:
        return [policy.digest for policy in await world.book.since(at_ms)]

    assert await since(begun + 200) == []
    assert await since(begun + 199) == await since(begun + 100) == [digests[1]]
    assert await since(begun + 99) == await since(begun) == [digests[1], digests[0]]
    one = {"version": 2, "text": "modles: {}", "digest": "x", "applied_at": begun + 100, "applied_by": "hand"}
    await world.store.command("HSET", world.store.keys.policy, "history:2", json.dumps(one))
    world.now += 100
    await world.apply()
    assert await since(begun) == [digests[2], digests[0]]


async def test_two_who_apply_at_once_both_get_through(world: World) -> None:
    books = [PolicyBook(world.store) for _ in range(APPLY_TRIES)]
    texts = [policy_with(("maxQueue: 3", f"maxQueue: {10 + n}")) for n in range(len(books))]
    versions = await asyncio.gather(*(book.apply(text) for book, text in zip(books, texts, strict=True)))
    assert sorted(versions) == list(range(2, 2 + len(books)))


async def test_a_process_never_goes_back_to_an_older_policy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reloads at once: the slower one, with the older policy in hand, must not win."""
    book = PolicyBook(world.store)
    read, slow, overtaken = world.store.hash, asyncio.Event(), asyncio.Event()

    async def first_is_slow(key: str) -> dict[bytes, bytes]:
        fields = await read(key)
        if not slow.is_set():
            slow.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await overtaken.wait()
        return fields

    monkeypatch.setattr(world.store, "hash", first_is_slow)
    reload = asyncio.create_task(book.reload(), name="slow reload")
    await slow.wait()
    await world.apply(policy_with(("maxQueue: 3", "maxQueue: 9")))
    await book.reload()
    overtaken.set()
    await reload
    assert book.active.version == 2


async def test_thirty_changes_under_load_drop_no_job(world: World) -> None:
    """Budgets go up and down thirty times while jobs come in, run and are promoted by another process."""
    await world.warm(big=2, small=1)
    other = PolicyBook(world.store)
    await other.reload()
    stop, accepted, refused = asyncio.Event(), [], []

    async def apply() -> None:
        for n in range(30):
            text = policy_with(("maxQueue: 3", f"maxQueue: {3 + n % 7}"), ("maxQueue: 2", f"maxQueue: {n % 5}"))
            await world.book.apply(text)
            answered = len(accepted) + len(refused)
            while len(accepted) + len(refused) < answered + 4:
                await turns(1)
        stop.set()

    async def submit() -> None:
        while not stop.is_set():
            record = JobRecord(id=world.new_id(), asked="big", keep_ms=10**9)
            try:
                accepted.append((await admission.admit(world.store, other, world.fleet, record, b"{}")).job_id)
            except errors.LaneFull as full:
                refused.append(full)
            await turns(5)

    async def serve() -> None:
        while not stop.is_set():
            for lane in ("big", "small"):
                async for waiting in lanes.waiting_entries(world.store, lane, limit=1):
                    try:
                        got = await lanes.claim(world.store, other.active, waiting, host="gpu1", boot="boot1")
                    except (errors.Lost, errors.NoSuchJob, errors.BadTransition):
                        await other.reload()
                        continue
                    held = jobs.Holding(waiting.job, lane, got.attempt, "boot1")
                    await jobs.first_token(world.store, held, b"x")
                    await jobs.end(world.store, held, "finish")
            await turns(5)

    before = await take(world.store)
    async with asyncio.timeout(20), running(other.follow()), asyncio.TaskGroup() as tasks:
        for work in (apply, submit, submit, serve):
            tasks.create_task(work(), name=work.__name__)
    s = await world.healthy()
    assert set(accepted) == s.jobs.keys() and len(accepted) > 20 and not undone(before, s)
    assert {job.state for job in s.jobs.values()} <= {State.QUEUED, State.DONE}
    assert world.book.active.version == 31


async def test_a_lowered_budget_drains_and_never_trims(world: World) -> None:
    ids = await world.fill("big")
    await world.apply(policy_with(("maxQueue: 3", "maxQueue: 1")))
    s = await world.healthy()
    assert [s.jobs[i].state for i in ids] == [State.QUEUED] * 3
    async with world.refused(errors.LaneFull):
        await world.submit()
    await jobs.cancel(world.store, ids[0])
    await jobs.cancel(world.store, ids[1])
    async with world.refused(errors.LaneFull):
        await world.submit()
    await jobs.cancel(world.store, ids[2])
    await world.submit()


async def test_a_removed_lane_serves_out_its_jobs_and_goes(world: World) -> None:
    """It admits nothing; who waits in it is served from its last definition; it goes when it is empty."""
    served, cancelled = await world.submit("small"), await world.submit("small")
    was = await world.job(served)
    await world.apply(WITHOUT_SMALL)
    active = world.book.active
    lane = active.lane("small")
    assert lane is not None and lane.retiring and lane.max_queue == 2
    assert {"small", "small.batch", "side", "far", "far.batch"} == set(active.retiring)
    model = active.model("small")
    assert model is not None and model.model == "weights-small"
    async with world.refused(errors.ModelUnavailable):
        await world.submit("small")
    with pytest.raises(errors.UnknownModel):
        record = JobRecord(id="new", asked="small")
        await admission.admit(world.store, world.book, world.fleet, record, b"")
    now = await world.job(served)
    assert (now.promote_at, now.give_up_at, now.entry) == (was.promote_at, was.give_up_at, was.entry)
    assert not await lanes.retire(world.store, "small")
    held = await world.stream(served)
    await jobs.cancel(world.store, cancelled)
    assert not await lanes.retire(world.store, "small")
    await jobs.release(world.store, held, loss=False, max_losses=3, error=errors.WorkerLost("drained"))
    held = await world.stream(served)
    await jobs.end(world.store, held, "finish")
    for name in sorted(active.retiring):
        assert await lanes.retire(world.store, name)
    await world.book.reload()
    assert world.book.active.retiring == {} and world.book.active.lane("small") is None
    s = await world.healthy()
    assert "small" not in s.lanes
    assert not await lanes.retire(world.store, "big")


async def test_a_job_is_its_lanes_present_models(world: World) -> None:
    """Who waited while a policy led the lane to another model is served, recorded and counted as that one's."""
    job_id = await world.submit("side")
    assert (await world.job(job_id)).model == "small"
    await world.apply(policy_with(("target: small", "target: big")))
    got = await lanes.claim(world.store, world.book.active, await world.waiting(job_id), host="gpu1", boot="boot1")
    assert got.record.model == (await world.job(job_id)).model == "big"
    held = jobs.Holding(job_id, "side", got.attempt, "boot1")
    await jobs.first_token(world.store, held, b"x")
    await jobs.end(world.store, held, "finish", usage={"prompt_tokens": 7, "completion_tokens": 2})
    await world.healthy()
    used = await counted(world.store)
    assert used.keys() == {"anonymous:side:small:big"} and used["anonymous:side:small:big"]["tokens_out"] == 2


async def starting_later(world: World) -> str:
    """A job that nobody waits for, which starts in ten seconds in a lane of `small`."""
    return await world.submit("small", mode="async", not_before=world.now + 10_000, give_up_within_ms=60_000)


async def test_a_job_whose_lane_is_gone_at_its_start_ends_then_and_says_why(world: World) -> None:
    """No lane waits for starts, which may be a month ahead; and waiting for one that is gone helps nobody."""
    job_id = await starting_later(world)
    await world.apply(WITHOUT_SMALL)
    await chores.sweep(world.store, world.book)
    assert world.book.active.retiring == {}
    assert (await world.due.look(job_id)).outcome == "not_due"
    world.now += 10_200
    looked = await world.due.look(job_id)
    assert (looked.outcome, looked.late_ms) == ("expired", 200)
    job = await world.job(job_id)
    assert (job.state, job.error) == (State.EXPIRED, "model_unavailable")
    assert job.error_message == "lane small was removed from the policy before the job could start"
    assert job.letter, "its caller can try it again"
    assert job_id not in (await world.healthy()).due


async def test_a_job_starts_in_a_removed_lane_that_is_not_empty_yet(world: World) -> None:
    """It was accepted before, as what waits there was: it is served from the lane's last definition."""
    job_id, before = await starting_later(world), await world.submit("small", give_up_within_ms=60_000)
    await world.apply(WITHOUT_SMALL)
    await chores.sweep(world.store, world.book)
    world.now += 10_000
    assert (await world.due.look(job_id)).outcome == "started"
    for waiting in (before, job_id):
        await jobs.end(world.store, await world.stream(waiting), "finish")
    await chores.sweep(world.store, world.book)
    assert world.book.active.lane("small") is None
    await world.healthy()


async def test_a_job_starts_in_a_lane_that_came_back_whoever_has_not_heard_of_it(world: World) -> None:
    job_id = await starting_later(world)
    await world.apply(WITHOUT_SMALL)
    await chores.sweep(world.store, world.book)
    elsewhere = PolicyBook(world.store)
    await elsewhere.reload()
    await elsewhere.rollback(1)
    assert world.book.active.lane("small") is None
    world.now += 10_000
    assert (await world.due.look(job_id)).outcome == "started"
    await world.claim(job_id)
    await world.healthy()


async def test_a_lane_that_comes_back_is_not_retiring(world: World) -> None:
    job_id = await world.submit("small")
    await world.apply(WITHOUT_SMALL)
    await world.apply(policy_with(("maxQueue: 2", "maxQueue: 5")))
    lane = world.book.active.lane("small")
    assert lane is not None and not lane.retiring and lane.max_queue == 5
    assert world.book.active.retiring == {}
    await world.claim(job_id)


async def test_a_job_waiting_in_a_removed_lane_is_promoted_where_it_may_go(world: World) -> None:
    """At its instant, without asking whether the fallback would be sooner: its own lane has no future."""
    text = policy_with(("fallback: far", "fallback: big"), ("    fallback: small\n", ""))
    await world.apply(text)
    await world.warm(big=0, small=1)
    job_id = await world.submit("small")
    await world.apply(WITHOUT_SMALL)
    world.now += 1_000
    assert (await world.due.look(job_id)).outcome == "promoted"
    assert (await world.job(job_id)).lane == "big"
    await world.healthy()


async def test_a_lane_whose_model_now_leads_out_keeps_local_jobs_in(world: World) -> None:
    """Promise 7 against a policy change: the job that waits there is refused by the claim and may be promoted."""
    job_id = await world.submit()
    await world.apply(policy_with(("weights-big\n", "weights-big\n    trust: remote\n")))
    async with world.refused(errors.TrustZoneRefused):
        await world.claim(job_id)
    await world.promote(job_id, "small")
    await world.claim(job_id)
    await world.healthy()


async def test_a_policy_of_a_later_version_leaves_the_one_at_hand(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told of in the log, once; whoever must decide under it hears so each time."""
    monkeypatch.setattr(policies, "FOLLOW_EVERY_S", 0.001)
    await a_later_version_applies(world.store)
    async with running(world.book.follow()):
        while not caplog.messages:
            await turns(1)
        await turns(20)
    for _ in range(3):
        async with world.refused(errors.PolicyUnreadable):
            await world.book.reload()
        assert await world.book.catch_up() is world.book.active
    assert (world.book.active.version, world.book.unread) == (1, 2)
    assert world.book.unreadable is not None and world.book.unreadable.__traceback__ is None, "it would grow each time"
    (told,) = caplog.messages
    assert told.startswith("event=policy_unreadable version=2 version_kept=1 reason=line ") and "keyOfALater" in told
    fresh = PolicyBook(world.store)
    assert await fresh.catch_up() is None and not fresh.present
    with pytest.raises(errors.ModelUnavailable, match="policy 2 is active, and this version of warmlane cannot"):
        _ = fresh.active


@pytest.mark.parametrize("fresh", [True, False])
async def test_a_policy_that_cannot_be_read_is_replaced(world: World, fresh: bool) -> None:
    """The operator's own command is how it is mended, also from a process that has the one before at hand."""
    await a_later_version_applies(world.store)
    book = PolicyBook(world.store) if fresh else world.book
    assert await book.apply(policy_with(("maxQueue: 3", "maxQueue: 9"))) == 3
    assert (book.active.version, book.unread) == (3, 0)
    await a_later_version_applies(world.store)
    book = PolicyBook(world.store) if fresh else world.book
    assert await book.rollback(1) == 5
    await world.book.reload()
    assert (world.book.active.version, world.book.active.policy.models["big"].max_queue) == (5, 3)


async def test_a_policy_that_cannot_be_read_is_replaced_by_one_of_the_same_digest(world: World) -> None:
    """What a later version knows by a new key, or of a lane on its way out, need not be in the digest of either."""
    digest = world.book.active.policy.digest
    await a_later_version_applies(world.store)
    await world.store.command("HSET", world.store.keys.policy, "digest", digest)
    assert await world.book.rollback(1) == 3
    assert (world.book.active.version, world.book.unread) == (3, 0)
    assert await world.apply() == 3, "the same again changes nothing"


async def test_it_is_not_replaced_over_another_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else was faster: what he applied is seen, and is what the new one comes after."""
    await a_later_version_applies(world.store)
    book, other, run = PolicyBook(world.store), PolicyBook(world.store), world.store.run

    async def overtaken(verb: str, keys: list[str], args: list[object]) -> object:
        monkeypatch.setattr(world.store, "run", run)
        await other.apply(WITHOUT_SMALL)
        return await run(verb, keys, args)

    monkeypatch.setattr(world.store, "run", overtaken)
    assert await book.apply(WITHOUT_SMALL.replace("big:", "large:")) == 4
    assert "big" in book.active.retiring


async def test_a_redis_that_lost_such_a_policy_has_none_that_cannot_be_read(world: World) -> None:
    await a_later_version_applies(world.store)
    await world.book.catch_up()
    await world.store.command("DEL", world.store.keys.policy)
    assert await world.book.catch_up() is world.book.active and world.book.unread == 0


async def test_nobody_is_let_in_or_refused_by_an_older_policy_than_the_active_one(world: World) -> None:
    """The active one may have the model that is asked for, and room in its lane."""
    await world.warm(big=2)
    await a_later_version_applies(world.store)
    for asked in ("big", "new", "big"):
        record = JobRecord(id=world.new_id(), asked=asked, keep_ms=10**9)
        async with world.refused(errors.PolicyUnreadable):
            await admission.admit(world.store, world.book, world.fleet, record, b"{}")
            await world.book.catch_up()
    assert world.book.unread == 2


async def test_a_due_job_waits_while_the_active_policy_cannot_be_read(world: World) -> None:
    """It is left where it is, and given up on at its end all the same."""
    await world.warm(big=0, small=1)
    job_id = await world.submit()
    await a_later_version_applies(world.store)
    world.now += 2_000
    assert (await world.due.look(job_id)).outcome == "not_due"
    world.now += 20_000
    assert (await world.due.look(job_id)).outcome == "expired"
    await world.healthy()


async def test_chores_go_on_beside_a_policy_that_cannot_be_read(world: World) -> None:
    """But what was learned of a model is kept, since it may be one of the policy's."""
    learned = world.store.keys.model("new")
    await world.store.command("HSET", learned, "load_ms", 9)
    await a_later_version_applies(world.store)
    await chores.sweep(world.store, world.book)
    await chores.forget(world.store, world.book)
    assert await world.store.command("EXISTS", learned)
    await world.book.rollback(1)
    await chores.forget(world.store, world.book)
    assert not await world.store.command("EXISTS", learned)
