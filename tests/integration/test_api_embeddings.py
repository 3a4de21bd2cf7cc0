"""Embeddings and remote models at the front door: a real api, a real worker, and clients as teammates use them."""

import base64
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.status_table import status_table
from broker.snapshots import Snapshots
from tests.support.clients import async_sdk, user
from tests.support.fake_provider import FakeProvider
from tests.support.live_api import LiveApi, RawClient, live_api
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, worker_world
from workers.slots import KEEP_TOKENS

pytestmark = pytest.mark.real

MODELS = {
    "embed-small": simulated(embeddings=True, maxQueue=20, memoryMb=1434, contextTokens=100, aliases=["nomic"]),
    "coder": simulated(maxQueue=4),
}


@asynccontextmanager
async def running(
    server: RedisServer, directory: Path, models: dict[str, Any], **more: Any
) -> AsyncIterator[tuple[World, LiveApi]]:
    """An api in front of a worker whose models are warm."""
    async with worker_world(server.socket_url, directory) as world:
        await world.apply(models, **more)
        await world.warm_host()
        async with live_api(await world._open("api")) as api:
            yield world, api


async def test_vectors_come_as_the_sdk_wants_them(redis_server: RedisServer, tmp_path: Path) -> None:
    """It asks for base64 by itself; floats, token numbers, dimensions and aliases work as well."""
    async with running(redis_server, tmp_path, MODELS) as (world, api), async_sdk(api.url, max_retries=0) as client:
        raw = await client.embeddings.with_raw_response.create(model="nomic", input=["a", "b"])
        one = raw.parse()
        assert (one.model, one.object, len(one.data)) == ("embed-small", "list", 2)
        assert len(one.data[0].embedding) == 8 and one.data[0].embedding != one.data[1].embedding
        assert one.usage.prompt_tokens > 0
        assert one.model_extra == {"simulated": True}
        two = await client.embeddings.create(model="embed-small", input="a", encoding_format="float")
        assert two.data[0].embedding == pytest.approx(one.data[0].embedding)
        three = await client.embeddings.create(model="embed-small", input=[[5, 6, 7], [8]], dimensions=3)
        assert [len(entry.embedding) for entry in three.data] == [3, 3]

        async with httpx.AsyncClient(base_url=api.url) as http:
            job = (await http.get(f"/v1/jobs/{raw.headers['x-gateway-job']}")).json()
        assert (job["state"], job["endpoint"], job["served_by"]) == ("done", "/v1/embeddings", "embed-small@gpu1")
        assert job["usage"] == {"prompt_tokens": one.usage.prompt_tokens, "completion_tokens": 0}
        assert raw.headers["x-gateway-served-by"] == "embed-small@gpu1"
        await world.fleet.look()
        shown = await Snapshots(world.store, world.book, world.fleet).latest()
        row = status_table(shown).splitlines()[1].split()
        assert (row[0], row[1], row[3], row[4]) == ("embed-small", "warm", "0/20", "1.4G")
        assert row[2].endswith("ms") and shown.models[0].first_token_ms > 0


async def test_vectors_are_counted_and_hold_no_slot_for_their_session(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """Nothing of an input is read again by the next one: no slot is kept for a session, nobody is sent to it, and no
    token of it is expected in a cache. The tokens are counted like those of any prompt."""
    async with running(redis_server, tmp_path, MODELS) as (world, api), httpx.AsyncClient(base_url=api.url) as client:
        body = {"model": "embed-small", "input": ["word " * 60] * 30}
        for _ in range(2):
            answer = await client.post("/v1/embeddings", json=body, headers={"X-Session-Affinity": "indexer"})
            assert answer.status_code == 200
        tokens = 2 * answer.json()["usage"]["prompt_tokens"]
        assert tokens > 2 * KEEP_TOKENS
        slots = world.hosts["gpu1"].residents.wakers["embed-small"].slots
        assert (slots.told(), slots.estimates(), slots.next_open_s(0)) == ({}, {}, None)
        await world.fleet.look()
        assert world.fleet.fresh_tokens("embed-small", session="indexer", tokens=2_000) == 2_000
        told = (await client.get("/metrics")).text
        counted = 'gateway_prompt_tokens_total{cached="false",caller="anonymous",model="embed-small"}'
        assert f"{counted} {tokens:.1f}" in told


async def test_a_large_batch_comes_whole(redis_server: RedisServer, tmp_path: Path) -> None:
    """Some megabytes of vectors go through Redis in pieces, while the runtime is one JSON object behind."""
    async with running(redis_server, tmp_path, MODELS) as (_, api), async_sdk(api.url, max_retries=0) as client:
        inputs = [f"{number}" for number in range(600)]
        found = await client.embeddings.create(model="embed-small", input=inputs, dimensions=1024)
        assert [entry.index for entry in found.data] == list(range(600))
        assert {len(entry.embedding) for entry in found.data} == {1024}
        [alone] = (await client.embeddings.create(model="embed-small", input="599", dimensions=1024)).data
        assert alone.embedding == found.data[-1].embedding


async def test_what_passes_through_is_untouched(redis_server: RedisServer, tmp_path: Path) -> None:
    """Base64 in the answer is the runtime's own, byte for byte."""
    async with running(redis_server, tmp_path, MODELS) as (_, api), httpx.AsyncClient(base_url=api.url) as client:
        body = {"model": "embed-small", "input": "a", "encoding_format": "base64"}
        found = (await client.post("/v1/embeddings", json=body)).json()
        numbers = struct.unpack("<8f", base64.b64decode(found["data"][0]["embedding"]))
        floats = (await client.post("/v1/embeddings", json=body | {"encoding_format": "float"})).json()
        assert floats["data"][0]["embedding"] == pytest.approx(numbers)


async def test_each_kind_of_model_does_its_own_kind_of_work(redis_server: RedisServer, tmp_path: Path) -> None:
    """400 with a code that never changes, and nothing waits or wakes for what cannot be done."""
    async with running(redis_server, tmp_path, MODELS) as (world, api), async_sdk(api.url, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as chat:
            await client.chat.completions.create(model="embed-small", messages=user("hi"))
        with pytest.raises(openai.BadRequestError) as vectors:
            await client.embeddings.create(model="coder", input="hi")
        for caught, words in (
            (chat, "embed-small gives vectors and no text, so it does not serve /v1/chat/completions"),
            (vectors, "coder gives text and no vectors, so it does not serve /v1/embeddings"),
        ):
            assert (caught.value.code, caught.value.param) == ("wrong_endpoint", "model")
            assert words in caught.value.message
        with pytest.raises(openai.BadRequestError) as long:
            await client.embeddings.create(model="embed-small", input=["a" * 500, "b"])
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
        batch = await client.embeddings.create(model="embed-small", input=["a" * 300] * 4)
        assert len(batch.data) == 4, "each input fits by itself"
        with pytest.raises(openai.BadRequestError) as empty:
            await client.embeddings.create(model="embed-small", input=[])
        assert (empty.value.code, empty.value.param) == ("invalid_request", "input")
        assert (await world.store.command("ZCARD", world.store.keys.due)) == 0


async def test_a_failure_is_told_and_a_hang_up_reaches_the_runtime(redis_server: RedisServer, tmp_path: Path) -> None:
    async with running(redis_server, tmp_path, MODELS) as (world, api), async_sdk(api.url, max_retries=0) as client:
        runtime = world.runtime("embed-small")
        await runtime.break_with(error_in_stream=0)
        with pytest.raises(openai.InternalServerError) as failed:
            await client.embeddings.create(model="embed-small", input="a")
        assert (failed.value.status_code, failed.value.code) == (502, "runtime_failed")
        assert "simulated fault" in failed.value.message
        await world.until_model("embed-small", "warm")
        await runtime.break_with(error_in_stream=None, never_first_token=True)
        raw = await RawClient.open(api)
        await raw.send("POST", "/v1/embeddings", json.dumps({"model": "embed-small", "input": "a"}).encode())
        await until_active(world, 1)
        raw.close()
        await until_active(world, 0)


async def until_active(world: World, count: int) -> None:
    async def check() -> bool:
        return bool((await world.runtime("embed-small").stats())["active"] == count)

    await eventually(check, what=f"{count} requests at the runtime")


async def test_the_header_opens_the_way_out_and_nothing_else_does(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the door: refused without it, answered with it, by no retry of a key, under no name, in no metric."""
    key = "sk-test-0123456789-very-secret"
    monkeypatch.setenv("EXAMPLE_API_KEY", key)
    async with FakeProvider(key=key).listening() as provider:
        far = {"backend": "openai", "model": "gpt-far", "url": provider.url, "apiKeyEnv": "EXAMPLE_API_KEY"}
        models = {
            "far": {**far, "trust": "remote"},
            "far-vectors": {**far, "trust": "remote", "embeddings": True},
            "near": simulated(maxQueue=0, fallback="far", options={"decodeTps": 1}),
        }
        rules = {"allow": ["fileContext"]}  # an input to be embedded counts as a file
        world = running(redis_server, tmp_path, models, remote=rules)
        async with world as (_, api), async_sdk(api.url, max_retries=0) as client:
            for more in ({}, {"X-Gateway-Allow-Remote": "false"}):
                with pytest.raises(openai.PermissionDeniedError) as refused:
                    await client.chat.completions.create(model="far", messages=user("secret"), extra_headers=more)
                assert refused.value.code == "trust_zone"
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(
                    model="far", messages=user("secret"), extra_headers={"X-Gateway-Allow-Remote": "yes"}
                )
            with pytest.raises(openai.PermissionDeniedError):
                await client.embeddings.create(model="far-vectors", input="secret")
            assert provider.received == []

            leave = {"X-Gateway-Allow-Remote": "true"}
            raw = await client.chat.completions.with_raw_response.create(
                model="far", messages=user("public"), extra_headers=leave | {"Idempotency-Key": "k1"}
            )
            answer = raw.parse()
            assert (answer.model, answer.choices[0].message.content) == ("far", "from afar")
            assert raw.headers["x-gateway-lane"] == "far"
            with pytest.raises(openai.UnprocessableEntityError) as other:
                await client.chat.completions.create(
                    model="far", messages=user("public"), extra_headers={"Idempotency-Key": "k1"}
                )
            assert other.value.code == "idempotency_mismatch"
            found = await client.embeddings.create(model="far-vectors", input="public", extra_headers=leave)
            assert found.data[0].embedding == [0.5, 1.0]

            stream = await client.chat.completions.create(
                model="near", messages=user("runs"), max_tokens=50, stream=True
            )
            assert (await anext(aiter(stream))).model == "near"
            with pytest.raises(openai.InternalServerError) as full:
                await client.chat.completions.create(model="near", messages=user("secret"))
            assert full.value.code == "lane_full"
            spilled = await client.chat.completions.create(model="near", messages=user("public"), extra_headers=leave)
            assert spilled.model == "far"
            await stream.close()
            assert "secret" not in str(provider.prompts) and "runs" not in str(provider.prompts)
            assert provider.prompts == ["public"] * 3
            async with httpx.AsyncClient(base_url=api.url) as http:
                told = [(await http.get(path)).text for path in ("/metrics", "/v1/status", "/v1/models", "/healthz")]
            assert "far" in told[0] and key not in "".join(told)
