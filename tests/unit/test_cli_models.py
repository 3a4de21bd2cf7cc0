"""`gateway model`, `drain` and `undrain`: one sentence for each outcome, and its exit code."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import httpx
import pytest
import pytest_asyncio

from api import cli_models
from api.exit_codes import Failed
from broker import hosts, operator
from broker.policies import PolicyBook
from broker.records import HostRecord, ModelOnHost
from broker.status import ModelStatus
from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace
from tests.support.live_api import LiveApi, live_api, until_true
from tests.unit.test_cli import Gateway, Ran, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

pytestmark = pytest.mark.timeout(60)

POLICY = """
models:
  big:
    backend: simulated
    model: weights
    keepWarm: true
    aliases: [gpt-4o]
  small:
    backend: simulated
    model: weights
    label: Little one
  far:
    backend: openai
    model: weights
    url: https://example.com
    trust: remote
lanes:
  nightly:
    target: small
routing:
  - match: { lane: fast-edit }
    target: small
  - match: { lane: either, promptTokensOver: 9 }
    target: big
  - match: { lane: either }
    target: small
"""

Command = Callable[..., Awaitable[Ran]]


class Scene:
    """A gateway whose one host is what the test says it is."""

    def __init__(self, store: Store, api: LiveApi, run: Command) -> None:
        self.store = store
        self.api = api
        self.run = run

    async def beat(self, *, draining: bool = False, policy_unread: int = 0, **models: ModelOnHost) -> None:
        """The host tells these of its models; the others are cold."""
        there = {"big": ModelOnHost(), "small": ModelOnHost(), **models}
        record = HostRecord(name="gpu1", boot="b", draining=draining, policy_unread=policy_unread)
        await hosts.beat(self.store, record, there, lease_ms=600_000)
        await self.api.gateway.fleet.look()

    async def facts(self, model: str = "big") -> dict[str, str]:
        raw = await self.store.hash(self.store.keys.model(model))
        return {name.decode(): value.decode() for name, value in raw.items()}

    async def wanted(self) -> bool:
        return "wanted_until" in await self.facts()


@pytest_asyncio.fixture
async def scene(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    async def run(*words: str) -> Ran:
        return await asyncio.to_thread(gateway, *words)

    monkeypatch.setattr(operator, "BUSY_S_MAX", 0.2)
    monkeypatch.setattr(operator, "HEARD_S_MAX", 0.4)
    store = Store.fake(fake_redis(), namespace=new_namespace())
    await PolicyBook(store).apply(POLICY)
    async with live_api(store) as api:
        monkeypatch.setenv("GATEWAY_URL", api.url)
        scene = Scene(store, api, run)
        await scene.beat()
        yield scene
    await store.close()


WARM = ModelOnHost(state="warm", slots_total=2, first_token_ms=12, last_load_ms=3400)


async def test_warm_waits_for_the_first_token(scene: Scene) -> None:
    """Its wish stands in Redis at once; the sentence comes when a host says warm."""
    command = asyncio.create_task(scene.run("model", "warm", "gpt-4o"))
    await until_true(scene.wanted, what="the wish is noted")
    assert not command.done()
    await scene.beat(big=replace(WARM, state="waking"))
    await scene.beat(big=WARM)
    ran = await command
    assert (ran.code, ran.out) == (0, "big is warm: first token after 12ms, loaded in 3s\n")


async def test_warm_says_why_it_does_not_come(scene: Scene) -> None:
    """A quarantine is a refusal before anything is asked for; a limit is a limit."""
    (await scene.run("model", "warm", "big", "--wait", "0")).complains(1, "big is still cold after 0 s")
    now = await scene.store.now_ms()
    await hosts.learn(scene.store, "big", quarantined_until=now + 60_000, failure="there is no GGUF file")
    before = await scene.facts()
    (await scene.run("model", "warm", "big")).complains(
        1, "big is quarantined for", "there is no GGUF file", "`gateway model reset big`"
    )
    assert await scene.facts() == before
    assert (await scene.run("model", "reset", "big")).code == 0
    assert (await scene.facts())["quarantined_until"] == "0"


def test_what_a_status_means_to_whoever_waits_for_warm() -> None:
    """Warm and degraded end the wait well, what cannot be woken ends it at once, a full box after a while."""

    def outcome(waited_s: float = 0.0, **known: object) -> str | None:
        return cli_models._warm_outcome(ModelStatus(name="big", **known), waited_s)  # type: ignore[arg-type]

    assert outcome(state="waking") is None
    assert outcome(state="quarantined") is None, "its time is over: it is tried again"
    assert outcome(state="warm", first_token_ms=7) == "big is warm: first token after 7ms"
    assert outcome(state="degraded", reason="slow") == "big is loaded but degraded: slow"
    assert outcome(state="cold", reason="no room", waited_s=1) is None
    for words, known in {
        "big is quarantined for 9s: broken": {"state": "quarantined", "quarantine_ms": 9_000, "reason": "broken"},
        "big cannot be woken: no host": {"state": "absent", "reason": "no host"},
        "big stays cold: no room": {"state": "cold", "reason": "no room", "waited_s": 11.0},
    }.items():
        with pytest.raises(Failed, match=words):
            outcome(**known)  # type: ignore[arg-type]


async def test_pin_unpin_and_reset_are_written_at_once(scene: Scene) -> None:
    assert (await scene.run("model", "pin", "gpt-4o")).out == "big is pinned until `gateway model unpin big`\n"
    assert (await scene.facts())["pinned"] == "1"
    assert "note: big is pinned" in (await scene.run("status")).out.splitlines()
    assert (await scene.run("model", "unpin", "big")).out == "big is not pinned\n"
    assert (await scene.facts())["pinned"] == "0"
    ran = await scene.run("model", "reset", "big")
    assert ran.out == "big is in no quarantine, its failures are forgotten\n"


@pytest.mark.parametrize("name", ["small", "Little one", "fast-edit", "nightly", "small.batch"])
async def test_every_name_that_leads_to_a_model_will_do(scene: Scene, name: str) -> None:
    """Those that `gateway model list` and the status show above all."""
    assert (await scene.run("model", "pin", name)).out == "small is pinned until `gateway model unpin small`\n"


async def test_a_name_that_leads_to_two_models_is_asked_back(scene: Scene) -> None:
    (await scene.run("model", "pin", "either")).complains(1, "'either' leads to big and small: name one of them")


async def test_warm_says_that_all_hosts_are_set_aside(scene: Scene) -> None:
    """At once, and with the way out: a wait would come to nothing."""
    await scene.beat(draining=True, big=ModelOnHost(reason="unloaded by hand"))
    ran = await scene.run("model", "warm", "big")
    ran.complains(1, "big stays cold, because no host that serves it takes new work: `gateway undrain gpu1`")
    assert not await scene.wanted(), "it would be loaded when nobody thinks of it any more"
    await scene.beat(policy_unread=2, big=ModelOnHost(reason="unloaded by hand"))
    ran = await scene.run("model", "warm", "big")
    ran.complains(1, "big stays cold, because no host that serves it takes new work: upgrade gpu1")
    await scene.beat(draining=True, big=WARM)
    assert (await scene.run("model", "warm", "big")).code == 0


async def test_unload_tells_what_is_true_of_a_model_that_is_not_just_cold(scene: Scene) -> None:
    now = await scene.store.now_ms()
    await hosts.learn(scene.store, "big", quarantined_until=now + 60_000, failure="model 'big': there is no GGUF file")
    ran = await scene.run("model", "unload", "big")
    assert ran.out == "big is not in memory: it is quarantined: there is no GGUF file\n"
    await scene.beat(far=replace(WARM, manageable=False))
    (await scene.run("model", "unload", "far")).complains(1, "far is a remote provider's, so there is nothing here to")


async def test_unload_says_what_stands_in_its_way(scene: Scene) -> None:
    """At work, being loaded, not ours, nobody who hears: nothing is written, and the sentence says which."""
    cases = {
        "at work in 2 slots": replace(WARM, slots_used=2),
        "still works on answers that were closed": replace(WARM, slots_settling=1),
        "is being loaded on gpu1": replace(WARM, state="waking"),
        "at a url, so it is not ours to unload": replace(WARM, manageable=False),
        "gpu1 did not unload big": WARM,
    }
    for words, there in cases.items():
        await scene.beat(big=there)
        (await scene.run("model", "unload", "big")).complains(1, words)
    assert await scene.facts() == {}


async def test_unload_of_a_model_that_is_cold_keeps_it_so(scene: Scene) -> None:
    ran = await scene.run("model", "unload", "big")
    assert ran.out == "big is cold and stays so until somebody asks for it, 60m at most\n"
    assert int((await scene.facts())["unloaded_until"]) > await scene.store.now_ms()
    assert "not kept warm for 60m" in (await scene.run("status")).out
    ran = await scene.run("model", "unload", "small")
    assert ran.out == "small is cold and stays so until somebody asks for it\n"


@pytest.mark.parametrize("verb", ["warm", "unload", "reset", "pin", "unpin"])
async def test_a_name_that_nobody_knows_is_a_sentence(scene: Scene, verb: str) -> None:
    (await scene.run("model", verb, "bgi")).complains(1, "'bgi'", "did you mean big?")
    (await scene.run("model", verb, "a/b c?d#e")).complains(1, "a/b c?d#e")


async def test_a_host_that_does_not_hear_is_a_sentence(scene: Scene) -> None:
    (await scene.run("drain", "gpu2")).complains(1, "no live host is called 'gpu2'; did you mean gpu1?")
    (await scene.run("drain", "gpu1")).complains(1, "the worker on gpu1 did not drain within")


async def test_drain_waits_for_what_runs(scene: Scene) -> None:
    await scene.beat(draining=True, big=replace(WARM, slots_used=1))
    (await scene.run("drain", "gpu1", "--wait", "0")).complains(
        1, "gpu1 takes no more work, and 1 slot is still at work after 0 s"
    )
    assert "host: gpu1 draining (1 still running)" in (await scene.run("status")).out
    await scene.beat(draining=True, big=WARM)
    ran = await scene.run("drain", "gpu1")
    assert ran.out == "gpu1 is drained: it takes no work until `gateway undrain gpu1`\n"
    await scene.beat()
    assert (await scene.run("undrain", "gpu1")).out == "gpu1 takes work again\n"


async def test_a_verb_that_is_none_is_refused(scene: Scene) -> None:
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        for path, meant in {"/v1/models/big/wram": "warm", "/v1/hosts/gpu1/drian": "drain"}.items():
            answer = await client.post(path)
            assert answer.status_code == 400 and f"did you mean {meant}?" in answer.json()["error"]["message"]
        assert (await client.post("/v1/models/nothing/pin")).status_code == 404
        assert (await client.get("/v1/models/big")).json()["id"] == "big"


async def test_operator_verbs_need_a_key_where_there_are_keys(gateway: Gateway) -> None:
    store = Store.fake(fake_redis(), namespace=new_namespace())
    await PolicyBook(store).apply(POLICY)
    async with live_api(store, keys="ann:secret") as api, httpx.AsyncClient(base_url=api.url) as client:
        assert (await client.post("/v1/models/big/pin")).status_code == 401
        assert (await client.post("/v1/hosts/gpu1/drain")).status_code == 401
        assert await store.hash(store.keys.model("big")) == {}
        assert (await client.post("/v1/models/big/pin", headers={"x-api-key": "secret"})).status_code == 200
    await store.close()
