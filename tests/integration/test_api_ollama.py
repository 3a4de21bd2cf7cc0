"""The Ollama dialect at the front door, with the stock client: before an Ollama, and before a runtime of chat only."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ollama
import pytest

from api import stream as stream_module
from api.routes import chat as chat_module
from broker.lifecycle import State
from tests.support.fake_ollama import FakeOllama
from tests.support.live_api import LiveApi, RawClient, live_api
from tests.support.redis_server import RedisServer
from tests.support.scripted_runtime import ScriptedVllm
from tests.support.waiting import until
from tests.support.worker_world import World, eventually, simulated, words, worker_world
from tests.unit.dialects import runtime_streams as streams
from workers.runtimes.http_server import Exchange

pytestmark = pytest.mark.real

ASK = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}


class Scripted(ScriptedVllm):
    """Says what a test wants to be said."""

    stream = b""

    async def _say(self, exchange: Exchange, body: dict[str, Any]) -> None:
        if not self.stream:
            return await super()._say(exchange, body)
        await exchange.write(self.stream)
        await exchange.end()


@asynccontextmanager
async def running(server: RedisServer, directory: Path, **models: Any) -> AsyncIterator[tuple[World, LiveApi]]:
    async with worker_world(server.socket_url, directory) as world:
        await world.apply(models, headerHoldMs=300)
        await world.warm_host()
        async with live_api(await world._open("api")) as api:
            yield world, api


@asynccontextmanager
async def an_ollama(
    server: RedisServer, directory: Path, **keys: Any
) -> AsyncIterator[tuple[FakeOllama, World, LiveApi]]:
    """A gateway in front of an Ollama with one model."""
    async with FakeOllama("qwen:32b").running() as fake:
        model = {"backend": "ollama", "model": "qwen:32b", "url": fake.url, "keepWarm": True, **keys}
        async with running(server, directory, coder=model) as (world, api):
            yield fake, world, api


@asynccontextmanager
async def a_chat(server: RedisServer, directory: Path, stream: bytes = b"") -> AsyncIterator[tuple[Scripted, LiveApi]]:
    """A gateway in front of a vLLM."""
    async with Scripted().running() as fake:
        fake.stream = stream
        model = {"backend": "vllm", "model": "weights", "url": fake.url, "keepWarm": True}
        async with running(server, directory, coder=model) as (_, api):
            yield fake, api


@asynccontextmanager
async def client(api: LiveApi) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(api.url, timeout=30) as found:
        yield found


async def test_an_ollama_is_asked_in_its_own_words(redis_server: RedisServer, tmp_path: Path) -> None:
    """What the client said goes on; what would load the model again or unload it does not."""
    async with an_ollama(redis_server, tmp_path) as (fake, _, api), client(api) as sdk:
        fake.tool_calls = [{"id": "call_1", "function": {"index": 0, "name": "read", "arguments": {"path": "a"}}}]
        options = {"num_ctx": 8192, "temperature": 0.25, "mirostat": 1}
        asked: dict[str, Any] = {"think": "high", "options": options, "keep_alive": 0, "tools": [TOOL]}
        parts = [part async for part in await sdk.chat("coder", ASK, stream=True, **asked)]
        whole = await sdk.chat("coder", ASK, **asked)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content == "Hello from Ollama"
    assert {part.model for part in parts} == {"coder"} and parts[-1].done_reason == whole.done_reason == "stop"
    for message in (parts[-2].message, whole.message):
        assert message.tool_calls is not None and message.tool_calls[0].function.arguments == {"path": "a"}
    assert (whole.prompt_eval_count, whole.eval_count) == (11, 3)
    for body in fake.native_bodies[-2:]:
        assert body["options"] == {"temperature": 0.25, "mirostat": 1}
        assert (body["model"], body["think"], body["keep_alive"], body["stream"]) == ("qwen:32b", "high", -1, True)
    assert fake.loads_started == ["qwen:32b"] and fake.loaded == {"qwen:32b": -1}


async def test_an_ollamas_lines_come_byte_for_byte(redis_server: RedisServer, tmp_path: Path) -> None:
    """But for the model's name."""
    async with an_ollama(redis_server, tmp_path) as (_, _, api):
        raw = await RawClient.open(api)
        await raw.send("POST", "/api/generate", json.dumps({"model": "coder", "prompt": "Hi", "raw": True}).encode())
        assert await raw.head() == 200 and raw.headers["content-type"] == "application/x-ndjson"
        at = '{"model":"coder","created_at":"2026-08-04T08:52:19.385406455Z","response":'
        figures = '"prompt_eval_count":11,"eval_count":3,"total_duration":9,"load_duration":1'
        end = f'"done":true,"done_reason":"stop",{figures}}}'
        said = [f'{at}"{word}","done":false}}\n' for word in ("", "Hello", " from", " Ollama")]
        assert (await raw.body()).decode() == "".join([*said, f'{at}"",{end}\n'])


async def test_what_only_an_ollama_can_do_goes_to_one(redis_server: RedisServer, tmp_path: Path) -> None:
    async with an_ollama(redis_server, tmp_path) as (fake, _, api), client(api) as sdk:
        found = await sdk.generate(
            "coder", "a = ", suffix="return a", raw=True, context=[1, 2], template="{{ .Prompt }}"
        )
        assert found.response == "Hello from Ollama"
        assert fake.generate_bodies[-1]["suffix"] == "return a" and fake.generate_bodies[-1]["context"] == [1, 2]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_in_the_middle_ends_the_job_as_failed(
    redis_server: RedisServer, tmp_path: Path, stream: bool
) -> None:
    """The status is 200 by then, and only the line says so."""
    async with an_ollama(redis_server, tmp_path) as (fake, world, api), client(api) as sdk:
        fake.trap = "error line"
        said = ""
        with pytest.raises(ollama.ResponseError) as failed:
            if stream:
                async for part in await sdk.chat("coder", ASK, stream=True):
                    said += part.message.content or ""
            else:
                await sdk.chat("coder", ASK)
        assert failed.value.error == "the runtime says: an error was encountered while running the model"
        assert said == ("Hello" if stream else "")
        assert failed.value.status_code == (-1 if stream else 502)
        jobs = [key async for key in world.store.scan(world.store.keys.job("*"))]
        states = {
            (await world.store.hash(key)).get(b"state") for key in jobs if not key.endswith((":frames", ":request"))
        }
        assert states == {State.FAILED.value.encode()}


async def test_an_ollama_that_stops_without_a_word_has_not_answered(redis_server: RedisServer, tmp_path: Path) -> None:
    async with an_ollama(redis_server, tmp_path) as (fake, _, api), client(api) as sdk:
        fake.trap = "silent end"
        with pytest.raises(ollama.ResponseError, match="without saying that it is done"):
            [part async for part in await sdk.chat("coder", ASK, stream=True)]


async def test_the_ollamas_own_refusal_keeps_its_words(redis_server: RedisServer, tmp_path: Path) -> None:
    async with an_ollama(redis_server, tmp_path) as (fake, _, api), client(api) as sdk:
        fake.only_embeds.add("qwen:32b")
        with pytest.raises(ollama.ResponseError) as refused:
            await sdk.generate("coder", "Hi")
        assert refused.value.status_code == 400 and refused.value.error == '"qwen:32b" does not support generate'


async def test_vectors_of_an_ollama(redis_server: RedisServer, tmp_path: Path) -> None:
    async with an_ollama(redis_server, tmp_path, embeddings=True) as (fake, _, api), client(api) as sdk:
        found = await sdk.embed("coder", ["a", "b"], truncate=False, dimensions=2, options={"num_ctx": 9}, keep_alive=0)
        assert (found.model, found.embeddings, found.prompt_eval_count) == ("coder", [[0.5, 1.0], [0.5, 1.0]], 2)
        assert (await sdk.embeddings("coder", "a")).embedding == [0.5, 1.0]
        first, second = fake.embed_bodies[-2:]
        assert first == {"model": "qwen:32b", "input": ["a", "b"], "truncate": False, "dimensions": 2, "keep_alive": -1}
        assert second == {"model": "qwen:32b", "prompt": "a", "keep_alive": -1}


async def test_tools_over_a_runtime_that_knows_only_chat(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_chat(redis_server, tmp_path, streams.LLAMA_TOOLS) as (fake, api), client(api) as sdk:
        parts = [part async for part in await sdk.chat("coder", ASK, tools=[TOOL], stream=True)]
        whole = await sdk.chat("coder", ASK, tools=[TOOL])
        assert fake.chat_bodies[-1]["tools"][0]["function"]["name"] == "read"
        called = [call.function for call in whole.message.tool_calls or ()]
        assert [(one.name, one.arguments) for one in called] == [("read", {"path": 'a "b".py'}), ("list", {})]
        told = [part.message.tool_calls for part in parts if part.message.tool_calls]
        assert told == [whole.message.tool_calls]
        answered = [*ASK, whole.message, {"role": "tool", "tool_name": "read", "content": "x = 1"}]
        await sdk.chat("coder", answered, tools=[TOOL])
        _, call, answer = fake.chat_bodies[-1]["messages"]
        assert call["tool_calls"][0]["function"] == {"name": "read", "arguments": '{"path": "a \\"b\\".py"}'}
        assert answer["tool_call_id"] == call["tool_calls"][0]["id"]


async def test_thinking_over_a_runtime_that_knows_only_chat(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_chat(redis_server, tmp_path, streams.VLLM_REASONING) as (fake, api), client(api) as sdk:
        parts = [part async for part in await sdk.chat("coder", ASK, think=True, stream=True)]
        whole = await sdk.generate("coder", "Hi", think=True)
        assert "".join(part.message.thinking or "" for part in parts) == whole.thinking == "Hmm."
        assert "".join(part.message.content or "" for part in parts) == whole.response == "Yes."
        assert fake.chat_bodies[-1]["chat_template_kwargs"] == {"enable_thinking": True}


async def test_pictures_over_a_runtime_that_knows_only_chat(redis_server: RedisServer, tmp_path: Path) -> None:
    async with a_chat(redis_server, tmp_path) as (fake, api), client(api) as sdk:
        await sdk.chat("coder", [{"role": "user", "content": "What?", "images": [b"\x89PNG\r\n\x1a\n"]}])
        text, picture = fake.chat_bodies[-1]["messages"][0]["content"]
        assert text == {"type": "text", "text": "What?"}
        assert picture["image_url"]["url"] == "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize("case", ["error + [DONE]", "silent end", "cut"])
async def test_a_chat_that_breaks_off_is_an_error_line(redis_server: RedisServer, tmp_path: Path, case: str) -> None:
    async with a_chat(redis_server, tmp_path) as (fake, api), client(api) as sdk:
        fake.trap = case
        said = ""
        with pytest.raises(ollama.ResponseError) as failed:
            async for part in await sdk.chat("coder", ASK, stream=True):
                assert not part.done
                said += part.message.content or ""
        assert said == "scripted 1" or said.endswith(" 1"), said
        assert failed.value.error


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("endpoint", ["chat", "generate"])
async def test_a_client_waits_while_its_model_loads(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, endpoint: str
) -> None:
    """Empty lines that the client takes for what they are; no load is asked for twice."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.1)
    async with FakeOllama("qwen:32b").running() as fake:
        fake.hold_loads()
        model = {"backend": "ollama", "model": "qwen:32b", "url": fake.url}
        async with running(redis_server, tmp_path, coder=model) as (_, api), client(api) as sdk:
            parts: list[Any] = []

            async def ask() -> None:
                asked: dict[str, Any] = {"messages": ASK} if endpoint == "chat" else {"prompt": "Hi"}
                found = await getattr(sdk, endpoint)("coder", stream=stream, **asked)
                if not stream:
                    parts.append(found)
                    return
                async for part in found:
                    parts.append(part)

            task = asyncio.create_task(ask())
            await asyncio.wait_for(fake.load_seen.wait(), 10)
            if stream:
                await until(lambda: len(parts) >= 3, what="three heartbeats")
            assert all(not part.done and text_of(part) == "" and part.model == "coder" for part in parts)
            fake.release_loads()
            await asyncio.wait_for(task, 15)
            assert "".join(map(text_of, parts)) == "Hello from Ollama" and parts[-1].done_reason == "stop"
            assert fake.loads_started == ["qwen:32b"]


async def test_a_promoted_job_is_translated_for_the_model_that_takes_it(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """One that only an Ollama can do is not promoted: it waits for its own."""
    async with FakeOllama("qwen:32b").running() as fake:
        fake.hold_loads()
        model = {"backend": "ollama", "model": "qwen:32b", "url": fake.url, "coldStartBudgetMs": 200}
        models = {"coder": {**model, "fallback": "small"}, "small": simulated(maxConcurrent=2)}
        async with running(redis_server, tmp_path, **models) as (world, api), client(api) as sdk:
            await world.scheduler()
            raw = asyncio.create_task(sdk.generate("coder", "Hi", raw=True))
            parts = [part async for part in await sdk.chat("coder", ASK, stream=True, options={"num_predict": 3})]
            assert "".join(map(text_of, parts)) == words(3)
            assert parts[-1].model == "small" and parts[-1].done_reason == "length"
            assert not raw.done()
            fake.release_loads()
            assert (await asyncio.wait_for(raw, 15)).response == "Hello from Ollama"


async def test_a_client_without_a_stream_is_kept_waiting_too(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With spaces before the object, which no client minds."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(chat_module, "WHOLE_HOLD_S", 0.2)
    async with FakeOllama("qwen:32b").running() as fake:
        fake.hold_loads()
        model = {"backend": "ollama", "model": "qwen:32b", "url": fake.url}
        async with running(redis_server, tmp_path, coder=model) as (_, api):
            raw = await RawClient.open(api)
            asked = {"model": "coder", "messages": ASK, "stream": False}
            await raw.send("POST", "/api/chat", json.dumps(asked).encode())
            assert await raw.head() == 200 and raw.headers["content-type"] == "application/json"
            assert [await raw.piece(), await raw.piece()] == [b" ", b" "]
            fake.release_loads()
            found = ollama.ChatResponse(**json.loads(await raw.body()))
            assert found.message.content == "Hello from Ollama" and found.done_reason == "stop"


def text_of(part: Any) -> str:
    return str(part.message.content if hasattr(part, "message") else part.response)


async def test_a_name_that_leads_a_caller_nowhere_is_not_offered(redis_server: RedisServer, tmp_path: Path) -> None:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        rules = [{"match": {"lane": "theirs", "caller": "ann"}, "target": "coder"}]
        await world.apply({"coder": simulated(contextTokens=77)}, routing=rules)
        async with (
            live_api(await world._open("api"), keys="ann:s3cret-a,bob:s3cret-b") as api,
            ollama.AsyncClient(api.url, headers={"authorization": "Bearer s3cret-a"}) as ann,
            ollama.AsyncClient(api.url, headers={"authorization": "Bearer s3cret-b"}) as bob,
            client(api) as nobody,
        ):
            assert [model.model for model in (await ann.list()).models] == ["coder", "theirs"]
            assert [model.model for model in (await bob.list()).models] == ["coder"]
            assert (await ann.show("theirs")).modelinfo == (await ann.show("theirs:latest")).modelinfo
            for ask in (bob.show("theirs"), bob.chat("theirs")):
                with pytest.raises(ollama.ResponseError) as unknown:
                    await ask
                assert unknown.value.status_code == 404
            for ask in (nobody.list(), nobody.show("coder"), nobody.ps(), nobody.generate("coder")):
                with pytest.raises(ollama.ResponseError) as locked:
                    await ask
                assert locked.value.status_code == 401
            raw = await RawClient.open(api)
            await raw.send("POST", "/api/show", b'{"model":"' + b"x" * 100_000 + b'"}', authorization="Bearer s3cret-a")
            assert await raw.head() == 413


async def test_a_heartbeat_says_how_the_wait_goes(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeOllama("qwen:32b").running() as fake:
        fake.hold_loads()
        model = {"backend": "ollama", "model": "qwen:32b", "url": fake.url}
        async with running(redis_server, tmp_path, coder=model) as (_, api):
            raw = await RawClient.open(api)
            await raw.send("POST", "/api/chat", json.dumps({"model": "coder", "messages": ASK}).encode())
            assert await raw.head() == 200
            beat = json.loads(await raw.piece())
            assert beat["status"].startswith("waiting in lane coder behind 0") and beat["done"] is False
            raw.close()


async def test_a_hang_up_closes_the_ollamas_stream(redis_server: RedisServer, tmp_path: Path) -> None:
    """This client repeats nothing, so nobody waits for it."""
    async with an_ollama(redis_server, tmp_path) as (fake, _, api):
        fake.mute = True
        raw = await RawClient.open(api)
        await raw.send("POST", "/api/chat", json.dumps({"model": "coder", "messages": ASK}).encode())

        async def active(count: int) -> bool:
            return fake.active == count

        await eventually(lambda: active(1), what="a generation")
        raw.close()
        await eventually(lambda: active(0), what="its end", timeout_s=2)
