"""What the api tells of itself and of the house: models, readiness, health, metrics, status."""

import asyncio
from typing import Any

import anthropic
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.policies import PolicyBook
from broker.store import Store
from tests.support.broker_world import a_later_version_applies
from tests.support.live_api import POLICY, RawClient, Scene, chat_body, live_api, live_scene, until_true

pytestmark = pytest.mark.timeout(40)


async def test_models_are_listed_under_every_name(scene: Scene) -> None:
    """Models, aliases and routing names; one with a slash and a colon in it can be shown too."""
    async with scene.client() as client:
        names = [model.id async for model in client.models.list()]
        assert {"big", "small", "hasty", "fast-edit", "qwen/coder:32b"} <= set(names)
        assert (await client.models.retrieve("fast-edit")).id == "fast-edit"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nothing")
    async with httpx.AsyncClient(base_url=scene.api.url) as plain:
        assert (await plain.get("/v1/models/qwen/coder:32b")).json()["id"] == "qwen/coder:32b"


async def test_models_are_told_to_a_client_of_anthropic_in_its_words(scene: Scene) -> None:
    """By its version header, which it always sends; OpenAI's form stays for all others."""
    version = {"anthropic-version": "2023-06-01"}
    async with httpx.AsyncClient(base_url=scene.api.url) as plain:
        listed = [model["id"] for model in (await plain.get("/v1/models?limit=1")).json()["data"]]
        assert len(listed) > 4
        page = (await plain.get("/v1/models", params={"limit": 2}, headers=version)).json()
        assert [model["id"] for model in page["data"]] == listed[:2]
        assert (page["has_more"], page["first_id"], page["last_id"]) == (True, *listed[:2])
        every = (await plain.get("/v1/models", headers=version)).json()
        assert [model["id"] for model in every["data"]] == listed and every["has_more"] is False
        hasty = (await plain.get("/v1/models/hasty", headers=version)).json()
        assert hasty == {
            "type": "model", "id": "hasty", "display_name": "hasty", "created_at": "1970-01-01T00:00:00Z",
            "lifecycle": "active", "max_input_tokens": 50,
        }  # fmt: skip
        assert hasty in every["data"]
        assert (await plain.get("/v1/models/nobody", headers=version)).status_code == 404
        for wrong in ({"limit": "0"}, {"limit": "1001"}, {"limit": "x"}, {"after_id": "nobody"}):
            refused = await plain.get("/v1/models", params=wrong, headers=version)
            assert refused.status_code == 400, wrong
    async with anthropic.AsyncAnthropic(base_url=scene.api.url, api_key="any") as sdk:
        assert [model.id async for model in sdk.models.list(limit=2)] == listed
        back = [model.id async for model in sdk.models.list(limit=2, before_id=listed[-1])]
        assert sorted(back) == sorted(listed[:-1])
        assert (await sdk.models.retrieve("qwen/coder:32b")).id == "qwen/coder:32b"


async def test_what_goes_wrong_with_models_is_told_in_the_words_of_whoever_asks(store: Store) -> None:
    """The version chooses the form of an error as it does that of an answer; one that is empty was not sent."""
    version = {"anthropic-version": "2023-06-01"}
    ann = {"authorization": "Bearer secret-a"}
    async with live_scene(store, keys="ann:secret-a") as scene, httpx.AsyncClient(base_url=scene.api.url) as plain:
        for path, headers, told in (
            ("/v1/models/nobody", ann, (404, "not_found_error")),
            ("/v1/models?limit=x", ann, (400, "invalid_request_error")),
            ("/v1/models?after_id=nobody", ann, (400, "invalid_request_error")),
            ("/v1/models", {}, (401, "authentication_error")),
            ("/v1/models/big", ann | {"origin": "http://elsewhere.example"}, (403, "permission_error")),
        ):
            answer = await plain.get(path, headers=version | headers)
            assert (answer.status_code, answer.json()["type"]) == (told[0], "error"), path
            assert answer.json()["error"]["type"] == told[1]
        for headers in (ann, ann | {"anthropic-version": ""}):
            answer = await plain.get("/v1/models/nobody", headers=headers)
            assert answer.json()["error"]["param"] == "model" and "type" not in answer.json()


async def test_ready_means_that_somebody_can_serve(scene: Scene) -> None:
    """A cold model that a host can wake is ready; a gateway without any host is not."""
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        await scene.beat(big="cold", small="cold", hasty="cold")
        assert (await client.get("/readyz")).status_code == 200
        keys = scene.store.keys
        hashes = [keys.model_on_host(name, "gpu1") for name in scene.worker.models]
        await scene.store.command("DEL", keys.host("gpu1"), *hashes)
        answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reasons"][0] == "big: no live host serves it"


async def test_an_api_that_cannot_read_the_active_policy_lets_nothing_in_and_says_so(scene: Scene) -> None:
    """A newer part applied it: clients may come back, the lines of the file are the operator's, and what was let in is
    served."""
    runs = asyncio.create_task(ask(scene, "wait"), name="runs")
    await until_true(lambda: asyncio.sleep(0, scene.worker.seen), what="the job runs")
    await a_later_version_applies(scene.store)
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        refused = [await ask(scene, "hello", model) for model in ("big", "new")]
        order = {"body": {"model": "big", "messages": [{"role": "user", "content": "hello"}]}}
        refused.append(await client.post("/v1/jobs", json=order))
        ready, alive = await client.get("/readyz"), (await client.get("/healthz")).json()
        shown, page = (await client.get("/v1/status")).json(), (await client.get("/metrics")).text
        scene.go.set()
        assert (await runs).status_code == 200
        await scene.worker.book.rollback(1)
        await scene.api.gateway.book.reload()
        assert (await ask(scene, "hello")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        assert (await client.get("/healthz")).json()["policy_unread"] is None
    why = "policy 2 is active, and this version of warmlane cannot read it"
    for answer in refused:
        error = answer.json()["error"]
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert (error["code"], error["message"]) == ("policy_unreadable", why)
    assert (ready.status_code, ready.json()["reasons"]) == (503, [why])
    assert (alive["status"], alive["policy_version"], alive["policy_unread"]) == ("ok", 1, 2)
    assert (shown["policy_version"], shown["policy_unread"]) == (1, 2)
    assert "\ngateway_ready 0.0\n" in page


async def test_an_api_that_starts_beside_such_a_policy_says_the_same(store: Store) -> None:
    await PolicyBook(store).apply(POLICY)
    await a_later_version_applies(store)
    async with live_api(store) as running, httpx.AsyncClient(base_url=running.url) as client:
        refused, ready = await client.post("/v1/chat/completions", content=chat_body("x")), await client.get("/readyz")
        models, alive = await client.get("/v1/models"), (await client.get("/healthz")).json()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "policy_unreadable")
    assert models.status_code == 503 and "cannot read it" in models.json()["error"]["message"]
    assert ready.status_code == 503 and "cannot read it" in ready.json()["reasons"][0]
    assert (alive["policy_version"], alive["policy_unread"]) == (None, 2)


async def ask(scene: Scene, said: str, model: str = "big") -> httpx.Response:
    async with httpx.AsyncClient(base_url=scene.api.url, timeout=15) as client:
        return await client.post("/v1/chat/completions", content=chat_body(said, model=model))


MEMORY = {"total": 16 << 30, "used": 6 << 30, "headroom": 10 << 30}


async def test_health_tells_what_a_crash_of_redis_would_lose(scene: Scene) -> None:
    """Alive, with what this process thinks of its Redis."""
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        told = (await client.get("/healthz")).json()
    assert (told["status"], told["redis"], told["policy_version"]) == ("ok", "ok", 1)
    assert told["durability"] in ("aof-everysec", "none", "rdb", "unknown")


async def test_metrics_can_be_read(scene: Scene) -> None:
    """The page parses, names the budget beside the depth, counts what happened, and holds no job."""
    async with scene.client() as sdk, httpx.AsyncClient(base_url=scene.api.url) as client:
        await sdk.chat.completions.create(model="big", messages=[{"role": "user", "content": "hello"}])
        await client.post("/v1/chat/completions", content=chat_body("x", model="nobody"))
        page = (await client.get("/metrics")).text
    found = {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }
    assert found["gateway_build_info", (("version", "1.2.3"),)] == 1
    assert found["gateway_lane_budget", (("lane", "big"),)] == 3
    assert found["gateway_lane_depth", (("lane", "big"),)] == 0
    assert found["gateway_jobs_submitted_total", (("lane", "big"),)] == 1
    assert found["gateway_jobs_refused_total", (("lane", "other"), ("reason", "model_not_found"))] == 1
    assert found["gateway_jobs_ended_total", (("lane", "big"), ("state", "done"))] == 1
    assert found["gateway_first_tokens_judged_total", (("first_token", "asked"), ("model", "big"))] == 1
    assert found["gateway_sessions_on_fallback", (("model", "big"),)] == 0
    assert found["gateway_completion_tokens_total", (("caller", "anonymous"), ("model", "big"))] == 2
    assert found["gateway_time_to_first_token_seconds_count", (("lane", "big"), ("model", "big"))] == 1
    assert found["gateway_model_state", (("model", "big"), ("state", "warm"))] == 1
    assert found["gateway_host_up", (("host", "gpu1"),)] == 1
    assert found["gateway_model_memory_bytes", (("model", "big"),)] == 3 << 30
    assert found["gateway_model_footprint_bytes", (("model", "big"),)] == 4 << 30
    memory = {kind: found["gateway_host_memory_bytes", (("host", "gpu1"), ("kind", kind))] for kind in MEMORY}
    assert memory == MEMORY
    assert scene.worker.seen[-1].id not in page
    names = {name for name, _ in found}
    assert all(name.startswith("gateway_") for name in names)


async def test_status_shows_who_waits(scene: Scene) -> None:
    """Waiting, running, slots, the oldest job's age, memory, the host and the policy's lines."""
    clients = [await RawClient.open(scene.api) for _ in range(3)]
    for client in clients:
        await client.chat("wait")
    async with httpx.AsyncClient(base_url=scene.api.url) as plain:

        async def told_so() -> Any:
            told = (await plain.get("/v1/status")).json()
            big = next(m for m in told["models"] if m["name"] == "big")
            return (told, big) if (big["waiting"], big["running"]) == (1, 2) else None

        told, big = await until_true(told_so, what="two running and one waiting")
    assert (big["state"], big["max_queue"], big["slots_total"], big["simulated"]) == ("warm", 3, 2, True)
    assert (big["memory_bytes"], big["footprint_bytes"]) == (3 << 30, 4 << 30)
    lane = next(x for x in told["lanes"] if x["name"] == "big")
    assert 0 <= lane["oldest_waiting_ms"] < 5000
    assert told["policy"] == ["big fallback -> small after 60000ms cold-start budget"]
    assert told["hosts"][0]["memory_headroom"] == 10 << 30
    scene.go.set()
    for client in clients:
        await client.head()
        client.close()
