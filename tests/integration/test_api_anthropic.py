"""The Anthropic dialect at the front door, with the stock client: over a runtime of chat only, and over one that
speaks it.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import pytest

from api import stream as stream_module
from broker import counts
from broker.lifecycle import State
from tests.support.fake_ollama import FakeOllama
from tests.support.live_api import LiveApi, RawClient, live_api
from tests.support.redis_server import RedisServer
from tests.support.scripted_runtime import ScriptedVllm
from tests.support.waiting import until
from tests.support.worker_world import World, eventually, worker_world
from tests.unit.dialects import runtime_streams as streams
from tests.unit.dialects.test_anthropic_stream import NATIVE
from workers import counting
from workers.runtimes.http_server import Exchange

pytestmark = pytest.mark.real

ASK: dict[str, Any] = {"model": "coder", "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "read", "description": "Reads.", "input_schema": {"type": "object", "properties": {}}}


class Scripted(ScriptedVllm):
    """Says what a test wants to be said, and speaks the dialect where it holds `native` events."""

    stream = b""
    native = b""

    def __init__(self) -> None:
        super().__init__()
        self.native_bodies: list[dict[str, Any]] = []

    async def _handle(self, exchange: Exchange) -> None:
        if exchange.path != "/v1/messages" or not self.native:
            return await super()._handle(exchange)
        self.native_bodies.append(exchange.json())
        await exchange.begin("text/event-stream")
        await exchange.write(self.native)
        await exchange.end()

    async def _say(self, exchange: Exchange, body: dict[str, Any]) -> None:
        if not self.stream:
            return await super()._say(exchange, body)
        await exchange.write(self.stream)
        await exchange.end()


@asynccontextmanager
async def running(
    server: RedisServer, directory: Path, *, keys: str = "", **models: Any
) -> AsyncIterator[tuple[World, LiveApi]]:
    async with worker_world(server.socket_url, directory) as world:
        await world.apply(models, headerHoldMs=300)
        await world.warm_host()
        async with live_api(await world._open("api"), keys=keys) as api:
            yield world, api


@asynccontextmanager
async def a_gateway(
    server: RedisServer, directory: Path, stream: bytes = b"", *, native: bytes = b"", keys: str = "", **more: Any
) -> AsyncIterator[tuple[Scripted, World, LiveApi]]:
    """A gateway in front of a vLLM, by default of a version that does not know the dialect."""
    async with Scripted().running() as fake:
        fake.stream, fake.native = stream, native
        model = {"backend": "vllm", "model": "weights", "url": fake.url, "keepWarm": True, **more}
        async with running(server, directory, keys=keys, coder=model) as (world, api):
            yield fake, world, api


@asynccontextmanager
async def client(api: LiveApi, **more: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    options: dict[str, Any] = {"api_key": "any", "max_retries": 0, "timeout": 15} | more
    async with anthropic.AsyncAnthropic(base_url=api.url, **options) as found:
        yield found


def asked_of(fake: Scripted) -> list[dict[str, Any]]:
    """The chat requests that were no probe of ours."""
    return [body for body in fake.chat_bodies if body["max_tokens"] != 1]


async def said(sdk: anthropic.AsyncAnthropic, **more: Any) -> anthropic.types.Message:
    async with sdk.messages.stream(**(ASK | more)) as stream:
        return await stream.get_final_message()


async def test_an_answer_streamed_and_whole(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_gateway(redis_server, tmp_path) as (fake, _, api), client(api) as sdk:
        streamed = await said(sdk, system=[{"type": "text", "text": "Be brief."}], metadata={"user_id": "u"})
        whole = await sdk.messages.create(**ASK)
        for message in (streamed, whole):
            assert message.content[0].type == "text" and message.content[0].text == "scripted 1 2"
            assert (message.model, message.stop_reason) == ("coder", "max_tokens")
            assert (message.usage.input_tokens, message.usage.output_tokens) == (5, 3)
            assert message.id.startswith("msg_0")
        assert fake.chat_bodies[-2]["messages"][0] == {"role": "system", "content": "Be brief."}


async def test_the_query_of_a_beta_changes_nothing(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_gateway(redis_server, tmp_path) as (_, _, api), client(api) as sdk:
        message = await sdk.beta.messages.create(**ASK, betas=["context-1m-2025-08-07"])
        assert message.content[0].type == "text" and message.content[0].text == "scripted 1 2"


async def test_tools_there_and_back(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_gateway(redis_server, tmp_path, streams.LLAMA_TOOLS) as (fake, _, api), client(api) as sdk:
        streamed = await said(sdk, tools=[TOOL], tool_choice={"type": "any"})
        whole = await sdk.messages.create(**ASK, tools=[TOOL])
        for message in (streamed, whole):
            calls = [(block.id, block.name, block.input) for block in message.content if block.type == "tool_use"]
            assert calls == [("c0", "read", {"path": 'a "b".py'}), ("c1", "list", {})]
            assert message.stop_reason == "tool_use"
            assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (10, 90)
        assert fake.chat_bodies[-2]["tool_choice"] == "required"
        results = [{"type": "tool_result", "tool_use_id": call, "content": "x"} for call in ("c0", "c1")]
        turns = [
            *ASK["messages"],
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": results},
        ]
        await sdk.messages.create(**(ASK | {"messages": turns}))
        _, called, first, second = fake.chat_bodies[-1]["messages"]
        assert [call["id"] for call in called["tool_calls"]] == [first["tool_call_id"], second["tool_call_id"]]


async def test_thinking_is_a_block_of_its_own(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_gateway(redis_server, tmp_path, streams.VLLM_REASONING) as (fake, _, api), client(api) as sdk:
        thinking = {"type": "enabled", "budget_tokens": 1024}
        for message in (await said(sdk, thinking=thinking), await sdk.messages.create(**ASK, thinking=thinking)):
            thought, text = message.content
            assert thought.type == "thinking" and thought.thinking == "Hmm."
            assert text.type == "text" and text.text == "Yes."
        assert fake.chat_bodies[-1]["chat_template_kwargs"] == {"enable_thinking": True}


async def test_a_runtime_that_speaks_the_dialect_is_asked_in_it(redis_server: RedisServer, tmp_path: Path) -> None:
    native = NATIVE["length"]
    async with a_gateway(redis_server, tmp_path, native=native) as (fake, _, api), client(api) as sdk:
        raw = await RawClient.open(api)
        body = json.dumps(ASK | {"stream": True, "service_tier": "auto"}).encode()
        await raw.send("POST", "/v1/messages?beta=true", body, anthropic_version="2023-06-01")
        assert await raw.head() == 200 and raw.headers["content-type"].startswith("text/event-stream")
        assert await raw.body() == native.replace(b'"model":"golden"', b'"model":"coder"')
        assert fake.native_bodies == [ASK | {"model": "weights", "stream": True, "service_tier": "auto"}]
        message = await sdk.messages.create(**ASK)
        assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 24
        assert not asked_of(fake)


@pytest.mark.parametrize(
    ("trap", "stream"),
    [("error + [DONE]", True), ("silent end", True), ("cut", True), ("text error", True), ("silent end", False)],
)
async def test_a_loss_in_the_middle_is_the_clients_own_error(
    redis_server: RedisServer, tmp_path: Path, trap: str, stream: bool
) -> None:
    async with a_gateway(redis_server, tmp_path) as (fake, world, api), client(api) as sdk:
        fake.trap = trap
        with pytest.raises(anthropic.APIStatusError) as lost:
            await (said(sdk) if stream else sdk.messages.create(**ASK))
        assert lost.value.status_code == (200 if stream else 500)
        assert lost.value.body["error"]["type"] == "api_error"  # type: ignore[index]
        keys = [key async for key in world.store.scan(world.store.keys.job("*"))]
        states = {
            (await world.store.hash(key)).get(b"state") for key in keys if not key.endswith((":frames", ":request"))
        }
        assert states == {State.FAILED.value.encode()}


async def test_what_is_refused_at_the_door(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_gateway(redis_server, tmp_path, contextTokens=3000) as (fake, _, api), client(api) as sdk:
        long = [{"role": "user", "content": "word " * 10_000}]
        refused: list[tuple[dict[str, Any], type[anthropic.APIStatusError], str]] = [
            ({"model": "nobody"}, anthropic.NotFoundError, "not_found_error"),
            ({"messages": []}, anthropic.BadRequestError, "invalid_request_error"),
            ({"messages": long}, anthropic.BadRequestError, "invalid_request_error"),
        ]
        for changes, kind, word in refused:
            for stream in (False, True):
                with pytest.raises(kind) as error:
                    await sdk.messages.create(**(ASK | changes), stream=stream)
                assert error.value.body["error"]["type"] == word  # type: ignore[index]
                assert error.value.body["type"] == "error"  # type: ignore[index]
        pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}}
        with pytest.raises(anthropic.BadRequestError, match="must be text"):
            await sdk.messages.create(**(ASK | {"messages": [{"role": "user", "content": [pdf]}]}))
        raw = await RawClient.open(api)
        await raw.send("GET", "/v1/messages")
        assert await raw.head() == 405
        assert json.loads(await raw.body())["error"]["type"] == "invalid_request_error"
        assert not asked_of(fake)


async def test_a_body_that_is_too_large_is_a_413_of_the_dialect(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_gateway(redis_server, tmp_path) as (_, _, api):
        raw = await RawClient.open(api)
        raw.writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n")
        assert await raw.head() == 413
        assert json.loads(await raw.body())["error"]["type"] == "request_too_large"


async def test_either_header_carries_the_key(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_gateway(redis_server, tmp_path, keys="ada:sesame-1234567890") as (_, _, api):
        for right in ({"api_key": "sesame-1234567890"}, {"api_key": None, "auth_token": "sesame-1234567890"}):
            async with client(api, **right) as sdk:
                assert (await sdk.messages.create(**ASK)).stop_reason == "max_tokens"
                assert (await sdk.messages.count_tokens(model="coder", messages=ASK["messages"])).input_tokens > 0
        async with client(api, api_key="wrong") as sdk:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                await sdk.messages.create(**ASK)
            assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
            with pytest.raises(anthropic.AuthenticationError):
                await sdk.messages.count_tokens(model="coder", messages=ASK["messages"])


async def test_a_count_of_tokens_wakes_nothing(redis_server: RedisServer, tmp_path: Path) -> None:
    async with FakeOllama("qwen:32b").running() as fake:
        model = {"backend": "ollama", "model": "qwen:32b", "url": fake.url}
        async with running(redis_server, tmp_path, coder=model) as (world, api), client(api) as sdk:
            short = await sdk.messages.count_tokens(model="coder", messages=ASK["messages"])
            long = await sdk.messages.count_tokens(
                model="coder", messages=[{"role": "user", "content": "word " * 1000}], tools=[TOOL], system="Be brief."
            )
            assert 1 <= short.input_tokens < 20 and 1200 < long.input_tokens < 1500
            with pytest.raises(anthropic.NotFoundError):
                await sdk.messages.count_tokens(model="nobody", messages=ASK["messages"])
            raw = await sdk.messages.with_raw_response.count_tokens(model="coder", messages=ASK["messages"])
            assert raw.headers["x-gateway-estimate"] == "true"
            assert not [key async for key in world.store.scan(world.store.keys.job("*"))]
            assert not fake.loads_started


class Counts(Scripted):
    """A vLLM that counts, once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, Any]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.reply: dict[str, Any] = {"count": 4711, "max_model_len": 8192, "tokens": [1, 2]}
        self.status = 200

    async def _handle(self, exchange: Exchange) -> None:
        if exchange.path != "/tokenize":
            return await super()._handle(exchange)
        self.asked.append(exchange.json())
        await self.may_answer.wait()
        await exchange.answer(self.reply, status=self.status)


@asynccontextmanager
async def a_counter(server: RedisServer, directory: Path, **more: Any) -> AsyncIterator[tuple[Counts, World, LiveApi]]:
    async with Counts().running() as fake:
        model = {"backend": "vllm", "model": "weights", "url": fake.url, "keepWarm": True} | more
        async with running(server, directory, coder=model) as (world, api):
            await api.gateway.fleet.look()
            yield fake, world, api


async def count(api: LiveApi, **more: Any) -> tuple[int, bool]:
    """What the client is told, and whether it is called an estimate."""
    asked: dict[str, Any] = {"model": "coder", "messages": ASK["messages"]} | more
    async with client(api) as sdk:
        raw = await sdk.messages.with_raw_response.count_tokens(**asked)
        found = await raw.parse()
    return found.input_tokens, raw.headers.get("x-gateway-estimate") == "true"


async def test_a_warm_models_runtime_counts_the_tokens(redis_server: RedisServer, tmp_path: Path) -> None:
    """Over the broker, whichever machine it is on; no job, no slot, and nothing stays behind."""
    async with a_counter(redis_server, tmp_path) as (fake, world, api):
        before = len(fake.chat_bodies)
        assert await count(api, system="Be brief.", tools=[TOOL]) == (4711, False)
        [asked] = fake.asked
        assert asked["model"] == "weights" and asked["tools"][0]["function"]["name"] == "read"
        assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert len(fake.chat_bodies) == before
        for key in (world.store.keys.job("*"), world.store.keys.count("*")):
            assert not [found async for found in world.store.scan(key)]


async def test_what_nobody_counts_at_once_is_estimated(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that hangs, that refuses, that says nonsense; a picture; a prompt beyond the limit."""
    monkeypatch.setattr(counts, "ANSWER_S_MAX", 0.3)
    async with a_counter(redis_server, tmp_path) as (fake, _, api):
        fake.may_answer.clear()
        assert await count(api) == (5, True)
        fake.may_answer.set()
        for fake.status, fake.reply in ((404, {"detail": "Not Found"}), (200, {"tokens": []}), (500, {"count": 3})):
            assert await count(api) == (5, True)
        fake.status, fake.reply = 200, {"count": 7}
        assert await count(api) == (7, False)
        asked = len(fake.asked)
        source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
        picture = {"role": "user", "content": [{"type": "image", "source": source}]}
        assert (await count(api, messages=[picture]))[1]
        monkeypatch.setattr(counts, "PROMPT_BYTES_MAX", 100)
        assert await count(api) == (5, True)
        assert len(fake.asked) == asked


async def test_no_prompt_leaves_to_be_counted(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question has no consent and no verdict. No api asks it of a remote model, and no worker passes it on."""
    async with a_counter(redis_server, tmp_path, trust="remote") as (fake, _, api):
        assert api.gateway.fleet.picture.on_host["coder"]["gpu1"].state == "warm"
        assert counts._who_counts(api.gateway.fleet.picture, "coder") == ""
        monkeypatch.setattr(counts, "_who_counts", lambda *_: "gpu1")
        assert await count(api) == (5, True)
        assert fake.asked == []


async def test_only_a_few_prompts_are_counted_at_a_time(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others need not wait for it."""
    monkeypatch.setattr(counting, "AT_ONCE_MAX", 2)
    monkeypatch.setattr(counts, "ANSWER_S_MAX", 10.0)
    async with a_counter(redis_server, tmp_path) as (fake, _, api):
        fake.may_answer.clear()
        first = [asyncio.create_task(count(api)) for _ in range(2)]
        await until(lambda: len(fake.asked) == 2, what="two questions at the runtime")
        assert await count(api) == (5, True)
        fake.may_answer.set()
        assert await asyncio.gather(*first) == [(4711, False)] * 2


async def test_a_full_lane_is_an_overload_that_is_tried_again(redis_server: RedisServer, tmp_path: Path) -> None:
    """529 with a `Retry-After`: the client comes back by itself, and gets its answer."""
    keys = {"maxConcurrent": 1, "maxQueue": 0}
    async with a_gateway(redis_server, tmp_path, **keys) as (fake, _, api):
        fake.mute = True
        first = await RawClient.open(api)
        await first.send("POST", "/v1/messages", json.dumps(ASK | {"stream": True}).encode())
        await until(lambda: fake.active == 1, what="the slot is taken")
        async with client(api) as sdk:
            with pytest.raises(anthropic.InternalServerError) as full:
                await sdk.messages.create(**ASK)
        assert full.value.status_code == 529
        assert full.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 30
        fake.mute = False
        async with client(api, max_retries=5) as sdk:
            task = asyncio.create_task(sdk.messages.create(**ASK))
            first.close()
            assert (await asyncio.wait_for(task, 30)).stop_reason == "max_tokens"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_waits_through_a_cold_start(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Pings before `message_start`: the client neither errs nor asks twice."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.1)
    async with FakeOllama("qwen:32b").running() as fake:
        fake.hold_loads()
        model = {"backend": "ollama", "model": "qwen:32b", "url": fake.url}
        async with running(redis_server, tmp_path, coder=model) as (_, api), client(api, max_retries=2) as sdk:
            task = asyncio.create_task(said(sdk) if stream else sdk.messages.create(**ASK))
            raw = await RawClient.open(api)
            await raw.send("POST", "/v1/messages", json.dumps(ASK | {"stream": True}).encode())
            await asyncio.wait_for(fake.load_seen.wait(), 10)
            assert await raw.head() == 200
            beats = await raw.until_said(b"event: ping") + await raw.until_said(b"event: ping")
            assert beats.startswith(b": warmlane waiting in lane coder behind ")
            assert not task.done()
            fake.release_loads()
            message = await asyncio.wait_for(task, 15)
            assert message.content[0].type == "text" and message.content[0].text
            assert message.stop_reason is not None
            assert fake.loads_started == ["qwen:32b"]
            raw.close()


async def test_a_hang_up_closes_the_runtimes_stream(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_gateway(redis_server, tmp_path) as (fake, _, api):
        fake.mute = True
        raw = await RawClient.open(api)
        await raw.send("POST", "/v1/messages", json.dumps(ASK | {"stream": True}).encode())

        async def active(count: int) -> bool:
            return fake.active == count

        await eventually(lambda: active(1), what="a generation")
        raw.close()
        await eventually(lambda: active(0), what="its end", timeout_s=2)
