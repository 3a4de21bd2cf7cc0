"""Webhooks from the end of a job to its caller's endpoint, on a virtual clock: late, in vain, twice, in order."""

import asyncio
import json

import pytest
import standardwebhooks

from broker import errors, jobs, lanes, webhook_secrets, webhooks
from broker.callers import Keys, Rights
from broker.keybook import KeyBook
from broker.keyspace import EVERYBODY
from broker.lifecycle import State
from broker.webhooks import Delivery
from tests.support.broker_world import World, a_later_version_applies, policy_with
from tests.support.invariants import take
from tests.support.webhook_endpoint import URL, Came, Endpoint, secret_of, verified
from workers.webhooks import HORIZON_MS, OPEN_MS_MAX, PAUSE_MS_MAX, Answer

HOUR_MS = 3_600_000
DOWN = Answer(0, "no connection could be made")


@pytest.fixture
def endpoint(world: World) -> Endpoint:
    return Endpoint(world)


async def ended(world: World, count: int = 1, **fields: object) -> list[str]:
    """Jobs with a webhook that have been cancelled."""
    found = []
    for _ in range(count):
        found.append(await world.submit("big", **({"mode": "async", "webhook": URL} | fields)))
        await jobs.cancel(world.store, found[-1])
    return found


async def delivery_of(world: World, job_id: str) -> Delivery:
    (found,) = [one for one in await webhooks.listed(world.store, limit=200) if one.job == job_id]
    return found


async def pass_time(world: World, endpoint: Endpoint, until: int, *, step_ms: int = 60_000) -> None:
    """Rounds go on, one each step of the clock."""
    courier = endpoint.courier()
    while world.now < until:
        world.now += step_ms
        await courier.round()


# --- the event -------------------------------------------------------------------------------------------------------


async def test_every_end_owes_one_event_and_only_where_somebody_wants_it(world: World, endpoint: Endpoint) -> None:
    secret = await secret_of(world)
    await world.warm(big=2, small=1, far=0)
    wants = {"mode": "async", "webhook": URL}
    done, failed = await world.stream(await world.submit(**wants)), await world.stream(await world.submit(**wants))
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    await jobs.end(world.store, done, "finish", seq=2, data=b"two", usage=usage)
    broke = errors.RuntimeFailed("the runtime broke: it says 'my prompt'")
    await jobs.end(world.store, failed, "fail", error=broke)
    (cancelled,) = await ended(world)
    expired, silent = await world.submit(give_up_within_ms=10, **wants), await world.submit()
    await jobs.cancel(world.store, silent)
    lost = await world.submit(**wants)
    await world.claim(lost)
    world.now += 20_000
    await lanes.expire(world.store, await world.job(expired), errors.JobExpired("no slot was free"))
    await world.recover(lost, max_losses=0)
    assert await world.store.command("XLEN", world.store.keys.outbox) == 5

    await endpoint.courier().round()

    told = {came.job: came for came in endpoint.came}
    assert {job: came.said["type"] for job, came in told.items()} == {
        done.job_id: "job.done", failed.job_id: "job.failed", cancelled: "job.cancelled", expired: "job.expired",
        lost: "job.failed",
    }  # fmt: skip
    said = verified(secret, told[done.job_id].headers, told[done.job_id].body, at_ms=world.now)
    at = f"/v1/jobs/{done.job_id}"
    assert said == {
        "type": "job.done",
        "timestamp": "2026-09-21T14:13:20.000Z",
        "data": {
            "id": done.job_id, "state": "done", "error": None, "usage": usage,
            "links": {"self": at, "events": at + "/events", "result": at + "/result"},
        },
    }  # fmt: skip
    assert told[failed.job_id].said["data"]["error"] == {"code": "runtime_failed", "message": "the runtime broke"}
    assert told[lost].said["data"]["error"]["code"] == "worker_lost"
    assert len({came.id for came in endpoint.came}) == 5
    await world.healthy()


async def test_metadata_of_a_job_goes_along(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    job_id = await world.submit(mode="async", webhook=URL)
    await world.store.command("HSET", world.store.keys.job(job_id), "metadata", '{"run":"17"}')
    await jobs.cancel(world.store, job_id)
    await endpoint.courier().round()
    assert endpoint.came[0].said["data"]["metadata"] == {"run": "17"}


async def test_an_event_outlives_its_job(world: World, endpoint: Endpoint) -> None:
    """Its keep time may be over before a scheduler runs again."""
    await secret_of(world)
    (job_id,) = await ended(world)
    await world.store.command("DEL", world.store.keys.job(job_id))
    await endpoint.courier().round()
    assert [came.job for came in endpoint.taken] == [job_id]


# --- late, in vain ---------------------------------------------------------------------------------------------------


async def test_an_endpoint_that_is_down_for_an_hour_gets_all_afterwards(world: World, endpoint: Endpoint) -> None:
    secret = await secret_of(world)
    began = world.now
    endpoint.answers = lambda came: DOWN if came.at <= began + HOUR_MS else Answer(204)
    ids: list[str] = []
    courier = endpoint.courier()
    while world.now < began + HOUR_MS:
        ids += await ended(world, 2)
        world.now += 4 * 60_000
        await courier.round()
    assert not endpoint.taken and len(ids) == 30
    assert len(endpoint.came) < 60, "it was left alone while it was down"

    await pass_time(world, endpoint, world.now + OPEN_MS_MAX + PAUSE_MS_MAX)

    assert sorted(came.job for came in endpoint.taken) == sorted(ids), "each once"
    ids_of: dict[str, set[str]] = {}
    for came in endpoint.came:
        ids_of.setdefault(came.job, set()).add(came.id)
        assert verified(secret, came.headers, came.body, at_ms=came.at)["data"]["id"] == came.job
    assert all(len(found) == 1 for found in ids_of.values()), "a repeat has the same id"
    s = await world.healthy()
    assert not s.of("webhook_due:<digest>") and not s.of("webhooks") and not s.of("webhook_line:<id>")


async def test_one_that_always_fails_ends_dead_with_its_history(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    endpoint.answers = lambda _: Answer(500, "it answered 500")
    (job_id,) = await ended(world)
    began = world.now

    await pass_time(world, endpoint, world.now + HORIZON_MS + HOUR_MS)

    found = await delivery_of(world, job_id)
    assert (found.state, found.next_at) == ("dead", 0)
    assert HORIZON_MS - 2 * PAUSE_MS_MAX < found.ended_at - began <= HORIZON_MS
    assert {(one.status, one.error) for one in found.attempts} == {(500, "it answered 500")}
    assert len(found.attempts) == webhooks.TRIES_KEPT and len(endpoint.came) > webhooks.TRIES_KEPT
    pauses = [b.at - a.at for a, b in zip(endpoint.came[8:], endpoint.came[9:], strict=False)]
    assert max(pauses) <= PAUSE_MS_MAX + 2 * 60_000
    figures = await webhooks.figures(world.store)
    assert figures.outcomes == {"delivered": 0, "failed": len(endpoint.came) - 1, "dead": 1}
    await world.healthy()

    endpoint.answers = lambda _: Answer(200)
    await webhooks.redeliver(world.store, found.id)
    await endpoint.courier().round()
    assert [came.id for came in endpoint.taken] == [found.id]
    assert (await delivery_of(world, job_id)).state == "delivered"
    await world.healthy()


async def test_what_an_open_breaker_kept_back_ends_with_its_horizon_too(world: World, endpoint: Endpoint) -> None:
    """One trial every five minutes must not keep a thousand events alive for days."""
    await secret_of(world)
    endpoint.answers = lambda _: DOWN
    ids = await ended(world, 60)
    await pass_time(world, endpoint, world.now + HORIZON_MS + HOUR_MS + OPEN_MS_MAX, step_ms=5 * 60_000)
    states = {one.job: one.state for one in await webhooks.listed(world.store, limit=200)}
    assert states == dict.fromkeys(ids, "dead")
    await world.healthy()


# --- twice, in order -------------------------------------------------------------------------------------------------


async def test_a_killed_courier_s_delivery_is_taken_over_under_the_same_id(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    (job_id,) = await ended(world)
    asked, never = asyncio.Event(), asyncio.Event()
    first = endpoint.courier()
    send = first._send

    async def hangs(*args: object) -> Answer:
        await send(*args)  # type: ignore[arg-type]
        asked.set()
        await never.wait()
        return Answer(200)

    first._send = hangs
    killed = asyncio.create_task(first.round())
    await asked.wait()
    killed.cancel()
    await asyncio.gather(killed, return_exceptions=True)

    second = endpoint.courier()
    assert await second.round() == 0, "it is the first one's as long as its lease lasts"
    world.now += webhooks.LEASE_MS
    assert await second.round() == 1
    assert [came.job for came in endpoint.came] == [job_id, job_id]
    assert len({(came.id, came.body) for came in endpoint.came}) == 1
    assert (await delivery_of(world, job_id)).state == "delivered"


async def test_two_couriers_at_once_deliver_everything_once(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    ids = await ended(world, 40)
    await asyncio.gather(*(endpoint.courier().round() for _ in range(3)))
    assert sorted(came.job for came in endpoint.came) == sorted(ids)


async def test_who_comes_back_late_changes_nothing(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    await ended(world)
    await webhooks.gather(world.store, limit=9)
    (place,) = await webhooks.due(world.store, limit=9)
    rules = {"most": 9, "failures_max": 5, "horizon_ms": HORIZON_MS}
    (late,) = await webhooks.take(world.store, place, **rules)
    world.now += webhooks.LEASE_MS
    (again,) = await webhooks.take(world.store, place, **rules)
    assert again.attempt == late.attempt + 1 and again.delivery.id == late.delivery.id
    told = webhooks.Try(world.now, 200, 5)
    async with world.refused(errors.StaleAttempt):
        await webhooks.note(world.store, late, "delivered", told)
    await webhooks.note(world.store, again, "failed", told, retry_after_ms=9)
    async with world.refused(errors.StaleAttempt):
        await webhooks.note(world.store, replace_attempt(again, 7), "dead", told)


def replace_attempt(taken: webhooks.Taken, attempt: int) -> webhooks.Taken:
    return webhooks.Taken(taken.delivery, attempt, taken.body, taken.endpoint, taken.failures)


async def test_events_of_a_job_arrive_in_their_order(world: World, endpoint: Endpoint) -> None:
    """The second waits until the first has arrived or was given up on, whatever else is due."""
    await secret_of(world)
    (job_id,) = await ended(world)
    first = (await world.store.command("XRANGE", world.store.keys.outbox, "-", "+"))[0][1]
    fields = dict(first) if isinstance(first, dict) else dict(zip(first[::2], first[1::2], strict=True))
    for number in (2, 3):
        later = fields | {b"id": b"msg_later_%d" % number, b"type": b"job.done"}
        await world.store.command("XADD", world.store.keys.outbox, "*", *(x for pair in later.items() for x in pair))
    refusing = [True]
    endpoint.answers = lambda _: Answer(400, "it answered 400") if refusing[0] else Answer(200)
    await pass_time(world, endpoint, world.now + HOUR_MS)
    assert len({came.id for came in endpoint.came}) == 1
    refusing[0] = False
    await pass_time(world, endpoint, world.now + HOUR_MS)
    assert [came.id for came in endpoint.taken] == [endpoint.came[0].id, "msg_later_2", "msg_later_3"]
    assert {came.job for came in endpoint.came} == {job_id}


# --- breaker ---------------------------------------------------------------------------------------------------------


async def test_the_breaker_opens_lets_one_through_and_closes(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    up = [False]
    endpoint.answers = lambda _: Answer(200) if up[0] else DOWN
    courier = endpoint.courier()
    await ended(world, 10)
    await courier.round()
    tried = len(endpoint.came)
    assert tried == 8, "two handfuls, of which the second brought the failures to the limit"
    for _ in range(5):
        await courier.round()
    world.now += 10_000
    await courier.round()
    assert len(endpoint.came) == tried, "it is left alone"

    world.now += OPEN_MS_MAX
    await courier.round()
    assert len(endpoint.came) == tried + 1, "a single trial"
    up[0] = True
    world.now += OPEN_MS_MAX
    await courier.round()
    assert len(endpoint.taken) == 10
    assert not (await take(world.store)).of("webhook_endpoint:<digest>")


async def test_a_broken_endpoint_holds_up_no_other(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    endpoint.answers = lambda came: DOWN if came.target.host == "down.example.com" else Answer(200)
    await ended(world, 20, webhook="https://down.example.com/")
    fine = await ended(world, 20)
    await endpoint.courier().round()
    assert sorted(came.job for came in endpoint.taken) == sorted(fine)


async def test_one_event_that_is_refused_holds_up_no_other(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    bad, *fine = await ended(world, 12)
    endpoint.answers = lambda came: Answer(422, "no") if came.job == bad else Answer(200)
    await pass_time(world, endpoint, world.now + HOUR_MS)
    assert sorted(came.job for came in endpoint.taken) == sorted(fine)
    assert (await delivery_of(world, bad)).state == "pending"


# --- where it may go -------------------------------------------------------------------------------------------------


async def test_a_name_that_turns_inward_is_not_followed(world: World, endpoint: Endpoint) -> None:
    """It was public when the job was accepted."""
    await secret_of(world)
    endpoint.names["ci.example.com"] = [["93.184.215.14"], ["127.0.0.1"]]
    await webhooks.accept(world.store, caller="anonymous", url=URL, allow=[], resolve=endpoint.resolve)
    (job_id,) = await ended(world)
    await endpoint.courier().round()
    assert not endpoint.came
    (told,) = (await delivery_of(world, job_id)).attempts
    assert told.status == 0 and "webhooks do not go to ci.example.com" in told.error


async def test_a_slow_resolver_is_no_endpoints_fault(world: World, endpoint: Endpoint) -> None:
    """Its name was not asked for: that may be others' doing, and breaks nothing."""
    await secret_of(world)
    (job_id,) = await ended(world)

    async def slow(_host: str, _port: int) -> list[str]:
        raise TimeoutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint, "resolve", slow)
        await webhooks.accept(world.store, caller="anonymous", url=URL, allow=[], resolve=endpoint.resolve)
        await pass_time(world, endpoint, world.now + 600_000)
    told = await delivery_of(world, job_id)
    assert told.state == "pending" and len(told.attempts) > 5
    assert {one.error for one in told.attempts} == {"its host was not resolved in time"}
    await pass_time(world, endpoint, world.now + HOUR_MS)
    assert [came.job for came in endpoint.taken] == [job_id]


async def test_a_request_goes_to_the_addresses_that_were_checked(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    endpoint.names["ci.example.com"] = [["93.184.215.14", "2606:4700::1"], ["10.0.0.1"]]
    await ended(world)
    await endpoint.courier().round()
    assert endpoint.came[0].addresses == ["93.184.215.14", "2606:4700::1"]


async def test_the_policy_opens_and_closes_an_inner_network(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    endpoint.names["ci.internal"] = [["10.0.0.7"]]
    url = "http://ci.internal:8080/hook"
    with pytest.raises(errors.AddressRefused, match=r"allow: \['ci.internal'\]"):
        await webhooks.accept(world.store, caller="anonymous", url=url, allow=[], resolve=endpoint.resolve)
    await world.apply(policy_with(("models:", "webhooks: { allow: [ci.internal] }\nmodels:")))
    allow = world.book.active.policy.webhooks.allow
    await webhooks.accept(world.store, caller="anonymous", url=url, allow=allow, resolve=endpoint.resolve)
    await ended(world, webhook=url)
    await endpoint.courier().round()
    assert len(endpoint.taken) == 1
    await world.apply()
    await ended(world, webhook=url)
    await endpoint.courier().round()
    assert len(endpoint.came) == 1


async def test_what_is_not_accepted(world: World, endpoint: Endpoint) -> None:
    async def accept(url: str, caller: str = "ann") -> None:
        await webhooks.accept(world.store, caller=caller, url=url, allow=[], resolve=endpoint.resolve)

    async with world.refused(errors.BadRequest) as told:
        await accept(URL)
    assert "`gateway webhook secret new`" in str(told.value) and told.value.param == "webhook"  # type: ignore[attr-defined]
    await secret_of(world, "ann")
    await accept(URL)
    endpoint.names = {"nowhere.example": [[]], "inner.example": [["192.168.0.1"]]}
    for url, error in (
        ("no url", errors.BadRequest), ("https://nowhere.example/", errors.BadRequest),
        ("https://inner.example/", errors.AddressRefused),
    ):  # fmt: skip
        async with world.refused(error):
            await accept(url)
    async with world.refused(errors.BadRequest):
        await accept(URL, "bob")


# --- secrets ---------------------------------------------------------------------------------------------------------


async def sent(world: World, endpoint: Endpoint) -> Came:
    await ended(world)
    await endpoint.courier().round()
    return endpoint.came[-1]


def signs(secret: str, came: Came) -> bool:
    try:
        verified(secret, came.headers, came.body, at_ms=came.at)
    except standardwebhooks.WebhookVerificationError:
        return False
    return True


async def test_while_a_secret_is_replaced_both_sign(world: World, endpoint: Endpoint) -> None:
    old = await secret_of(world)
    new = (await webhook_secrets.rotate(world.store, "anonymous", overlap_ms=HOUR_MS)).secret
    came = await sent(world, endpoint)
    assert signs(old, came) and signs(new, came) and came.headers["webhook-signature"].count(" ") == 1
    world.now += HOUR_MS
    came = await sent(world, endpoint)
    assert not signs(old, came) and signs(new, came)
    newest = (await webhook_secrets.rotate(world.store, "anonymous", overlap_ms=0)).secret
    came = await sent(world, endpoint)
    assert not signs(new, came) and signs(newest, came)


async def test_a_repeat_is_signed_with_the_secrets_of_its_own_moment(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    endpoint.answers = lambda _: Answer(400)
    await ended(world)
    await endpoint.courier().round()
    new = (await webhook_secrets.rotate(world.store, "anonymous", overlap_ms=0)).secret
    await pass_time(world, endpoint, world.now + 60_000)
    first, second = endpoint.came
    assert signs(new, second) and not signs(new, first)
    assert first.headers["webhook-timestamp"] != second.headers["webhook-timestamp"] and first.id == second.id


async def test_what_is_refused_of_secrets_leaves_no_mark(world: World) -> None:
    store = world.store
    for wish in (webhook_secrets.rotate(store, "ann"), webhook_secrets.revoke(store, "ann", "x")):
        async with world.refused(errors.WishRefused):
            await wish
    await secret_of(world, "ann")
    async with world.refused(errors.WishRefused):
        await webhook_secrets.make(store, "ann")
    for _ in range(webhook_secrets.MOST - 1):
        await webhook_secrets.rotate(store, "ann")
    async with world.refused(errors.WishRefused):
        await webhook_secrets.rotate(store, "ann")
    listed = await webhook_secrets.listed(store, "ann")
    assert len(listed) == webhook_secrets.MOST and [one.ends_at > 0 for one in listed] == [False, True, True, True]
    for one in listed:
        await webhook_secrets.revoke(store, "ann", one.id)
    assert await webhook_secrets.listed(store, "ann") == []
    await world.healthy()


async def test_without_a_secret_an_event_is_given_up_on_until_somebody_sends_it_again(
    world: World, endpoint: Endpoint
) -> None:
    (job_id,) = await ended(world)
    await endpoint.courier().round()
    found = await delivery_of(world, job_id)
    assert found.state == "dead" and "no webhook secret" in found.attempts[0].error and not endpoint.came
    await secret_of(world)
    await webhooks.redeliver(world.store, found.id)
    await endpoint.courier().round()
    assert [came.id for came in endpoint.taken] == [found.id]


async def test_revoking_a_caller_takes_its_secrets(world: World, endpoint: Endpoint) -> None:
    book = KeyBook(world.store, Keys.parse("boss:s"))
    await book.new("ann", Rights(), by="boss")
    await secret_of(world, "ann")
    waits = await world.submit(mode="async", webhook=URL, caller="ann")
    await book.revoke("ann", by="boss")
    assert await webhook_secrets.listed(world.store, "ann") == []
    await endpoint.courier().round()
    assert not endpoint.came and (await delivery_of(world, waits)).state == "dead"


async def test_a_revoke_that_breaks_off_is_finished_by_the_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys are gone by then, and the secrets with them: the next caller of that name has none. What waits is still
    there to be cancelled."""
    book = KeyBook(world.store, Keys.parse("boss:s"))
    await book.new("ann", Rights(), by="boss")
    await secret_of(world, "ann")
    waits = await world.submit(mode="async", caller="ann")

    async def redis_is_away(*_: object) -> int:
        raise errors.BrokerUnavailable("Redis does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(book, "_cancel_waiting", redis_is_away)
        with pytest.raises(errors.BrokerUnavailable):
            await book.revoke("ann", by="boss")
    assert await webhook_secrets.listed(world.store, "ann") == []
    assert await book.revoke("ann", by="boss") == []
    job = await world.job(waits)
    assert (job.state, job.error_message) == (State.CANCELLED, "its key was revoked")
    async with world.refused(errors.UnknownCaller):
        await book.revoke("ann", by="boss")


# --- by hand, lists --------------------------------------------------------------------------------------------------


async def test_one_that_waits_for_its_next_attempt_goes_at_once_by_hand(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    endpoint.answers = lambda _: DOWN
    (job_id, *_) = await ended(world, 10)
    await endpoint.courier().round()
    endpoint.answers = lambda _: Answer(200)
    assert await endpoint.courier().round() == 0, "the breaker is open"
    world.now += 20_000  # the others are due before it
    found = await webhooks.redeliver(world.store, (await delivery_of(world, job_id)).id)
    await endpoint.courier().round()
    assert endpoint.taken[0].id == found.id
    await world.healthy()


async def test_one_that_is_under_way_is_not_sent_beside_itself(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    (job_id,) = await ended(world)
    await webhooks.gather(world.store, limit=9)
    (place,) = await webhooks.due(world.store, limit=9)
    await webhooks.take(world.store, place, most=9, failures_max=5, horizon_ms=HORIZON_MS)
    await webhooks.redeliver(world.store, (await delivery_of(world, job_id)).id)
    assert await endpoint.courier().round() == 0


async def test_only_its_own_are_a_caller_s_to_see_and_to_send(world: World) -> None:
    for caller in ("ann", "bob"):
        await ended(world, 3, caller=caller)
    await webhooks.gather(world.store, limit=9)
    mine = await webhooks.listed(world.store, caller="ann")
    assert {one.caller for one in mine} == {"ann"} and len(mine) == 3
    assert len(await webhooks.listed(world.store)) == 6
    rest = await webhooks.listed(world.store, caller="ann", limit=9, after=mine[0].id)
    assert [one.id for one in rest] == [one.id for one in mine[1:]]
    async with world.refused(errors.NoSuchDelivery):
        await webhooks.redeliver(world.store, mine[0].id, caller="bob")
    async with world.refused(errors.NoSuchDelivery):
        await webhooks.redeliver(world.store, "msg_nobody")
    async with world.refused(errors.NoSuchDelivery):
        await webhooks.listed(world.store, caller="bob", after=mine[0].id)


async def test_a_list_goes_on_behind_those_that_are_kept_no_more(world: World) -> None:
    """A day later those that were delivered are gone, and those that were given up on are not."""
    await ended(world, 5)
    await webhooks.gather(world.store, limit=9)
    every = [one.id for one in await webhooks.listed(world.store)]
    for forgotten in every[:3]:
        await world.store.command("DEL", world.store.keys.webhook(forgotten))
    assert [one.id for one in await webhooks.listed(world.store, limit=2)] == every[3:]
    assert [one.id for one in await webhooks.listed(world.store, limit=1, after=every[3])] == every[4:]
    assert await world.store.command("ZCARD", world.store.keys.webhook_list(EVERYBODY)) == 2


async def test_nothing_of_a_prompt_or_an_answer_is_in_the_outbox(world: World) -> None:
    await world.warm(big=2, small=1, far=0)
    held = await world.stream(await world.submit(mode="async", webhook=URL, body=b"secret prompt"), b"secret answer")
    await jobs.end(world.store, held, "fail", error=errors.RuntimeRefused("you said: secret prompt"))
    ((_, values),) = await world.store.command("XRANGE", world.store.keys.outbox, "-", "+")
    assert b"secret" not in json.dumps([str(x) for x in values]).encode()
    assert "secret prompt" in (await world.job(held.job_id)).error_message


async def test_a_url_that_nobody_checked_holds_up_nobody(world: World, endpoint: Endpoint) -> None:
    await secret_of(world)
    await ended(world, webhook="no url at all")
    fine = await ended(world)
    await endpoint.courier().round()
    assert [came.job for came in endpoint.taken] == fine


async def test_webhooks_are_delivered_while_the_active_policy_cannot_be_read(world: World, endpoint: Endpoint) -> None:
    """A newer part applied it; the addresses that the one before allows are those that are known here."""
    await secret_of(world)
    (job_id,) = await ended(world)
    await a_later_version_applies(world.store)
    assert await endpoint.courier().round() == 1
    assert (await delivery_of(world, job_id)).state == "delivered"
