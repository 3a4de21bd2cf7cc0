"""`gateway doctor`: each ailment is one sentence with its remedy, and a healthy gateway has none."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from api.cli_doctor import _loaded, _ollama
from api.client import REMEDY
from api.doctor import Facts, Finding, OllamaModel, RedisFacts, examine
from broker import hosts
from broker.policies import PolicyBook
from broker.records import HostRecord, ModelOnHost
from broker.status import HostStatus, ModelStatus, SilentHost, Snapshot
from broker.store import Store
from tests.support.broker_world import a_later_version_applies, new_namespace
from tests.support.fake_ollama import FakeOllama
from tests.support.live_api import LiveApi, live_api
from tests.support.redis_server import RedisServer
from tests.unit.test_cli import Gateway, Ran, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

GIB = 1 << 30
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEEP = ModelStatus(
    name="deep", runtime="ollama", weights="qwen2.5-coder", state="warm", keep_warm=True, footprint_bytes=20 * GIB,
    max_concurrent=2, hosts=("gpu1",),
)  # fmt: skip
SMALL = replace(DEEP, name="small", runtime="llama.cpp", weights="/m/small.gguf", footprint_bytes=3 * GIB)
HOST = HostStatus(name="gpu1", memory_total=24 * GIB, policy_version=3, skew_ms=4)
SHOWN = Snapshot(policy_version=3, models=(DEEP, SMALL), hosts=(HOST,))
KEPT = OllamaModel("qwen2.5-coder:latest", NOW + timedelta(days=100_000))
WELL = Facts(
    "http://gateway", redis=RedisFacts("Redis 7.2.0", "aof-everysec"), shown=SHOWN, ollama_url="http://ollama",
    ollama=[KEPT], now=NOW,
)  # fmt: skip


def wrong(facts: Facts) -> list[str]:
    """The sentences about what is wrong."""
    return [finding.sentence for finding in examine(facts) if finding.state == "wrong"]


def with_models(*models: ModelStatus, **more: Any) -> Facts:
    return replace(WELL, shown=replace(SHOWN, models=models, **more))


def test_a_healthy_gateway_has_a_line_for_each_subject() -> None:
    found = examine(WELL)
    assert {finding.state for finding in found} == {"ok"} and all(finding.remedy == "" for finding in found)
    assert [(finding.subject, finding.sentence) for finding in found] == [
        ("ports", "a gateway answers at http://gateway"),
        ("redis", "Redis 7.2.0 keeps aof-everysec and evicts nothing"),
        ("models", "no model is quarantined, degraded, without a host or cold after a failed load"),
        ("slots", "no runtime is known to run fewer generations at once than the policy offers"),
        ("keep-alive", "Ollama is about to unload none of the models that the policy keeps warm"),
        ("memory", "the models to keep warm need 23.0G together and their hosts have 24.0G"),
        ("clock", "all clocks are within 4ms of Redis'"),
    ]


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (replace(WELL, problem=f"The gateway at http://x can't be reached (a: b): {REMEDY}."),
         f"The gateway at http://x can't be reached (a: b): {REMEDY}"),
        (replace(WELL, shown=replace(SHOWN, hosts=(replace(HOST, draining=True),))),
         "gpu1 takes no new work: `gateway undrain gpu1` ends that"),
        (replace(WELL, redis=RedisFacts(away=True)),
         "Redis does not answer the gateway: start it, or mend GATEWAY_REDIS_URL"),
        (replace(WELL, redis=RedisFacts(unfit=("Redis keeps no file, so jobs are lost: set `appendonly yes`",))),
         "Redis keeps no file, so jobs are lost: set `appendonly yes`"),
        (replace(WELL, shown=replace(SHOWN, hosts=())),
         "no worker is alive, so nothing can be served: start `gateway worker`"),
        (replace(WELL, shown=replace(SHOWN, hosts=(replace(HOST, policy_version=2),))),
         "gpu1 serves policy 2 and 3 is active: restart its worker if that lasts longer than a moment"),
        (replace(WELL, shown=replace(SHOWN, hosts=(replace(HOST, policy_version=2, policy_unread=3),))),
         "gpu1 takes no work, since its version of warmlane cannot read policy 3: upgrade it, or take the policy back "
         "with `gateway policy rollback VERSION`"),
        (replace(WELL, policy_unread=4),
         "policy 4 is active, and the api's version of warmlane cannot read it: upgrade it, or take the policy back "
         "with `gateway policy rollback VERSION`"),
        (replace(WELL, shown=replace(SHOWN, silent=(SilentHost(name="box2", beat_age_ms=12_000),))),
         "box2 fell silent 12s ago, and its worker did not take its leave: see its machine, its network and the "
         "worker's log, and start `gateway worker` there again; one that never comes back is forgotten after a day"),
        (with_models(replace(DEEP, state="absent")),
         "deep is served by no live host: start a worker on a host that the policy names, or change `hosts`"),
        (with_models(replace(DEEP, state="quarantined", reason="there is no GGUF file at /m/x.")),
         "deep does not load (there is no GGUF file at /m/x): mend that, then `gateway model reset deep`"),
        (with_models(replace(DEEP, state="cold", failures=3, reason="its last 3 loads failed: there is no GGUF file.")),
         "deep does not load (its last 3 loads failed: there is no GGUF file): mend that, then "
         "`gateway model reset deep`"),
        (with_models(replace(DEEP, state="degraded", reason="first token after 9000 ms")),
         "deep answers slowly (first token after 9000 ms): see what else uses the machine, or raise "
         "firstTokenBudgetMs"),
        (with_models(replace(DEEP, parallel=1)),
         "deep offers 2 slots and its runtime runs 1 at once: raise OLLAMA_NUM_PARALLEL to 2, or set maxConcurrent "
         "to 1"),
        (with_models(replace(SMALL, parallel=1)),
         "small offers 2 slots and its runtime runs 1 at once: raise its number of slots (-np) to 2, or set "
         "maxConcurrent to 1"),
        (replace(WELL, ollama=[replace(KEPT, expires_at=NOW + timedelta(minutes=5))]),
         "Ollama unloads qwen2.5-coder:latest in 5m though the policy keeps it warm: some client talks to Ollama "
         "itself and sets its own keep_alive; have it ask the gateway"),
        (with_models(DEEP, replace(SMALL, footprint_bytes=8 * GIB)),
         "the models to keep warm need 28.0G together (deep 20.0G, small 8.0G) and their hosts have 24.0G: keep only "
         "the most valuable one warm"),
        (with_models(DEEP, replace(SMALL, keep_warm=False, footprint_bytes=40 * GIB)),
         "small needs 40.0G and its largest host has 24.0G: take a smaller quantization or a shorter context"),
        (replace(WELL, shown=replace(SHOWN, hosts=(replace(HOST, skew_ms=-4_200),))),
         "the clock of gpu1 is 4s ahead of Redis': run an NTP service on both"),
        (replace(WELL, api_skew_ms=130_000),
         "the clock of the api's machine is 2m behind Redis': run an NTP service on both"),
    ],
)  # fmt: skip
def test_an_ailment_is_one_sentence_with_its_remedy(facts: Facts, sentence: str) -> None:
    assert wrong(facts) == [sentence]


def test_what_could_not_be_looked_at_is_said_and_is_not_wrong() -> None:
    def unknown(facts: Facts) -> list[Finding]:
        return [finding for finding in examine(facts) if finding.state == "unknown"]

    assert [f.subject for f in unknown(replace(WELL, ollama=None))] == ["keep-alive"]
    assert [f.subject for f in unknown(replace(WELL, redis=None, shown=None))] == ["redis", "policy"]
    assert examine(with_models(replace(DEEP, footprint_bytes=0), SMALL))[-2].said.endswith("(not known yet: deep)")
    assert not unknown(with_models(SMALL)), "without a model of Ollama's nobody asks about its keep-alive"


def test_an_instant_of_ollama_is_read_as_it_writes_it() -> None:
    """Nine digits after the second, a zone, and for ever is a year that is far away."""
    for_ever = _loaded({"name": "a", "expires_at": "2318-04-13T08:15:30.123456789+02:00"})
    soon = _loaded({"name": "b", "expires_at": "2026-01-01T00:05:00.5Z"})
    assert for_ever is not None and for_ever.expires_at.year == 2318
    assert soon == OllamaModel("b", NOW + timedelta(minutes=5))
    assert _loaded({"name": "c"}) is None and _loaded({"name": "d", "expires_at": "soon"}) is None


async def test_an_ollama_is_asked_and_one_that_is_none_is_not_believed() -> None:
    async with FakeOllama("a").running() as ollama:
        ollama.loaded["a:latest"] = 300
        assert await _ollama(ollama.url) == [], "the double tells no instant, and nothing is made up"
        assert await _ollama(f"{ollama.url}/nothing") is None
    assert await _ollama("http://127.0.0.1:9") is None


# --- the command -------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def running(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LiveApi]:
    namespace = new_namespace()
    monkeypatch.setenv("GATEWAY_REDIS_URL", redis_server.url)
    monkeypatch.setenv("GATEWAY_NAMESPACE", namespace)
    monkeypatch.setenv("GATEWAY_OLLAMA_URL", "http://127.0.0.1:9")
    store = await Store.open(redis_server.url, namespace=namespace, name="test")
    await PolicyBook(store).apply("models: {big: {backend: simulated, model: x, maxConcurrent: 2}}")
    record = HostRecord(name="gpu1", boot="b", policy_version=1, memory_total=8 * GIB)
    await hosts.beat(store, record, {"big": ModelOnHost(state="warm", slots_total=1, parallel=1)}, lease_ms=600_000)
    async with live_api(store) as api:
        await api.gateway.fleet.look()
        monkeypatch.setenv("GATEWAY_URL", api.url)
        yield api
    await store.close()


@pytest.mark.real
async def test_doctor_looks_through_the_api_and_changes_nothing(running: LiveApi, gateway: Gateway) -> None:
    """Exit code 1 while something is wrong; JSON says the same."""
    store = running.gateway.store
    before = sorted([key async for key in store.scan(f"{store.keys.namespace}:*")])
    ran = await asyncio.to_thread(gateway, "doctor")
    assert ran.code == 1
    assert _line(ran, "wrong", "slots") == (
        "big offers 2 slots and its runtime runs 1 at once: raise its `parallel` to 2, or set maxConcurrent to 1"
    )
    assert _line(ran, "ok", "ports") == f"a gateway answers at {running.url}"
    assert _line(ran, "ok", "clock").startswith("all clocks are within")
    told = json.loads((await asyncio.to_thread(gateway, "doctor", "--json")).out)
    assert {"subject": "slots", "state": "wrong"}.items() <= next(t for t in told if t["subject"] == "slots").items()
    assert sorted([key async for key in store.scan(f"{store.keys.namespace}:*")]) == before


@pytest.mark.real
async def test_doctor_asks_redis_where_no_api_answers(
    running: LiveApi, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_URL", "http://127.0.0.1:9")
    ran = await asyncio.to_thread(gateway, "doctor")
    assert ran.code == 1
    assert "can't be reached" in _line(ran, "wrong", "ports")
    assert "big offers 2 slots" in _line(ran, "wrong", "slots")


@pytest.mark.real
@pytest.mark.parametrize(("url", "whose"), [("", "the api's"), ("http://127.0.0.1:9", "this command's")])
async def test_doctor_tells_of_a_policy_that_cannot_be_read(
    running: LiveApi, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, url: str, whose: str
) -> None:
    """Whoever looks for it: the api, or the command itself where no api answers."""
    await a_later_version_applies(running.gateway.store)
    await running.gateway.book.catch_up()
    if url:
        monkeypatch.setenv("GATEWAY_URL", url)
    ran = await asyncio.to_thread(gateway, "doctor")
    assert ran.code == 1
    assert _line(ran, "wrong", "policy").startswith(f"policy 2 is active, and {whose} version of warmlane cannot read")


async def test_doctor_of_nothing_at_all(gateway: Gateway) -> None:
    ran = await asyncio.to_thread(gateway, "doctor")
    assert ran.code == 1
    assert [line.split()[:2] for line in ran.out.splitlines()] == [
        ["wrong", "ports"], ["unknown", "redis"], ["unknown", "policy"],
    ]  # fmt: skip


def _line(ran: Ran, state: str, subject: str) -> str:
    """The one sentence about a subject in this state."""
    found = [line.split(maxsplit=2)[2] for line in ran.out.splitlines() if line.split()[:2] == [state, subject]]
    assert len(found) == 1, ran.out
    return found[0]
