"""A remote provider behind the gateway: nothing of a request that may not leave ever gets there, whatever happens.

The double writes down everything that reaches it, so each test can say that nothing did.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker import errors
from broker.lifecycle import State
from broker.trust import door
from tests.support.fake_provider import FakeProvider
from tests.support.invariants import take
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, until, worker_world
from workers import quarantine, readiness, upkeep

pytestmark = pytest.mark.real

KEY = "sk-test-0123456789-very-secret"
ENV = "EXAMPLE_API_KEY"


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setenv(ENV, KEY)
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


@pytest_asyncio.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    async with FakeProvider(key=KEY).listening() as provider:
        yield provider


def remote(provider: FakeProvider, **keys: Any) -> dict[str, Any]:
    known = {"backend": "openai", "model": "gpt-far", "url": provider.url, "apiKeyEnv": ENV, "trust": "remote"}
    return {**known, "maxConcurrent": 2, "maxQueue": 4, **keys}


async def everything_in_redis(world: World) -> str:
    """Every key of the namespace with all that it holds."""
    store, found = world.store, []
    async for key in store.scan("*"):
        kind = (await store.command("TYPE", key)).decode()
        if kind == "none":  # gone since: arq's keys come and go each second
            continue
        read = {
            "string": ("GET", key), "hash": ("HGETALL", key), "stream": ("XRANGE", key, "-", "+"),
            "zset": ("ZRANGE", key, 0, -1), "list": ("LRANGE", key, 0, -1),
        }[kind]  # fmt: skip
        found.append(f"{key} {await store.command(*read)}")
    return "\n".join(found)


async def test_a_request_that_may_leave_is_answered_with_the_key_of_the_environment(
    world: World, provider: FakeProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """The key goes to the provider and to nobody else; the model wakes with one token and is then left alone."""
    caplog.set_level(logging.DEBUG)
    await world.apply({"far": remote(provider)})
    await world.host()
    assert (await world.model("far")).state == "cold", "nobody pays before somebody asks"
    ask = await world.submit("far", zone="remote")
    record = await ask.end()

    assert (record.state, record.served_by, ask.text, ask.models) == (State.DONE, "far@gpu1", "from afar", {"far"})
    assert provider.prompts == ["hi"] and provider.probes == 1
    assert {request.headers["authorization"] for request in provider.received} == {f"Bearer {KEY}"}
    assert {request.headers["user-agent"] for request in provider.received} == {"warmlane"}
    told = await world.until_model("far", "warm")
    assert (told.runtime, told.slots_total, told.memory_bytes) == ("openai", 2, 0)
    assert told.first_token_ms > 0
    assert KEY not in await everything_in_redis(world) + caplog.text
    assert ENV in await everything_in_redis(world), "the name of the variable is in the policy, so the look was a look"


async def test_without_the_header_nothing_gets_out(world: World, provider: FakeProvider) -> None:
    """Not by asking for it, not by a full lane, not at the cold-start deadline, not by a policy that changes."""
    models = {
        "near": simulated(maxQueue=1, coldStartBudgetMs=50, fallback="far", keepWarm=False, maxWaitMs=1_500,
                          options={"coldStartMs": 60_000}),
        "far": remote(provider),
    }  # fmt: skip
    await world.apply(models)
    await world.host()
    await world.scheduler()
    with pytest.raises(errors.TrustZoneRefused):
        await world.submit("far")
    late = await world.submit("near")
    with pytest.raises(errors.LaneFull):
        await world.submit("near")
    record = await late.end()  # past its deadline many times, and given up in the end

    assert (record.state, record.error, record.promotions) == (State.EXPIRED, "cold_start_deadline", 0)
    assert provider.received == [], "not even a probe"


async def test_a_promotion_leads_nobody_out_and_a_spill_only_whom_it_may(world: World, provider: FakeProvider) -> None:
    """Whoever allowed a request to leave did so for the moment of asking; a full lane is such a moment."""
    models = {
        "near": simulated(maxQueue=1, coldStartBudgetMs=50, fallback="far", keepWarm=False, maxWaitMs=1_500,
                          options={"coldStartMs": 60_000}),
        "far": remote(provider, keepWarm=True),
    }  # fmt: skip
    await world.apply(models)
    await world.host()
    await world.until_model("far", "warm")
    await world.scheduler()
    waits = await world.submit("near", zone="remote", content="waits")
    spills = await world.submit("near", zone="remote", content="spills")

    assert spills.lane == "far"
    assert (await spills.end()).state is State.DONE
    assert ((await waits.end()).state, (await waits.record()).promotions) == (State.EXPIRED, 0)
    assert provider.prompts == ["spills"]


async def test_a_model_that_becomes_remote_gets_no_job_that_came_before(world: World, provider: FakeProvider) -> None:
    """One runs, one waits. Both come back to a lane that leads out now, and neither is claimed there."""
    await world.apply({"m": simulated(maxConcurrent=1, maxQueue=3)})
    await world.warm_host()
    await world.runtime("m").break_with(stall_after_tokens=0)
    runs = await world.submit("m", stream=False, content="runs")
    await runs.until_state(State.CLAIMED)
    waits = await world.submit("m", content="waits")
    await world.apply({"m": remote(provider, keepWarm=True, maxConcurrent=1, maxQueue=3)})
    await world.leave()  # as a crash does, but at once: what ran goes back into its lane
    assert (await runs.until_state(State.QUEUED)).attempt == 1
    await world.host()
    await world.until_model("m", "warm")
    allowed = await world.submit("m", zone="remote", content="allowed")

    assert (await allowed.end()).state is State.DONE  # so the worker has been through the lane
    assert [(await ask.record()).state for ask in (runs, waits)] == [State.QUEUED, State.QUEUED]
    assert provider.prompts == ["allowed"]


async def test_a_model_that_becomes_local_is_served_by_its_remote_runtime_to_nobody(
    world: World, provider: FakeProvider
) -> None:
    """While an answer of the provider still runs, the worker keeps that runtime; a new job has to wait for the next."""
    await world.apply({"m": remote(provider, keepWarm=True)})
    await world.host()
    await world.until_model("m", "warm")
    provider.go.clear()
    runs = await world.submit("m", zone="remote", content="runs")
    await until(lambda: provider.prompts == ["runs"], what="the provider has the first")
    await world.apply({"m": simulated(maxConcurrent=2)})
    local = await world.submit("m", content="local")
    await eventually(lambda: _serves_version(world), what="the worker has heard of the policy")
    provider.go.set()

    assert (await runs.end()).state is State.DONE
    assert (await local.end()).state is State.DONE
    assert local.text.startswith("simulated")
    assert provider.prompts == ["runs"]


async def _serves_version(world: World) -> bool:
    return (await world.model("m")).version == world.book.active.version


async def test_a_refused_key_quarantines_with_a_sentence(
    world: World, provider: FakeProvider, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the wake, and while it is warm; the provider repeats the key, and we do not."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(quarantine, "FIRST_S", 1.0)
    provider.key = "another"
    await world.apply({"far": remote(provider, keepWarm=True, maxWaitMs=20_000)})
    await world.host()
    words = f"model 'far': the provider refused the key that is in {ENV} (401)"
    assert (await world.until_model("far", "quarantined")).reason == words
    with pytest.raises(errors.ModelUnavailable, match="refused the key"):
        await world.submit("far", zone="remote")
    provider.key = KEY
    await world.until_model("far", "warm", timeout_s=20)
    provider.key = "another"
    ask = await world.submit("far", zone="remote")
    assert f"refused the key that is in {ENV}" in (await world.until_model("far", "quarantined")).reason
    assert (await ask.until_state(State.QUEUED)).losses == 1
    provider.key = KEY
    assert (await ask.end(timeout_s=20)).state is State.DONE
    assert KEY not in await everything_in_redis(world) + caplog.text


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", f"the environment of this worker has no {ENV}, which holds the key"),
        ("sk-one\r\nX-Other: two", f"the key in {ENV} is not one word of plain characters"),
    ],
)
async def test_a_missing_or_broken_key_is_said_before_the_provider_is_asked(
    world: World, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, key: str, words: str
) -> None:
    monkeypatch.setenv(ENV, key)
    await world.apply({"far": remote(provider, keepWarm=True)})
    await world.host()
    told = await world.until_model("far", "quarantined")

    assert told.reason == f"model 'far': {words}"
    assert provider.received == []


async def test_a_redirect_is_not_followed(
    world: World, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has allowed the prompt and the key to go where it leads, neither with a probe nor with an answer."""
    monkeypatch.setattr(quarantine, "FIRST_S", 0.5)
    async with FakeProvider().listening() as elsewhere:
        moved = 307, {"Location": f"{elsewhere.url}/v1/chat/completions"}
        provider.refusals.append(moved)
        await world.apply({"far": remote(provider, keepWarm=True)})
        await world.host()
        assert "answered 307" in (await world.until_model("far", "quarantined")).reason
        await world.until_model("far", "warm")
        provider.refusals.append(moved)
        ask = await world.submit("far", zone="remote")
        record = await ask.end()

        assert (record.state, record.error) == (State.FAILED, "runtime_failed")
        assert record.error_message.startswith("the runtime answered 307")
        assert elsewhere.received == []


async def test_a_busy_provider_is_asked_again_when_it_said(world: World, provider: FakeProvider) -> None:
    """Asked again at once, it would use up the job's losses within a second."""
    await world.apply({"far": remote(provider, keepWarm=True)}, maxLosses=1)
    await world.host()
    await world.until_model("far", "warm")
    provider.refusals.append((429, {"Retry-After": "1"}))
    ask = await world.submit("far", zone="remote")
    began = asyncio.get_running_loop().time()
    record = await ask.end()

    assert (record.state, record.attempt, record.losses) == (State.DONE, 2, 1)
    assert asyncio.get_running_loop().time() - began > 0.9
    assert provider.prompts == ["hi", "hi"] and provider.probes == 1


async def test_a_slow_provider_is_not_probed_until_somebody_asks(
    world: World, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe costs money. So a degraded one goes cold after a while, and the next request's wake tries it anew."""
    monkeypatch.setattr(upkeep, "PROBE_IDLE_EVERY_S", 0.3)
    await world.apply({"far": remote(provider, firstTokenBudgetMs=1_500)})
    await world.host()
    await (await world.submit("far", zone="remote")).end()
    await world.until_model("far", "warm")
    probes = provider.probes
    world.hosts["gpu1"].residents.wakers["far"].readiness.slow = readiness.SLOW_IN_A_ROW
    told = await world.until_model("far", "cold")

    assert told.reason == "it was slow; its next request tries it anew"
    assert provider.probes == probes
    assert (await (await world.submit("far", zone="remote")).end()).state is State.DONE
    assert provider.probes == probes + 1


async def test_two_workers_offer_its_slots_once(world: World, provider: FakeProvider) -> None:
    """Its slots are the fleet's. A worker that was silent until another took it gives it up on its return."""
    await world.apply({"far": remote(provider, keepWarm=True, maxConcurrent=2, maxQueue=8)})
    one = await world.host("gpu1")
    await world.until_model("far", "warm", host="gpu1")
    await world.host("gpu2")
    asks = [await world.submit("far", zone="remote") for _ in range(6)]
    assert [(await ask.end()).served_by for ask in asks] == ["far@gpu1"] * 6
    assert provider.most_at_once <= 2
    assert provider.probes == 1

    beat, one._beat = one._beat, _silent  # type: ignore[method-assign]
    keys = world.store.keys
    await world.store.command("DEL", keys.host("gpu1"), keys.model_on_host("far", "gpu1"))
    await world.until_model("far", "warm", host="gpu2")
    one._beat = beat  # type: ignore[method-assign]
    told = await world.until_model("far", "cold", host="gpu1")

    assert told.reason == "another host has it now"
    assert (await world.model("far", "gpu2")).state == "warm"
    assert (await (await world.submit("far", zone="remote")).end()).served_by == "far@gpu2"


async def audit(world: World) -> list[dict[str, str]]:
    return (await take(world.store)).audit


async def test_each_dispatch_is_on_record_and_no_word_of_it(world: World, provider: FakeProvider) -> None:
    """Who, when, by which lane, to whom, how much, past which rules; also for the second attempt at the same job."""
    await world.apply({"far": remote(provider, keepWarm=True)})
    await world.host()
    await world.until_model("far", "warm")
    assert await audit(world) == [], "a probe holds nobody's words"
    provider.refusals.append((500, {}))
    ask = await world.submit("far", zone="remote", content="a word of it", caller="ann")
    record = await ask.end()

    assert (record.state, record.attempt) == (State.DONE, 2)
    first, second = await audit(world)
    assert (first["attempt"], second["attempt"]) == ("1", "2")
    told = {key: first[key] for key in ("job", "caller", "lane", "model", "host", "provider")}
    assert told == {
        "job": ask.job_id, "caller": "ann", "lane": "far", "model": "far", "host": "gpu1",
        "provider": provider.url.removeprefix("http://"),
    }  # fmt: skip
    left = json.loads(first["left"])
    assert left["passed"] == ["maxBytes", "secrets"] and left["redacted"] == {} and left["bytes"] > 50
    assert abs(int(first["at"]) - record.submitted_at) < 10_000
    assert "a word of it" not in str(first) and KEY not in str(first)


async def test_the_provider_gets_the_redacted_copy_and_nobody_else_does(world: World, provider: FakeProvider) -> None:
    """The stored body stays as its client wrote it: a local model that takes the job over reads the original."""
    redact = [{"name": "customer", "pattern": "ACME", "replacement": "[customer]"}]
    await world.apply({"far": remote(provider, keepWarm=True)}, remote={"redact": redact})
    await world.host()
    await world.until_model("far", "warm")
    ask = await world.submit("far", zone="remote", content="what ACME owes ACME", mode="async")
    await ask.end()

    assert provider.prompts == ["what [customer] owes [customer]"]
    assert "ACME" not in str([request.body for request in provider.received])
    [told] = await audit(world)
    assert json.loads(told["left"])["redacted"] == {"customer": 2}
    assert b"what ACME owes" in await world.store.command("GET", world.store.keys.request(ask.job_id))


async def test_a_waiting_job_is_judged_anew_by_rules_that_came_later(world: World, provider: FakeProvider) -> None:
    """One still passes and is served, under the new rules and with the new redaction; one does not, and stays."""
    far = remote(provider, keepWarm=True, maxWaitMs=2_500, maxConcurrent=1)
    await world.apply({"far": far}, remote={"allow": ["fileContext"]})
    await world.host()
    await world.until_model("far", "warm")
    provider.go.clear()
    runs = await world.submit("far", zone="remote", content="runs")
    await until(lambda: provider.prompts == ["runs"], what="the provider has the first")
    passes = await world.submit("far", zone="remote", content="hello ACME")
    stays = await world.submit("far", zone="remote", content="<file>x</file>")
    redact = [{"name": "customer", "pattern": "ACME"}]
    await world.apply({"far": far}, remote={"redact": redact})
    provider.go.set()
    assert (await runs.end()).state is State.DONE
    await world.scheduler()
    assert (await passes.end()).state is State.DONE
    assert (await stays.end()).state is State.EXPIRED

    assert provider.prompts == ["runs", "hello [redacted]"]
    assert [told["job"] for told in await audit(world)] == [runs.job_id, passes.job_id]


async def test_a_copy_that_is_not_what_was_judged_is_not_sent(
    world: World, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an api and a worker of two versions make of the same redaction."""
    redact = [{"name": "customer", "pattern": "ACME"}]
    await world.apply({"far": remote(provider, keepWarm=True)}, remote={"redact": redact})
    await world.host()
    await world.until_model("far", "warm")
    monkeypatch.setattr(door, "redacted", lambda body, _rules: (body, {}))
    ask = await world.submit("far", zone="remote", content="ACME")
    record = await ask.end()

    assert (record.state, record.error) == (State.FAILED, "trust_zone")
    assert provider.prompts == []
    monkeypatch.undo()


async def test_a_standing_consent_leads_out_by_its_own_lane_only(world: World, provider: FakeProvider) -> None:
    await world.apply({"far": remote(provider, keepWarm=True), "further": remote(provider)})
    await world.host()
    await world.until_model("far", "warm")
    with pytest.raises(errors.TrustZoneRefused, match="allows lane far only"):
        await world.submit("further", zone="remote", exits="far")
    assert (await (await world.submit("far", zone="remote", exits="far")).end()).state is State.DONE


async def _silent(*, take: bool) -> None:
    """A heartbeat that nobody hears."""
