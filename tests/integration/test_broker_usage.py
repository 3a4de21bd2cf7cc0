"""What is counted of each way in which a job can go, on which day, for how long, and how it is read again."""

from collections import Counter
from datetime import UTC, date, datetime
from typing import Any

import pytest

from broker import errors, jobs, usage
from broker.figures import NOBODY, By
from broker.refusals import Refusals
from broker.usage_report import Report
from tests.support.broker_world import START, World, policy_with, until_gone
from tests.support.counted import counted
from tests.support.invariants import take
from workers import chores

ROOMY = (("maxQueue: 3", "maxQueue: 99"), ("maxQueue: 2", "maxQueue: 99"), ("20000", "1000000"))
DAY_MS = 86_400_000
MIDNIGHT = START - START % DAY_MS + DAY_MS
TODAY, TOMORROW = (datetime.fromtimestamp((MIDNIGHT + ms) / 1000, UTC).date() for ms in (-1, 0))
TOKENS = {"prompt_tokens": 100, "cached_tokens": 60, "completion_tokens": 5}


async def serve(world: World, job_id: str, *, after_ms: int = 0, told: dict[str, Any] | None = None) -> None:
    """Claims a job, has its first token after a while, and finishes it."""
    held = await world.claim(job_id)
    world.now += after_ms
    await jobs.first_token(world.store, held, b"one")
    await jobs.end(world.store, held, "finish", seq=1, usage=TOKENS if told is None else told)


async def report(world: World, since: str, until: str = "", *by: str, caller: str | None = None) -> dict[str, Any]:
    found = Report(by, caller=caller)
    first, last = await usage.days(world.store, since, until)
    await usage.tell(world.store, found, first, last)
    return found.as_json(first, last)


async def test_each_caller_lane_and_model_is_counted_for_itself(world: World) -> None:
    await world.apply(policy_with(*ROOMY))
    for caller, lane in (("ann", "big"), ("ann", "big"), ("ci", "big"), ("ann", "side"), ("ci", "big.batch")):
        await serve(world, await world.submit(lane, caller=caller), after_ms=300)
    promoted = await world.submit(caller="ci")
    await world.promote(promoted, "small")
    world.now += 1_700
    await serve(world, promoted, after_ms=301, told={})
    done = {"done/in_time/320": 1, "tokens_in": 100, "tokens_cached": 60, "tokens_out": 5, "running_ms": 300}
    batch = {("done" if name.startswith("done") else name): amount for name, amount in done.items()}
    assert await counted(world.store) == {
        "ann:big:big:big": {name: 2 * amount for name, amount in done.items()},
        "ci:big:big:big": done | {"promoted/small": 1},
        "ann:side:small:small": done,
        "ci:big.batch:big:big": batch,
        "ci:small:big:small": {"done/late/2048": 1, "untold": 1, "running_ms": 301, "queued_ms": 1_700},
    }
    models = {row["model"]: row for row in (await report(world, "1d", "", "model"))["rows"]}
    assert (models["big"]["asked"], models["big"]["by_other"], models["big"]["promotions"]) == (5, 1, 1)
    assert (models["big"]["judged"], models["big"]["in_time_asked"]) == (4, 3)
    assert (models["small"]["asked"], models["small"]["tokens_in"]) == (1, 100)


async def test_every_end_is_counted_once_with_its_reason(world: World) -> None:
    """And what is refused because it came too late is counted by nobody."""
    await world.apply(policy_with(*ROOMY))
    failed = await world.stream(await world.submit())
    world.now += 700
    await jobs.end(world.store, failed, "fail", error=errors.RuntimeFailed("broke"))
    with pytest.raises(errors.AlreadyEnded):
        await jobs.end(world.store, failed, "finish", seq=1, usage=TOKENS)
    quick, patient = await world.submit(), await world.submit()
    await jobs.cancel(world.store, quick)
    world.now += 2_001
    await jobs.cancel(world.store, patient)
    late = await world.submit("side", give_up_within_ms=5_000)
    world.now += 5_000
    assert (await world.due.look(late)).outcome == "expired"
    assert await counted(world.store) == {
        "anonymous:big:big:big": {
            "failed/runtime_failed/in_time/0": 1, "running_ms": 700, "cancelled": 1, "cancelled/no_token": 1,
            "queued_ms": 2_001,
        },
        "anonymous:side:small:small": {"expired/no_token": 1, "queued_ms": 5_000},
    }  # fmt: skip


async def test_slot_time_before_a_put_back_is_kept_and_is_no_waiting(world: World) -> None:
    """Given back, moved while it was held, lost with its worker: every hold counts, and the job only once."""
    await world.apply(policy_with(*ROOMY))
    job_id = await world.submit()
    held = await world.claim(job_id)
    world.now += 400
    await jobs.release(world.store, held, loss=False, max_losses=3, error=errors.WorkerLost("drains"))
    await world.claim(job_id, lease_ms=1_000)
    world.now += 1_000
    assert await world.recover(job_id)
    world.now += 70
    await world.claim(job_id)
    world.now += 60
    await world.promote(job_id, "small")
    world.now += 30
    await serve(world, job_id, after_ms=200)
    found = await counted(world.store)
    assert found["anonymous:big:big:big"] == {
        "released": 1, "recovered/queued": 1, "promoted/small": 1, "running_ms": 400 + 1_000 + 60,
    }  # fmt: skip
    small = found["anonymous:small:big:small"]
    assert (small["running_ms"], small["queued_ms"]) == (200, 70 + 30)
    total = (await report(world, "1d"))["total"]
    assert (total["asked"], total["done"], total["running_ms"]) == (1, 1, 1_660)


async def test_an_answer_that_two_attempts_made_is_counted_as_one(world: World) -> None:
    """Its first token is the first attempt's, its tokens are those of the whole, and both held their slots."""
    await world.apply(policy_with(*ROOMY))
    job_id = await world.submit(stream=True)
    await world.store.command("HSET", world.store.keys.job(job_id), "seen", "1")
    world.now += 60
    held = await world.claim(job_id, lease_ms=1_000)
    world.now += 240
    await jobs.first_token(world.store, held, b"one")
    world.now += 760
    assert await world.recover(job_id, go_on=jobs.GoOn(last_seq=1, within_ms=9_000))
    world.now += 500
    held = await world.claim(job_id)
    world.now += 400
    await jobs.first_token(world.store, held, b"two", seq=2)
    await jobs.end(world.store, held, "finish", seq=2, usage=TOKENS)
    assert await counted(world.store) == {
        "anonymous:big:big:big": {
            "done/in_time/320": 1, "recovered/continued": 1, "tokens_in": 100, "tokens_cached": 60, "tokens_out": 5,
            "running_ms": 1_000 + 400, "queued_ms": 60 + 500,
        },
    }  # fmt: skip


async def test_a_job_counts_on_the_utc_day_of_its_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the millisecond, and whatever the machine's own zone thinks of the date."""
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    await world.apply(policy_with(*ROOMY))
    world.now = MIDNIGHT - 1_000
    before, after = await world.submit(caller="ann"), await world.submit(caller="ann")
    await serve(world, before, after_ms=999)
    await serve(world, after, after_ms=1)
    rows = (await report(world, "2d", "", "day"))["rows"]
    assert [(row["day"], row["done"]) for row in rows] == [(f"{TODAY}", 1), (f"{TOMORROW}", 1)]
    assert (await report(world, "1d"))["since"] == f"{TOMORROW}"
    assert await usage.days(world.store, "2w", "") == (date.fromordinal(TOMORROW.toordinal() - 13), TOMORROW)
    assert await usage.days(world.store, f"{TODAY}", f"{TODAY}") == (TODAY, TODAY)
    assert (await report(world, f"{TODAY}", f"{TODAY}", caller="ann"))["total"]["done"] == 1
    assert (await report(world, "7d", "", "caller", caller="bob"))["rows"] == []


@pytest.mark.parametrize(
    ("since", "until", "param"),
    [("x", "", "since"), ("", "", "since"), ("0d", "", "since"), ("401d", "", "since"), ("9999999999w", "", "since"),
     ("7d", "yesterday", "until"), ("2026-11-23", "2026-11-22", "since"), ("2020-01-01", "2026-01-01", "since"),
     ("٣d", "", "since"), ("-1d", "", "since"), ("7d", "0001-01-02", "since")],
)  # fmt: skip
async def test_a_span_that_cannot_be_read_is_a_sentence(world: World, since: str, until: str, param: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        await usage.days(world.store, since, until)
    assert caught.value.param == param


@pytest.mark.parametrize("days", [90, 7, 400])
async def test_counters_go_so_many_days_after_the_day_as_the_policy_says(world: World, days: int) -> None:
    """They begin with a lifetime of their own, in case that no chore ever runs."""
    await world.apply(policy_with(*ROOMY) + f"usageDays: {days}\n")
    world.now = MIDNIGHT - DAY_MS // 2
    await serve(world, await world.submit())
    keys = [world.store.keys.usage(f"{TODAY}"), world.store.keys.figures(f"{TODAY}", "anonymous:big:big:big")]
    for key in keys:
        assert 91 * 86_400 - 5 <= await world.store.command("TTL", key) <= 91 * 86_400
    await chores.forget(world.store, world.book)
    for key in keys:
        assert abs(await world.store.command("PTTL", key) - (days * DAY_MS + DAY_MS // 2)) < 5_000
    world.now = MIDNIGHT + days * DAY_MS + 1
    await chores.forget(world.store, world.book)
    await until_gone(world, lambda s: s.keys.keys() & set(keys))


async def test_refusals_wait_for_redis_and_are_written_together(world: World) -> None:
    """By code, under the lane and the model that were asked for; a key that nobody has under one name."""
    await world.apply(policy_with(*ROOMY))
    refusals = Refusals(world.store, world.book)
    asked = await world.job(await world.submit("side", caller="ann"))
    before = (await take(world.store)).keys
    for _ in range(3):
        refusals.note(errors.LaneFull("far"), caller="ann", job=asked)
    refusals.note(errors.ContextTooLong("too long"), caller="ann", job=asked)
    refusals.note(errors.Unauthorized("who?"), caller="", job=None)
    refusals.note(errors.BadRequest("no JSON"), caller="ann", job=None)
    assert (await take(world.store)).keys == before, "a refusal makes no trip of its own"
    await refusals.write()
    await refusals.write()
    assert await counted(world.store) == {
        "ann:side:small:small": {"refused/lane_full": 3, "refused/context_length_exceeded": 1},
        f"ann:{NOBODY}:{NOBODY}:{NOBODY}": {"refused/invalid_request": 1},
        By(NOBODY, NOBODY, NOBODY, NOBODY).spelled: {"refused/invalid_api_key": 1},
    }
    rows = {row["caller"]: row for row in (await report(world, "1d", "", "caller"))["rows"]}
    assert (rows["ann"]["asked"], rows["ann"]["refused"], rows[NOBODY]["refused"]) == (5, 5, 1)
    assert (await world.healthy()).jobs.keys() == {asked.id}


async def test_refusals_of_an_outage_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals, run = Refusals(world.store, world.book), world.store.run
    refusals.note(errors.BadRequest("no"), caller="ann", job=None)

    async def away(*_: Any) -> Any:
        raise errors.BrokerUnavailable("away")

    monkeypatch.setattr(world.store, "run", away)
    await refusals.write()
    refusals.note(errors.BadRequest("no"), caller="ann", job=None)
    monkeypatch.setattr(world.store, "run", run)
    await refusals.write()
    assert await counted(world.store) == {"ann:-:-:-": {"refused/invalid_request": 2}}


async def test_a_large_day_is_read_whole(world: World) -> None:
    """A hundred callers with three lanes each, in pieces."""
    day = f"{TODAY}"
    names = [By(f"caller-{number}", lane, "big", "big") for number in range(100) for lane in ("a", "b", "c")]
    for by in names:
        await world.store.command("HSET", world.store.keys.usage(day), by.spelled, 1)
        await world.store.command("HSET", world.store.keys.figures(day, by.spelled), "done/in_time/448", 2)
    found = await report(world, day, day, "lane")
    assert Counter({row["lane"]: row["done"] for row in found["rows"]}) == {"a": 200, "b": 200, "c": 200}
    assert found["total"]["first_token_p50_ms"] == found["total"]["first_token_p99_ms"] == 432


async def test_a_day_that_an_older_version_began_is_gone_on_with(world: World) -> None:
    """It counted in the day's own hash: those are left alone, and what ends now is counted."""
    await world.apply(policy_with(*ROOMY))
    older = {"tokens_in:anonymous:big:false": 7, "ended:big:done": 1, "first_token:big:asked": 1, "released:big": 1}
    day = f"{datetime.fromtimestamp(world.now / 1000, UTC).date()}"
    await world.store.command("HSET", world.store.keys.usage(day), *(word for pair in older.items() for word in pair))
    await serve(world, await world.submit())
    assert (await counted(world.store))["anonymous:big:big:big"]["tokens_in"] == 100
    assert (await report(world, "1d"))["total"]["asked"] == 1
