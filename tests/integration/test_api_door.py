"""Who is let in and who is not, over real HTTP: full lanes, bad requests, large bodies, keys."""

import asyncio
import json

import httpx
import openai
import pytest

from broker.store import Store
from tests.support.live_api import RawClient, Scene, chat_body, live_api, live_scene, until_true

pytestmark = pytest.mark.timeout(40)


async def test_full_lanes_refuse_with_a_time(scene: Scene) -> None:
    """Two run and three wait, two run and one waits in the fallback; the next one is told when to come back."""
    clients = [await RawClient.open(scene.api) for _ in range(9)]
    for client in clients[:8]:
        await client.chat("wait")

    async def all_in() -> bool:
        return int(await scene.store.command("ZCARD", scene.store.keys.due)) == 8

    await until_true(all_in, what="eight jobs")
    await clients[8].chat("hello")
    assert await clients[8].head() == 503
    assert json.loads(await clients[8].body())["error"]["code"] == "lane_full"
    assert 1 <= int(clients[8].headers["retry-after"]) <= 30
    scene.go.set()
    for client in clients[:8]:
        assert await client.head() == 200
        await client.body()
    for client in clients:
        client.close()


async def test_what_is_refused_before_it_is_a_job(scene: Scene) -> None:
    """Each has its status, its code and a sentence, and leaves nothing in Redis."""
    raw = b'{"model":"big","messages":['
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        path = "/v1/chat/completions"
        found = [
            await client.post(path, content=raw),
            await client.post(path, content=chat_body("x", model="bigg")),
            await client.post(path, content=chat_body("x"), headers={"x-gateway-lane": "fast-edti"}),
            await client.post(path, content=chat_body("x"), headers={"x-slo-ttft-ms": "soon"}),
            await client.post(path, content=chat_body("x"), headers={"x-slo-ttft-ms": "000000000001" + "9" * 5000}),
            await client.post(path, content=chat_body("x"), headers={"x-gateway-on-disconnect": "maybe"}),
            await client.post(path, content=chat_body("x", n=99)),
            await client.post(path, content=chat_body("x " * 400, model="hasty")),
            await client.get(path),
            await client.get("/v1/nothing"),
            await client.post("/v1/models"),
        ]
    told = [(r.status_code, r.json()["error"]["code"]) for r in found]
    assert told == [
        (400, "invalid_request"),
        (404, "model_not_found"),
        (404, "lane_not_found"),
        (400, "invalid_request"),
        (400, "invalid_request"),
        (400, "invalid_request"),
        (400, "invalid_request"),
        (400, "context_length_exceeded"),
        (405, "method_not_allowed"),
        (404, "not_found"),
        (405, "method_not_allowed"),
    ]
    assert "did you mean big" in found[1].json()["error"]["message"]
    assert await scene.store.command("ZCARD", scene.store.keys.due) == 0
    assert not [k for k in await scene.store.command("KEYS", f"{scene.store.keys.namespace}:job:*")]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/nothing", None),
        ("GET", "/api/nothing", None),
        ("GET", "/v1/messages/nothing", None),
        ("PUT", "/v1/jobs/x", "DELETE, GET"),
        ("OPTIONS", "/api/tags", "GET, HEAD"),
        ("DELETE", "/api/chat", "POST"),
        ("HEAD", "/v1/messages", "POST"),
        ("GET", "/v1/messages/count_tokens", "POST"),
        ("TRACE", "/openapi.json", "GET, HEAD"),
    ],
)
async def test_what_is_not_served_is_told_in_the_dialect_of_its_path(
    scene: Scene, method: str, path: str, allow: str | None
) -> None:
    """And a method that a path does not take names those that it takes."""
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        answer = await client.request(method, path)
    assert (answer.status_code, answer.headers.get("allow")) == (405 if allow else 404, allow)
    code = "method_not_allowed" if allow else "not_found"
    if method != "HEAD":
        told = answer.json()
        assert (told if path.startswith("/api/") else told["error"])["code"] == code
        assert ("type" in told) == path.startswith("/v1/messages")


@pytest.mark.parametrize("says_its_size", [True, False])
async def test_a_body_of_50_mb_is_refused_readably(scene: Scene, says_its_size: bool) -> None:
    """The sender gets to read the answer, although it is still sending; nothing of the body is kept."""
    client = await RawClient.open(scene.api)
    size = 50 << 20
    length = f"content-length: {size}" if says_its_size else "transfer-encoding: chunked"
    client.writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{length}\r\n\r\n".encode())

    async def pour() -> None:
        piece = b"x" * (1 << 20)
        for _ in range(50):
            client.writer.write(piece if says_its_size else b"%x\r\n%s\r\n" % (len(piece), piece))
            await client.writer.drain()

    pouring = asyncio.create_task(pour())
    try:
        assert await client.head() == 413
        told = json.loads(await client.body())["error"]
        assert told["code"] == "body_too_large" and str(20 << 20) in told["message"]
    finally:
        pouring.cancel()
        await asyncio.wait({pouring})
        client.close()


async def test_a_client_that_waits_for_leave_never_sends_the_body(scene: Scene) -> None:
    """`Expect: 100-continue` with a size over the limit is refused before a byte of it travels."""
    client = await RawClient.open(scene.api)
    lines = "host: localhost\r\ncontent-length: 50000000\r\nexpect: 100-continue"
    client.writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n\r\n".encode())
    assert await client.head() == 413
    client.close()


async def test_without_a_policy_the_api_says_what_is_missing(store: Store) -> None:
    """An api that was started before any policy answers, and says what to do."""
    async with live_api(store) as running, httpx.AsyncClient(base_url=running.url) as client:
        refused = await client.post("/v1/chat/completions", content=chat_body("x"))
        ready, alive = await client.get("/readyz"), await client.get("/healthz")
        looked = [await client.head(path) for path in ("/readyz", "/healthz")]  # as load balancers ask
        metrics = await client.get("/metrics")
    assert refused.status_code == 503 and "gateway policy apply" in refused.json()["error"]["message"]
    assert (ready.status_code, alive.status_code, metrics.status_code) == (503, 200, 200)
    assert [(r.status_code, r.content) for r in looked] == [(503, b""), (200, b"")]


async def test_keys_open_the_gateway_and_keep_jobs_apart(store: Store) -> None:
    """No key or a wrong one is a 401; a caller sees its own jobs only; health needs no key."""
    async with live_scene(store, keys="boss:secret") as scene:
        await scene.api.name("ann", "bob")
        ann, bob = scene.api.bearer("ann"), {"x-api-key": scene.api.keys["bob"]}
        async with httpx.AsyncClient(base_url=scene.api.url) as client:
            for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "secret"}):
                for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
                    refused = await client.request(method, path, headers=headers, content=chat_body("hello"))
                    assert refused.status_code == 401, (path, headers)
                    assert refused.json()["error"]["code"] == "invalid_api_key"
            answer = await client.post("/v1/chat/completions", content=chat_body("hello"), headers=ann)
            path = f"/v1/jobs/{answer.headers['x-gateway-job']}"
            assert (await client.get(path, headers=ann)).json()["caller"] == "ann"
            assert (await client.get(path, headers=bob)).status_code == 404
            assert (await client.delete(path, headers=bob)).status_code == 404
            assert (await client.get(f"{path}/events", headers=bob)).status_code == 404
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/readyz")).status_code == 200
        async with openai.AsyncOpenAI(base_url=f"{scene.api.url}/v1", api_key="wrong", max_retries=0) as sdk:
            with pytest.raises(openai.AuthenticationError):
                await sdk.models.list()
