"""The alert rules that we ship: each fires on a gateway for which it is true, and none on one that is well.

The condition is read from the rule file and evaluated over pages of a running api (`tests/support/prometheus.py`).
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import pytest_asyncio
from ulid import ULID

from broker import hosts, jobs, lanes, webhook_secrets, webhooks
from broker.lifecycle import State
from broker.records import HostRecord, JobRecord
from broker.store import Store
from tests.support.broker_world import new_namespace, running
from tests.support.live_api import RawClient, Scene, live_api, live_scene, until_true
from tests.support.prometheus import EVERY_S, Prometheus, rules
from tests.support.promql import Scrapes, firing
from tests.support.redis_server import RedisServer
from tests.support.webhook_endpoint import receiver
from tests.support.worker_world import simulated, worker_world
from workers.courier import Courier
from workers.post import Post
from workers.scheduler import Scheduler

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

POLICY = json.dumps(
    {
        "headerHoldMs": 200,
        "models": {
            "big": {
                "backend": "simulated",
                "model": "b",
                "maxQueue": 1,
                "coldStartBudgetMs": 60_000,
                "fallback": "small",
            },
            "small": {"backend": "simulated", "model": "s", "maxQueue": 1},
        },
        "webhooks": {"allow": ["127.0.0.0/8"]},
    }
)
SOON_MS = 1_000
LONG_AGO_MS = 120_000

Test = TypeVar("Test", bound=Callable[..., Any])
_fired: dict[str, set[str]] = {}


def fires(*alerts: str) -> Callable[[Test], Test]:
    """Says which alerts a test fires."""

    def note(test: Test) -> Test:
        for alert in alerts:
            _fired.setdefault(alert, set()).add(test.__name__)
        return test

    return note


@pytest_asyncio.fixture
async def store(server: RedisServer) -> AsyncIterator[Store]:
    opened = await Store.open(server.url, namespace=new_namespace(), name="test-api")
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def scene(store: Store) -> AsyncIterator[Scene]:
    async with live_scene(store, policy=POLICY) as scene:
        yield scene


@pytest_asyncio.fixture
async def prometheus(scene: Scene) -> Prometheus:
    """One that has seen the gateway while it was well."""
    prometheus = Prometheus(scene.api)
    await prometheus.scrape(for_s=2 * EVERY_S)
    assert prometheus.all_firing() == {}
    return prometheus


@asynccontextmanager
async def set_to(store: Store, setting: str, value: str) -> AsyncIterator[None]:
    """A setting of Redis, for as long as the block lasts."""
    before = (await store.command("CONFIG", "GET", setting))[1]
    await store.command("CONFIG", "SET", setting, value)
    try:
        yield
    finally:
        await store.command("CONFIG", "SET", setting, before)


async def chat(scene: Scene, said: str, *, model: str, **headers: str) -> RawClient:
    """Asks, and waits for the head of the answer."""
    client = await RawClient.open(scene.api)
    await client.chat(said, model=model, **headers)
    await client.head()
    return client


async def fill(scene: Scene) -> None:
    """All slots and all places of both models are taken, by jobs that go on until `scene.go`."""
    for model in ("big", "small"):
        for _ in range(3):
            assert (await chat(scene, "wait", model=model)).status == 200
    for model in ("big", "small"):
        await until_true(lambda lane=model: _waits(scene, lane), what="one waits in each lane")  # type: ignore[misc]


async def _waits(scene: Scene, lane: str) -> bool:
    return (await scene.api.gateway.fleet.look()).waiting[lane] == 1


async def ended_job(store: Store, scene: Scene, *, webhook: str) -> None:
    """A job that owes a webhook."""
    active, job_id = scene.api.gateway.book.active, str(ULID())
    record = JobRecord(id=job_id, mode="async", webhook=webhook)
    await lanes.submit(store, active, scene.api.gateway.fleet, record, active.lanes()["big"], b"{}", wanted=False)
    await jobs.cancel(store, job_id)


async def ago(store: Store, ms: int) -> None:
    """Lets the next verbs happen so long ago; `store.clock = None` ends it."""
    then = await store.now_ms() - ms
    store.clock = lambda: then


# --- all is well ---------------------------------------------------------------------------------------------------


async def test_nothing_fires_on_a_gateway_that_is_well(server: RedisServer, scene: Scene) -> None:
    """With traffic, a scheduler, a webhook that arrives, and a model that is asked for more than it has slots."""
    prometheus = Prometheus(scene.api)
    beside = await Store.open(server.url, namespace=scene.store.keys.namespace, name="scheduler")
    scheduler = Scheduler(beside)
    await webhook_secrets.make(scene.store, "anonymous")
    async with receiver() as end, running(scheduler.run()):
        await ended_job(scene.store, scene, webhook=end.url)
        for _ in range(4):
            clients = await asyncio.gather(*(chat(scene, "hello", model=model) for model in ("big", "big", "small")))
            for client in clients:
                assert client.status == 200 and b"DONE" in await client.body()
            await prometheus.scrape(for_s=90)

        async def delivered() -> bool:
            return (await webhooks.figures(scene.store)).outcomes["delivered"] == 1

        await until_true(delivered, what="the webhook arrives", timeout_s=20)
        await prometheus.scrape(for_s=60)
    await beside.close()
    assert {alert: prometheus.firing(alert) for alert in rules()} == {alert: [] for alert in rules()}
    assert prometheus.page.count("job_id=") >= 3, "exemplars come with the page"


# --- each of them --------------------------------------------------------------------------------------------------


@fires("WarmlaneApiDown")
async def test_an_api_that_is_gone(store: Store) -> None:
    async with live_scene(store, policy=POLICY) as scene:
        prometheus = Prometheus(scene.api)
        await prometheus.scrape(for_s=30)
    await prometheus.scrape(for_s=60)
    assert not prometheus.firing("WarmlaneApiDown"), "not yet"
    await prometheus.scrape(for_s=30)
    assert prometheus.firing("WarmlaneApiDown")[0]["job"] == "warmlane"


@fires("WarmlaneRedisDown")
async def test_a_redis_that_is_gone(server: RedisServer, prometheus: Prometheus) -> None:
    server.kill()
    await prometheus.scrape(for_s=60)
    server.start()
    assert prometheus.firing("WarmlaneRedisDown")
    await prometheus.scrape()
    assert prometheus.all_firing() == {}, "it is back"


@fires("WarmlaneNotReady")
async def test_no_host_at_all(store: Store) -> None:
    async with live_api(store) as api:
        await api.gateway.book.apply(POLICY)
        prometheus = Prometheus(api)
        await prometheus.scrape(for_s=120)
        assert prometheus.firing("WarmlaneNotReady") == [{}]


@fires("WarmlaneLaneNearDeadline")
async def test_jobs_that_wait_until_their_deadline(scene: Scene, prometheus: Prometheus) -> None:
    """The fallback is full, so the job stays where it is when its time is over."""
    for model in ("small", "small", "small", "big", "big"):
        assert (await chat(scene, "wait", model=model)).status == 200
    await until_true(lambda: _waits(scene, "small"), what="the fallback is full")
    await prometheus.scrape(for_s=90)
    assert prometheus.all_firing() == {}, "full lanes are not late ones"
    assert (await chat(scene, "wait", model="big", x_slo_ttft_ms="300")).status == 200
    await until_true(lambda: _used(scene, "big", 0.8), what="its deadline is near")
    await prometheus.scrape(for_s=120)
    assert prometheus.firing("WarmlaneLaneNearDeadline") == [{"lane": "big"}]
    scene.go.set()


async def _used(scene: Scene, lane: str, share: float) -> bool:
    async with httpx.AsyncClient() as http:
        told = (await http.get(f"{scene.api.url}/v1/status")).json()
    return bool(next(one["deadline_used"] for one in told["lanes"] if one["name"] == lane) > share)


@fires("WarmlaneFirstTokensLate")
async def test_first_tokens_that_come_too_late(server: RedisServer, scene: Scene, prometheus: Prometheus) -> None:
    """Let in two minutes ago, with a budget of one. A few are no trouble yet."""
    beside = await Store.open(server.url, namespace=scene.store.keys.namespace, name="earlier")
    await ago(beside, LONG_AGO_MS)
    for late in (5, 3):
        for _ in range(late):
            await served_late(beside, scene)
        await prometheus.scrape(for_s=90)
        assert bool(prometheus.firing("WarmlaneFirstTokensLate")) is (late == 3)
    assert prometheus.all_firing() == {"WarmlaneFirstTokensLate": [{"model": "big"}]}
    await beside.close()


async def served_late(beside: Store, scene: Scene) -> None:
    """A job that was let in when the clock of that store says, and is served now."""
    active, job_id = scene.api.gateway.book.active, str(ULID())
    body = json.dumps({"model": "big", "messages": [{"role": "user", "content": "hello"}]}).encode()
    await lanes.submit(
        beside, active, scene.api.gateway.fleet, JobRecord(id=job_id, asked="big"), active.lanes()["big"], body
    )
    await scene.until_state(job_id, State.DONE)


@pytest.mark.parametrize(
    ("alert", "words"), [("WarmlaneFirstTokensLate", "late"), ("WarmlaneServedByFallback", "other")]
)
def test_models_that_left_the_policy_are_nobodys_trouble(alert: str, words: str) -> None:
    """What the day has counted of them is added to `other`, all at once."""
    for model, fired in (("big", [{"model": "big"}]), ("other", [])):
        scrapes = Scrapes(job="warmlane", instance="a")
        for number in range(20):
            count = 1 if number < 4 else 20
            page = f'gateway_first_tokens_judged_total{{model="{model}",first_token="{words}"}} {count}\n'
            scrapes.add(number * EVERY_S, page)
        assert firing(rules()[alert], scrapes, every_s=EVERY_S) == fired, model


@fires("WarmlaneServedByFallback")
async def test_a_model_that_is_mostly_served_by_another(scene: Scene, prometheus: Prometheus) -> None:
    """Its lane is full, so its requests spill over; they are in time."""
    for _ in range(3):
        assert (await chat(scene, "wait", model="big")).status == 200
    await until_true(lambda: _waits(scene, "big"), what="its lane is full")
    for _ in range(8):
        client = await chat(scene, "hello", model="big")
        assert client.status == 200 and b"DONE" in await client.body()
    await prometheus.scrape(for_s=5 * 60)
    assert prometheus.all_firing() == {}, "a while of it is what fallbacks are for"
    await prometheus.scrape(for_s=60)
    assert prometheus.all_firing() == {"WarmlaneServedByFallback": [{"model": "big"}]}
    scene.go.set()


@fires("WarmlaneRefusals")
async def test_requests_that_are_refused(scene: Scene, prometheus: Prometheus) -> None:
    await fill(scene)
    await prometheus.scrape(for_s=240)
    assert prometheus.all_firing() == {}, "full is not refused"
    for refused in (3, 20):  # the first flood of a process, all of it between two looks
        for _ in range(refused):
            assert (await chat(scene, "hello", model="big")).status == 503
        await prometheus.scrape(for_s=150)
        assert bool(prometheus.firing("WarmlaneRefusals")) is (refused > 5), "a few with nothing else are no flood"
    scene.go.set()


async def test_a_client_that_asks_for_nonsense_is_no_refusal_of_ours(scene: Scene, prometheus: Prometheus) -> None:
    for number in range(8):
        assert (await chat(scene, "hello", model=f"nothing-{number}")).status == 404
        await prometheus.scrape()
    assert prometheus.all_firing() == {}


@fires("WarmlaneWakeFailed", "WarmlaneModelQuarantined")
async def test_a_model_that_does_not_load(server: RedisServer, tmp_path: Path) -> None:
    """A real worker, and weights that are not there."""
    async with worker_world(server.url, tmp_path) as world, live_api(world.store) as api:
        await world.apply({"deep": {"backend": "llama.cpp", "model": str(tmp_path / "no.gguf"), "keepWarm": True}})
        await api.gateway.book.reload()
        prometheus = Prometheus(api)
        await prometheus.scrape()
        await world.host()
        await world.until_model("deep", "quarantined")
        await prometheus.scrape()
        assert prometheus.firing("WarmlaneWakeFailed") == [{"model": "deep"}]
        assert prometheus.firing("WarmlaneModelQuarantined") == [], "not yet"
        await prometheus.scrape(for_s=45)
        assert prometheus.firing("WarmlaneModelQuarantined") == [{"model": "deep"}]


@fires("WarmlaneModelDegraded")
async def test_a_model_whose_first_tokens_are_slow(server: RedisServer, tmp_path: Path) -> None:
    """A real worker, and a runtime that is slower than its budget."""
    async with worker_world(server.url, tmp_path) as world, live_api(world.store) as api:
        await world.apply({"slow": simulated(firstTokenBudgetMs=50, options={"prefillTps": 20})})
        await api.gateway.book.reload()
        await world.host()
        await world.until_model("slow", "degraded")
        prometheus = Prometheus(api)
        await prometheus.scrape(for_s=180)
        assert prometheus.firing("WarmlaneModelDegraded") == [{"model": "slow"}]


@fires("WarmlaneLowHeadroom")
async def test_a_host_without_memory(scene: Scene, prometheus: Prometheus) -> None:
    total = 16 << 30
    host = HostRecord(
        name="gpu1", boot="boot1", memory_total=total, memory_used=total - (64 << 20), memory_headroom=64 << 20
    )
    await hosts.beat(scene.store, host, scene.worker.models, lease_ms=600_000)
    await prometheus.scrape(for_s=360)
    assert prometheus.firing("WarmlaneLowHeadroom") == [{"host": "gpu1"}]


@fires("WarmlaneSchedulerLate")
async def test_no_scheduler_that_looks_at_jobs(server: RedisServer, scene: Scene, prometheus: Prometheus) -> None:
    """A job that nobody waits for was to be given up two minutes ago; a scheduler that comes settles it."""
    store, gateway = scene.store, scene.api.gateway
    await scene.beat(big="cold")
    await ago(store, LONG_AGO_MS)
    record = JobRecord(id=str(ULID()), mode="async", asked="big")
    lane = gateway.book.active.lanes()["big"]
    await lanes.submit(store, gateway.book.active, gateway.fleet, record, lane, b"{}", give_up_within_ms=SOON_MS)
    store.clock = None
    await prometheus.scrape(for_s=60)
    assert prometheus.firing("WarmlaneSchedulerLate") == [{}]
    beside = await Store.open(server.url, namespace=store.keys.namespace, name="scheduler")
    async with running(Scheduler(beside).run()):
        await until_true(lambda: _none_due(store), what="the scheduler settles it")
    await beside.close()
    await prometheus.scrape()
    assert prometheus.firing("WarmlaneSchedulerLate") == []


async def _none_due(store: Store) -> bool:
    return await store.command("ZCARD", store.keys.due) == 0


@fires("WarmlaneRedisNotDurable")
async def test_a_redis_without_its_file(store: Store, prometheus: Prometheus) -> None:
    async with set_to(store, "appendonly", "no"):
        await prometheus.scrape(for_s=60)
        assert prometheus.all_firing() == {"WarmlaneRedisNotDurable": [{"kind": "none"}]}, "one thing, one alert"
    await prometheus.scrape()
    assert prometheus.all_firing() == {}


@fires("WarmlaneRedisUnfit")
async def test_a_redis_that_may_evict(store: Store, prometheus: Prometheus) -> None:
    async with set_to(store, "maxmemory-policy", "allkeys-lru"):
        await prometheus.scrape(for_s=60)
        assert prometheus.all_firing() == {"WarmlaneRedisUnfit": [{}]}


@fires("WarmlaneRedisMemory")
async def test_a_redis_that_is_nearly_full(store: Store, prometheus: Prometheus) -> None:
    used = next(
        int(line.removeprefix("used_memory:"))
        for line in (await store.command("INFO", "memory")).decode().splitlines()
        if line.startswith("used_memory:")
    )
    async with set_to(store, "maxmemory", str(int(used * 1.06))):
        await prometheus.scrape(for_s=90)
        assert prometheus.firing("WarmlaneRedisMemory") == [{}]
    async with set_to(store, "maxmemory", str(used * 3)):
        await prometheus.scrape()
        assert prometheus.firing("WarmlaneRedisMemory") == [], "a limit is no harm"


@fires("WarmlaneHostGone")
async def test_a_host_that_falls_silent(store: Store, prometheus: Prometheus) -> None:
    """One that takes its leave is not missed."""
    orderly, lost = HostRecord(name="gpu2", boot="b2"), HostRecord(name="gpu3", boot="b3")
    await hosts.beat(store, orderly, {}, lease_ms=600_000)
    await hosts.beat(store, lost, {}, lease_ms=600_000)
    await prometheus.scrape(for_s=60)
    assert prometheus.all_firing() == {}
    await hosts.leave(store, orderly, [])
    await store.command("PEXPIRE", store.keys.host("gpu3"), 1)
    await until_true(lambda: _silent(store, "gpu3"), what="its lease ends")
    await prometheus.scrape(for_s=60)
    assert prometheus.firing("WarmlaneHostGone") == [{"host": "gpu3"}]


async def _silent(store: Store, host: str) -> bool:
    return await hosts.read(store, host) is None


@fires("WarmlaneWebhooksFailing")
async def test_webhooks_that_are_given_up_on(scene: Scene, prometheus: Prometheus) -> None:
    """An endpoint that says 410 is gone for good."""
    await webhook_secrets.make(scene.store, "anonymous")
    async with receiver() as end, Post() as post:
        end.answers = [b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n"]
        await ended_job(scene.store, scene, webhook=end.url)
        await Courier(scene.store, scene.api.gateway.book, post).round()
    await prometheus.scrape()
    assert prometheus.firing("WarmlaneWebhooksFailing") == [{}]


@fires("WarmlaneWebhooksFailing")
async def test_webhooks_that_fail_again_and_again(scene: Scene, prometheus: Prometheus) -> None:
    """Different jobs, and an endpoint of each: one that fails is left alone before that."""
    await webhook_secrets.make(scene.store, "anonymous")
    async with AsyncExitStack() as ends, Post() as post:
        courier = Courier(scene.store, scene.api.gateway.book, post)
        for _ in range(6):
            end = await ends.enter_async_context(receiver())
            end.answers = [b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n"]
            await ended_job(scene.store, scene, webhook=end.url)
        await courier.round()
    await prometheus.scrape()
    assert prometheus.firing("WarmlaneWebhooksFailing") == [{}]


@fires("WarmlaneWebhooksLate")
async def test_webhooks_that_nobody_sends(scene: Scene, prometheus: Prometheus) -> None:
    """Taken up two minutes ago by a scheduler that has been gone since."""
    await webhook_secrets.make(scene.store, "anonymous")
    await ago(scene.store, LONG_AGO_MS)
    await ended_job(scene.store, scene, webhook="http://127.0.0.1:9/")
    assert await webhooks.gather(scene.store, limit=10) == 1
    scene.store.clock = None
    await prometheus.scrape(for_s=90)
    assert prometheus.firing("WarmlaneWebhooksLate") == [{}]


# --- the rule file -------------------------------------------------------------------------------------------------


def test_each_alert_has_a_test_that_fires_it() -> None:
    assert _fired.keys() == rules().keys()
    assert all(hasattr(sys.modules[__name__], test) for tests in _fired.values() for test in tests)


@pytest.mark.parametrize("alert", rules())
def test_each_alert_says_what_is_wrong_and_what_to_do(alert: str) -> None:
    rule = rules()[alert]
    assert alert.startswith("Warmlane")
    assert rule.labels.keys() == {"severity"} and rule.labels["severity"] in ("page", "ticket")
    assert rule.annotations.keys() == {"summary", "description", "action"}
    assert all(words.endswith(".") for words in rule.annotations.values())
