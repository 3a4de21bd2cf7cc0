"""`/metrics` of a live api: both formats, what a client can and cannot put there, what Redis and the workers tell."""

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from broker import errors, hosts, jobs, vitals
from broker.lifecycle import State
from broker.metrics import CONTENT_TYPE, OPENMETRICS_TYPE, OTHER
from broker.records import ModelFacts
from broker.snapshots import Snapshots
from broker.status import SilentHost
from broker.store import Store
from tests.support.broker_world import World
from tests.support.live_api import Scene, live_api, live_scene, until_true
from tests.support.metrics_lint import problems
from tests.support.redis_server import RedisServer
from tests.support.worker_world import simulated, worker_world

pytestmark = pytest.mark.timeout(40)

OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0"}
MARK = "zqx"
"""Stands in every name that a hostile client makes up."""

_numbers = itertools.count(1)


@pytest_asyncio.fixture
async def scene(fake_store: Store) -> AsyncIterator[Scene]:
    """On one server: what depends on Redis is asked of both below."""
    async with live_scene(fake_store) as scene:
        yield scene


def hostile() -> list[str]:
    """Names as nobody wrote them yet, each new."""
    n = next(_numbers)
    return [
        f'{MARK}{n}"}} 1 # {{lane="x',
        f"ü/{MARK}:{n}",
        MARK * 40 + str(n),
    ]


async def series(api: str, key: str = "") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What the page holds, which must be clean and without the mark."""
    headers = OPENMETRICS | ({"authorization": f"Bearer {key}"} if key else {})
    async with httpx.AsyncClient(base_url=api) as http:
        answer = (await http.get("/metrics", headers=headers)).raise_for_status()
    assert problems(answer.text) == []
    assert MARK not in answer.text
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in read_openmetrics(answer.text)
        for s in family.samples
    }


async def torment(http: httpx.AsyncClient, headers: dict[str, str]) -> None:
    """Requests that name all kinds of things that there are not."""
    for name in hostile():
        plain = name.encode("ascii", "ignore").decode()
        body = {"model": name, "messages": [{"role": "user", "content": name}], "user": name, "metadata": {"a": name}}
        known = body | {"model": "big"}
        for asked in (
            {"json": body},
            {"json": known, "headers": {"x-gateway-lane": plain}},
            {"json": known, "headers": {"x-session-affinity": plain.replace(" ", "")}},
            {"json": known, "headers": {"idempotency-key": plain.replace(" ", ""), "traceparent": plain}},
            {"json": known, "headers": {"x-gateway-on-disconnect": plain, f"x-{MARK}-{len(plain)}": plain}},
            {"json": known, "headers": {"authorization": f"Bearer {plain}"}},
        ):
            asked["headers"] = headers | asked.get("headers", {})
            await http.post("/v1/chat/completions", **asked)
        await http.post("/v1/completions", json={"model": name, "prompt": name}, headers=headers)
        await http.post("/v1/messages", json={**body, "max_tokens": 3}, headers=headers)
        await http.post("/api/chat", json={**body, "stream": False}, headers=headers)
        job = {"endpoint": f"/v1/{name}", "body": body, "lane": name, "metadata": {name[:9]: name}}
        await http.post("/v1/jobs", json=job, headers=headers)
        await http.post("/v1/jobs", json={**job, "endpoint": "/v1/chat/completions"}, headers=headers)
        await http.get(f"/v1/models/{plain}", headers=headers)
        await http.request(MARK.upper(), f"/{plain}", headers=headers)
        await http.get("/metrics", params={"name[]": name, name: name}, headers=headers)


@pytest.mark.parametrize("keys", ["", "ann:secret-ann"])
async def test_no_client_can_add_a_label(fake_store: Store, keys: str) -> None:
    """Whatever names stand in its requests: a second round of new ones adds no series, and none is made up."""
    async with live_scene(fake_store, keys=keys) as scene:
        key = keys.partition(":")[2]
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(base_url=scene.api.url, timeout=20) as http:
            await torment(http, headers)
            await scene.api.gateway.refusals.write()
            first = await series(scene.api.url, key)
            await torment(http, headers)
            await scene.api.gateway.refusals.write()
            second = await series(scene.api.url, key)
        policy = scene.api.gateway.book.active
    assert second.keys() == first.keys(), "no series came with new names"
    assert second != first, "and yet they were counted"
    allowed = {
        "lane": {*policy.lanes(), OTHER}, "from_lane": {*policy.lanes(), OTHER}, "to_lane": {*policy.lanes(), OTHER},
        "model": {*policy.models(), OTHER}, "caller": {"ann" if keys else "anonymous", OTHER}, "host": {"gpu1"},
        "reason": set(_codes(errors.BrokerError)) | {"bad_http"},
    }  # fmt: skip
    for _, labels in second:
        for label, value in labels:
            assert value in allowed.get(label, {value}), (label, value)
    refused = {value for name, labels in second if "refused" in name for label, value in labels if label == "reason"}
    assert {"model_not_found", "lane_not_found", "invalid_request"} <= refused


def _codes(kind: type[errors.BrokerError]) -> Iterator[str]:
    yield from (kind.code, *(code for below in kind.__subclasses__() for code in _codes(below)))


async def test_a_retry_that_finds_its_job_is_counted_under_no_empty_lane(scene: Scene) -> None:
    async with httpx.AsyncClient(base_url=scene.api.url, headers={"idempotency-key": "k"}) as http:
        body = {"model": "big", "messages": [{"role": "user", "content": "hello"}]}
        for _ in range(2):
            (await http.post("/v1/chat/completions", json=body)).raise_for_status()
    told = await series(scene.api.url)
    assert [dict(labels) for name, labels in told if name == "gateway_jobs_attached_total"] == [{"lane": OTHER}]


async def test_the_format_is_the_one_that_is_asked_for(scene: Scene) -> None:
    async with scene.client() as sdk, httpx.AsyncClient(base_url=scene.api.url) as http:
        await sdk.chat.completions.create(model="big", messages=[{"role": "user", "content": "hello"}])
        job = scene.worker.seen[-1].id
        plain, exact = await http.get("/metrics"), await http.get("/metrics", headers=OPENMETRICS)
    assert (plain.headers["content-type"], exact.headers["content-type"]) == (CONTENT_TYPE, OPENMETRICS_TYPE)
    assert problems(plain.text) == problems(exact.text) == []
    assert job not in plain.text and f'# {{job_id="{job}"}}' in exact.text
    named = {line.partition("{")[0] for line in exact.text.splitlines() if job in line}
    waited = ("queue_wait", "time_to_first_token", "generation")
    assert named == {f"gateway_{what}_seconds_bucket" for what in waited}


async def test_a_page_without_a_policy_still_tells_of_the_machinery(fake_store: Store) -> None:
    async with live_api(fake_store) as api:
        told = await series(api.url)
    assert told["gateway_ready", frozenset()] == 0
    assert told["gateway_redis_up", frozenset()] == 1 and told["gateway_jobs_live", frozenset()] == 0


# --- what Redis tells ------------------------------------------------------------------------------------------------


async def look(world: World) -> vitals.Vitals:
    picture = await world.fleet.look()
    return await vitals.read(world.store, facts=picture.facts)


async def test_lateness_counts_from_the_oldest_instant_that_has_passed(world: World) -> None:
    await world.warm(big=2, small=1)
    assert ((await look(world)).due_late_ms, (await look(world)).due_overdue) == (0, 0)
    early = await world.submit("small", give_up_within_ms=500)
    await world.submit("small", give_up_within_ms=900)
    world.now += 400
    assert ((await look(world)).due_late_ms, (await look(world)).due_overdue) == (0, 0), "nothing is due"
    world.now += 1_100
    told = await look(world)
    assert (told.due_late_ms, told.due_overdue, told.jobs_live) == (1_000, 2, 2)
    assert (await world.due.look(early)).outcome == "expired"
    told = await look(world)
    assert (told.due_late_ms, told.due_overdue, told.jobs_live) == (600, 1, 1)


async def test_dead_letters_and_silent_hosts_are_told(world: World) -> None:
    await world.warm(big=2)
    held = await world.claim(await world.submit("big", mode="async"))
    await jobs.end(world.store, held, "fail", error=errors.RuntimeFailed("it broke"))
    await world.store.command("ZADD", world.store.keys.hosts, world.now - 3_600_000, "gpu9")
    assert (await look(world)).dead_letters == 1
    shown = await Snapshots(world.store, world.book, world.fleet).latest()
    assert shown.silent == (SilentHost(name="gpu9", beat_age_ms=3_600_000),)
    assert [host.name for host in shown.hosts] == ["gpu1"]


async def test_a_lane_says_how_much_of_its_time_the_oldest_job_has_used(world: World) -> None:
    """Until its fallback is tried; a promotion counts anew. Where there is no fallback, until it is given up."""

    async def used(lane: str) -> float:
        told = await Snapshots(world.store, world.book, world.fleet).latest()
        return next(one.deadline_used for one in told.lanes if one.name == lane)

    await world.warm(big=2, small=1)
    assert await used("big") == 0
    job = await world.submit("big")
    world.now += 1_500
    assert await used("big") == 0.75
    world.now += 1_000
    assert await used("big") == 1.25
    await world.promote(job, "small")
    assert (await used("big"), await used("small")) == (0, 0)
    await world.submit("side")
    world.now += 5_000
    assert await used("side") == 0.25


@pytest.mark.real
async def test_a_real_redis_tells_its_memory_and_its_file(redis_server: RedisServer) -> None:
    store = await Store.open(redis_server.url, namespace="vitals")
    told = await vitals.read(store, facts={})
    await store.close()
    assert told.durability == "aof-everysec" and told.unfit == () and told.redis_writes_ok is True
    assert told.redis_used_bytes is not None and told.redis_used_bytes > 100_000 and told.redis_max_bytes == 0


# --- what workers count ----------------------------------------------------------------------------------------------


@pytest.mark.real
async def test_wakes_loads_and_evictions_are_counted(redis_server: RedisServer, tmp_path: Path) -> None:
    """By a real worker: two models that take turns in memory for one."""
    async with worker_world(redis_server.url, tmp_path) as world:
        one = {"keepWarm": False, "minStayMs": 1, "memoryMb": 700, "options": {"coldStartMs": 60, "memoryMb": 700}}
        await world.apply({"first": simulated(**one), "second": simulated(**one)})
        await world.host(memory_mb=1_000)
        for model in ("first", "second"):
            assert (await (await world.submit(model)).end()).state is State.DONE

        facts = (await world.fleet.look()).facts
    assert (facts["first"].wakes, facts["first"].loads, facts["first"].evictions) == (1, 1, 1)
    assert (facts["second"].wakes, facts["second"].loads, facts["second"].evictions) == (1, 1, 0)
    assert facts["first"].loads_ms >= 60 and facts["first"].wakes_failed == 0


@pytest.mark.real
async def test_failed_wakes_are_told_from_runtimes_that_are_not_there(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply(
            {
                "broken": {"backend": "llama.cpp", "model": str(tmp_path / "no.gguf"), "keepWarm": True},
                "away": {"backend": "ollama", "model": "a", "url": "http://127.0.0.1:9", "keepWarm": True},
            }
        )
        await world.host()
        for model in ("broken", "away"):
            await world.until_model(model, "quarantined")
        facts = (await world.fleet.look()).facts
    assert (facts["broken"].wakes_failed, facts["broken"].wakes_unreachable, facts["broken"].wakes) == (1, 0, 0)
    assert (facts["away"].wakes_failed, facts["away"].wakes_unreachable, facts["away"].wakes) == (0, 1, 0)


async def test_counts_of_a_model_add_up(world: World) -> None:
    await hosts.count(world.store, "big", wakes=1, loads=0, loads_ms=900)
    await hosts.count(world.store, "big", wakes=1, evictions=1, loads_ms=100)
    facts = (await world.fleet.look()).facts["big"]
    assert facts == ModelFacts(wakes=2, evictions=1, loads_ms=1_000)


async def test_the_event_loop_is_asked_how_late_it_is(scene: Scene) -> None:
    async def asked() -> bool:
        return (await series(scene.api.url))["gateway_event_loop_lag_seconds_count", frozenset()] > 0

    await until_true(asked, what="a look at the loop")
