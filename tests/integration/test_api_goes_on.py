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
import pytest

from tests.support.fake_ollama import FakeOllama
from tests.support.live_api import LiveApi, live_api
from tests.support.redis_server import RedisServer
from tests.support.scripted_runtime import ScriptedLlamaServer, _event
from tests.support.worker_world import World, worker_world
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
    async with gateway(redis_server, tmp_path, fake) as (world, api):
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
