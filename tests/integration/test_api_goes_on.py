"""`onLoss: continue` at the front door: a runtime breaks off, and in each dialect the client hears one whole answer.

What it hears is compared with an answer that nothing interrupted: event by event, but for names and times.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from broker import jobs
from broker.lifecycle import State
from tests.support.clients import follow
from tests.support.fake_ollama import FakeOllama
from tests.support.live_api import LiveApi, RawClient, live_api
from tests.support.redis_server import RedisServer
from tests.support.scripted_runtime import ScriptedLlamaServer, _event
from tests.support.worker_world import World, eventually, worker_world
from workers.runtimes.http_server import Exchange

pytestmark = pytest.mark.real

ASK = [{"role": "user", "content": "Hi"}]
WORDS = "scripted 1 2 3 4 5 6 7"


class Llama(ScriptedLlamaServer):
    """Chats, and finishes a text."""

    async def _handle(self, exchange: Exchange) -> None:
        if (exchange.method, exchange.path) != ("POST", "/v1/completions"):
            return await super()._handle(exchange)
        body = exchange.json()
        self.chat_bodies.append(body)
        told = len(body["prompt"].split()) - 1  # of the prompts here the first word is the client's
        await exchange.begin("text/event-stream")
        breaks = self.trap and self.falls
        if breaks and self.falls:
            self.falls -= 1
        for number in range(self.after if breaks else (body.get("max_tokens") or 8 - told)):
            said = f" {told + number}"
            choice = {"text": said, "index": 0, "logprobs": None, "finish_reason": None}
            await exchange.write(_event({**self._envelope(body, [choice]), "object": "text_completion"}))
        if breaks:
            return exchange._connection.abort()
        choice = {"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}
        await exchange.write(_event({**self._envelope(body, [choice]), "object": "text_completion"}))
        usage = {"prompt_tokens": 1 + told, "completion_tokens": 8 - told, "total_tokens": 9}
        await exchange.write(_event({**self._envelope(body, []), "object": "text_completion", "usage": usage}))
        await exchange.write(b"data: [DONE]\n\n")
        await exchange.end()


@asynccontextmanager
async def gateway(
    server: RedisServer, directory: Path, fake: Any, *, backend: str = "llama.cpp", **keys: Any
) -> AsyncIterator[tuple[World, LiveApi]]:
    async with fake.running(), worker_world(server.socket_url, directory) as world:
        model = {"backend": backend, "model": "weights", "url": fake.url, "keepWarm": True, "onLoss": "continue"}
        await world.apply({"coder": model | keys}, headerHoldMs=300)
        await world.warm_host()
        async with live_api(await world._open("api")) as api:
            yield world, api


async def ask(api: LiveApi, path: str, **body: Any) -> tuple[int, str]:
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as client:
        response = await client.post(path, json={"model": "coder", "stream": True} | body)
    return response.status_code, response.text


def break_off(fake: Any, trap: str = "cut", *, times: int = 1, after: int = 3) -> None:
    fake.trap, fake.falls, fake.after = trap, times, after


def plain(text: str) -> str:
    """The answer without what differs from one to the next: the job's id, instants and durations."""
    text = re.sub(r"\b(resp|msg)_[0-9A-Z]{26}", r"\1", text)
    return re.sub(r'"(\w+_at|created|\w+_duration)":("[^"]*"|\d+)', r'"\1":0', text)


DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": ASK, "stream_options": {"include_usage": True}}),
    "chat without usage": ("/v1/chat/completions", {"messages": ASK, "max_tokens": 8}),
    "completions": ("/v1/completions", {"prompt": "Hi", "stream_options": {"include_usage": True}}),
    "messages": ("/v1/messages", {"messages": ASK, "max_tokens": 8}),
    "responses": ("/v1/responses", {"input": "Hi"}),
    "ollama chat": ("/api/chat", {"messages": ASK}),
    "ollama generate": ("/api/generate", {"prompt": "Hi"}),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("trap", ["cut", "silent end twice", "echo"])
async def test_one_whole_answer_in_every_dialect(
    redis_server: RedisServer, tmp_path: Path, dialect: str, trap: str
) -> None:
    path, body = DIALECTS[dialect]
    fake = Llama()
    async with gateway(redis_server, tmp_path, fake) as (_, api):
        whole = await ask(api, path, **body)
        assert whole[0] == 200
        fake.chat_bodies.clear()
        fake.echo = trap == "echo"
        break_off(fake, "silent end" if trap == "silent end twice" else "cut", times=1 + (trap == "silent end twice"))

        broken = await ask(api, path, **body)

        asked = [one for one in fake.chat_bodies if one.get("max_tokens") != 1]
        assert len(asked) == (3 if trap == "silent end twice" else 2)
        assert plain(broken[1]) == plain(whole[1])
        if dialect == "chat":
            assert asked[1]["messages"] == [*ASK, {"role": "assistant", "content": "scripted 1 2"}]
            assert (asked[1]["continue_final_message"], asked[1]["add_generation_prompt"]) == (True, False)
        if dialect in ("chat without usage", "messages"):
            assert asked[-1]["max_tokens"] == (2 if trap == "silent end twice" else 5)


@pytest.mark.parametrize("trap", ["error", "text error", "error + [DONE]"])
async def test_however_the_runtime_says_that_it_broke(redis_server: RedisServer, tmp_path: Path, trap: str) -> None:
    fake = Llama()
    async with gateway(redis_server, tmp_path, fake) as (_, api):
        break_off(fake, trap)
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="-", max_retries=0) as client:
            stream = await client.chat.completions.create(model="coder", messages=ASK, stream=True)  # type: ignore[call-overload]
            chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == WORDS
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks].count("assistant") == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]


async def test_by_default_its_client_hears_an_error(redis_server: RedisServer, tmp_path: Path) -> None:
    fake = Llama()
    async with gateway(redis_server, tmp_path, fake, onLoss="error") as (_, api):
        break_off(fake)
        status, text = await ask(api, *CHAT, messages=ASK)
        assert status == 200 and told_in_band(text) == "runtime_failed"
        assert len(spoken(fake)) == 1


CHAT: tuple[str] = ("/v1/chat/completions",)


def told_in_band(text: str) -> str:
    """The code of the error that ends a stream of chat; no `[DONE]` may follow."""
    last = text.rstrip().split("\n\n")[-1]
    found: str = json.loads(last.removeprefix("data: "))["error"]["code"]
    return found


def spoken(fake: Any) -> list[dict[str, Any]]:
    """What it was asked but for probes."""
    return [body for body in fake.chat_bodies if body.get("max_tokens") != 1]


class Thinking(ScriptedLlamaServer):
    """Says these deltas and breaks off."""

    deltas: tuple[dict[str, Any], ...] = ()

    async def _say(self, exchange: Exchange, body: dict[str, Any]) -> None:
        if not self.deltas or body.get("max_tokens") == 1:
            return await super()._say(exchange, body)
        for delta in self.deltas:
            await exchange.write(self._chunk(body, delta))
        exchange._connection.abort()


CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "read", "arguments": '{"a'}}


@pytest.mark.parametrize(
    "deltas",
    [
        [{"reasoning_content": "Hm"}],
        [{"reasoning_content": "Hm"}, {"content": "It"}],
        [{"content": "Let me see."}, {"tool_calls": [CALL]}],
        [{"content": "<think>\nHm"}],
    ],
    ids=["reasoning", "reasoned", "call", "raw reasoning"],
)
async def test_a_loss_within_a_thought_or_a_call_ends_it(
    redis_server: RedisServer, tmp_path: Path, deltas: list[dict[str, Any]]
) -> None:
    fake = Thinking()
    async with gateway(redis_server, tmp_path, fake) as (_, api):
        fake.deltas = tuple(deltas)
        _, text = await ask(api, *CHAT, messages=ASK)
        assert told_in_band(text) == "runtime_failed"
        assert len(spoken(fake)) == 1


@pytest.mark.parametrize(
    "form",
    [{"response_format": {"type": "json_object"}}, {"n": 2}, {"logprobs": True}],
    ids=lambda form: next(iter(form)),
)
async def test_a_loss_in_a_form_ends_it(redis_server: RedisServer, tmp_path: Path, form: dict[str, Any]) -> None:
    fake = Llama()
    async with gateway(redis_server, tmp_path, fake) as (_, api):
        break_off(fake)
        _, text = await ask(api, *CHAT, messages=ASK, **form)
        assert told_in_band(text) == "runtime_failed"


async def test_losses_are_bounded(redis_server: RedisServer, tmp_path: Path) -> None:
    """maxLosses 3: the first answer and three more, and then its client hears of the fourth."""
    fake = Llama()
    async with gateway(redis_server, tmp_path, fake) as (_, api):
        break_off(fake, times=10, after=1)
        _, text = await ask(api, *CHAT, messages=ASK)
        assert told_in_band(text) == "runtime_failed"
        assert len(spoken(fake)) == 4
        said = [json.loads(line[6:])["choices"][0]["delta"].get("content") for line in text.split("\n\n")[:-2]]
        assert "".join(filter(None, said)) == "scripted 1 2 3"


async def test_who_waits_for_the_whole_gets_a_new_answer(redis_server: RedisServer, tmp_path: Path) -> None:
    """Nobody has seen anything of it: it starts again, as it always did."""
    fake = Llama()
    async with gateway(redis_server, tmp_path, fake) as (_, api):
        break_off(fake)
        status, text = await ask(api, *CHAT, messages=ASK, stream=False)
        assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == WORDS
        assert [body["messages"] for body in spoken(fake)] == [ASK, ASK]


class Gone(Llama):
    """Breaks off once, and then loads until it is let in."""

    async def _fall(self, exchange: Exchange, body: dict[str, Any]) -> None:
        self.hold_loads()
        await super()._fall(exchange, body)


@asynccontextmanager
async def broken_off(
    server: RedisServer, directory: Path, **keys: Any
) -> AsyncIterator[tuple[Gone, World, LiveApi, RawClient, str]]:
    """A client that has heard three words, and a runtime that is away."""
    fake = Gone()
    async with gateway(server, directory, fake, **keys) as (world, api):
        break_off(fake)
        client = await RawClient.open(api)
        await client.chat("Hi", model="coder")
        await client.head()
        await client.until_said(b'" 2"')
        job_id = client.headers["x-gateway-job"]

        async def waits() -> bool:
            return (await jobs.read(world.store, job_id)).continue_by > 0

        await eventually(waits, what="waits to be gone on with")
        yield fake, world, api, client, job_id
        client.close()


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_client_that_waits_for_the_rest_hears_that_it_does(redis_server: RedisServer, tmp_path: Path) -> None:
    async with broken_off(redis_server, tmp_path) as (fake, world, _, client, job_id):
        said = await client.until_said(b"goes on")
        assert b": warmlane the answer broke off and goes on" in said
        fake.release_loads()
        await client.until_said(b"[DONE]")
        job = await jobs.read(world.store, job_id)
        assert (job.state, job.continues, job.attempt) == (State.DONE, 1, 2)
        assert json.loads(job.usage) == {"prompt_tokens": 5, "completion_tokens": 8}


@pytest.mark.parametrize("how", ["delete", "hang up"])
async def test_a_cancel_while_it_waits_for_the_rest(redis_server: RedisServer, tmp_path: Path, how: str) -> None:
    async with broken_off(redis_server, tmp_path) as (fake, world, api, client, job_id):
        if how == "delete":
            async with httpx.AsyncClient(base_url=api.url) as other:
                assert (await other.delete(f"/v1/jobs/{job_id}")).json()["state"] == "cancelled"
            assert b'"code":"cancelled"' in await client.until_said(b'"error"')
        else:
            client.close()

        async def ended() -> bool:
            return (await jobs.read(world.store, job_id)).state is State.CANCELLED

        await eventually(ended, what="the job is cancelled")
        assert len(spoken(fake)) == 1


async def test_a_wait_for_the_rest_that_takes_too_long(redis_server: RedisServer, tmp_path: Path) -> None:
    async with broken_off(redis_server, tmp_path, coldStartBudgetMs=700) as (_, world, _, client, job_id):
        await world.scheduler()
        text = (await client.until_said(b'"error"')).decode()
        assert told_in_band(text[text.rindex("data: ") :].split("\n\n")[0]) == "worker_lost"
        assert (await jobs.read(world.store, job_id)).state is State.EXPIRED


async def test_a_follower_resumes_over_the_seam(redis_server: RedisServer, tmp_path: Path) -> None:
    """From before it and from behind it, by `Last-Event-ID`: no event is missing, none comes twice, none restarts."""
    async with broken_off(redis_server, tmp_path) as (fake, _, api, _, job_id):
        async with httpx.AsyncClient(base_url=api.url, timeout=20) as http:
            following = asyncio.create_task(follow(http, api.url, job_id))
            fake.release_loads()
            events = await following
            assert [event.name for event in events] == ["frame"] * (len(events) - 1) + ["end"]
            ids = [event.id for event in events]
            attempts, seqs = zip(*(map(int, one.split("-")) for one in ids), strict=True)
            assert list(seqs) == list(range(1, len(ids) + 1)) and sorted(attempts) == list(attempts)
            assert set(attempts) == {1, 2}
            for after in range(len(ids) - 1):
                assert await follow(http, api.url, job_id, after=ids[after]) == events[after + 1 :]
            text = "".join(event.data["data"] for event in events[:-1])
            deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in text.split("\n\n") if line]
            assert "".join(delta.get("content") or "" for delta in deltas) == WORDS


async def test_an_ollama_goes_on_through_its_chat(redis_server: RedisServer, tmp_path: Path) -> None:
    """It knows no flags: the assistant's message at the end is what it goes on with, and it may repeat it."""
    fake = FakeOllama("weights")
    fake.echo = True
    async with gateway(redis_server, tmp_path, fake, backend="ollama") as (_, api):
        break_off(fake, "error line")

        async def once() -> None:
            await fake.load_seen.wait()

        task = asyncio.create_task(once())
        answer = asyncio.create_task(ask(api, "/api/chat", messages=ASK))
        await asyncio.wait_for(_fell(fake), 10)
        fake.trap = ""
        status, text = await answer
        task.cancel()
    lines = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert "".join(line["message"]["content"] for line in lines).startswith("Hello 1 2 3")
    asked = fake.chat_bodies[-1]
    assert asked["messages"][-1] == {"role": "assistant", "content": "Hello"}
    assert "continue_final_message" not in asked


async def _fell(fake: FakeOllama) -> None:
    while not fake.native_bodies:  # noqa: ASYNC110  # a double announces nothing
        await asyncio.sleep(0)
