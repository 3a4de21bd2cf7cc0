"""`onLoss: continue` with workers and runtimes that are really killed: the answer comes whole, nothing comes twice."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from broker import errors, jobs
from broker.frames import replay
from broker.lifecycle import State
from tests.support.live_api import live_api
from tests.support.llama_server import llama_command
from tests.support.redis_server import RedisServer
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.worker_world import Ask, World, simulated, words, worker_world

pytestmark = pytest.mark.real

LONG = 150
"""Words that take the simulated model three seconds."""

TOKENS = 800
PROMPT_TOKENS = 24
ASK = [{"role": "user", "content": "Hi there"}]
GREEDY = {"temperature": 0, "presence_penalty": 1.5, "repeat_last_n": 4096}
"""The same words for the same text before them, and no phrase that comes back: what came twice would show."""


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as found:
        yield found


def continued(**keys: Any) -> dict[str, Any]:
    return simulated(onLoss="continue", options={"decodeTps": 50}, **keys)


async def heard(ask: Ask, pieces: int) -> None:
    """Reads until so many words have come."""
    while len(ask.text.split()) < pieces:
        await ask.next()


def one_answer(ask: Ask, tokens: int) -> None:
    """What was told is one answer: its words once and in order, one name, one role, one finish."""
    assert ask.text == words(tokens) and ask.restarts == 0
    chunks = ask.chunks
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["delta"].get("role") for choice in choices].count("assistant") == 1
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]


async def test_a_real_llama_server_is_killed_in_the_middle(world: World, tmp_path: Path) -> None:
    """Twice. The client hears what the three of them said, one behind the other. Behind each seam stands, to the
    letter, what a llama-server says that is asked for the rest of what stands before it; the figures are of one answer.
    """
    model = {
        "backend": "llama.cpp", "model": str(write_tiny_gguf(tmp_path / "tiny.gguf", megabytes=20)),
        "command": llama_command(), "contextTokens": 4096, "memoryMb": 64, "keepWarm": True, "onLoss": "continue",
        "coldStartBudgetMs": 60_000,
    }  # fmt: skip
    await world.apply({"tiny": model})
    host = await world.warm_host()
    async with (
        live_api(await world._open("api")) as api,
        openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="-", max_retries=0, timeout=60) as client,
    ):
        stream = await client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=TOKENS, stream=True, stream_options={"include_usage": True},
            extra_body=GREEDY,
        )  # type: ignore[call-overload]  # fmt: skip
        job_id = stream.response.headers["x-gateway-job"]
        chunks: list[Any] = []
        kills = 0
        async for chunk in stream:
            chunks.append(chunk)
            if kills < 2 and len(chunks) > 30 * (kills + 1):
                job = await jobs.read(world.store, job_id)
                if (job.state, job.attempt) == (State.STREAMING, kills + 1):  # it has said something
                    world.runtime("tiny").kill()
                    kills += 1

    told = await by_attempt(world, job_id)
    assert len(told) == 3 and "".join(told) == text_of(chunks)
    url = host.residents.wakers["tiny"].runtime.endpoint().base_url
    for seam in (1, 2):
        before, behind = "".join(told[:seam]), told[seam]
        said = await rest_of(url, before)
        assert said == behind if seam == 2 else said.startswith(behind)
    assert len({chunk.id for chunk in chunks}) == 1
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert [choice.delta.role for choice in choices].count("assistant") == 1
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (PROMPT_TOKENS, TOKENS)


async def by_attempt(world: World, job_id: str) -> list[str]:
    """The text of each attempt, as it stands in the log."""
    told: dict[int, str] = {}
    async for frame in replay(world.store, job_id):
        for line in [] if frame.terminal else frame.data.decode().split("\n\n"):
            for choice in json.loads(line.removeprefix("data: "))["choices"] if line else ():
                told[frame.attempt] = told.get(frame.attempt, "") + (choice["delta"].get("content") or "")
    return list(told.values())


async def rest_of(url: str, text: str) -> str:
    """What a llama-server itself says behind a text, with nothing in its cache."""
    body = {
        "messages": [*ASK, {"role": "assistant", "content": text}], "max_tokens": TOKENS - await tokens_of(url, text),
        "continue_final_message": True, "add_generation_prompt": False, "cache_prompt": False, "stream": True, **GREEDY,
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:  # unstreamed it would repeat the text
        lines = (await client.post("/v1/chat/completions", json=body)).text.split("\n\n")
    found = [json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines if "{" in line]
    return "".join(found)


async def tokens_of(url: str, text: str) -> int:
    async with httpx.AsyncClient(base_url=url) as client:
        found = (await client.post("/tokenize", json={"content": f"x{text}"})).json()
    return len(found["tokens"]) - 2  # the space that the tokenizer puts in front, and the x that keeps it from the text


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def test_a_runtime_dies_and_its_model_comes_back(world: World) -> None:
    await world.apply({"big": continued()})
    await world.warm_host()
    await world.runtime("big").break_with(die_after_tokens=4)
    ask = await world.submit("big", tokens=9)
    job = await ask.end()
    assert job.state is State.DONE and (job.continues, job.losses, job.attempt) == (1, 1, 2)
    one_answer(ask, 9)


async def test_its_worker_is_killed_and_started_again(world: World) -> None:
    """Its next life knows what the earlier one held, and goes on at once."""
    await world.apply({"big": continued()})
    worker = world.process("workers.host")
    await world.until_model("big", "warm")
    ask = await world.submit("big", tokens=LONG)
    await heard(ask, 5)
    worker.kill()
    world.process("workers.host")
    job = await ask.end(30)
    assert job.state is State.DONE and job.continues == 1, job
    one_answer(ask, LONG)


async def test_its_worker_is_killed_and_another_host_goes_on(world: World) -> None:
    """The lease ends, the scheduler judges, and the other host, which has the model warm, takes it."""
    await world.apply({"big": continued(replicas=2)})
    worker = world.process("workers.host", "gpu2")
    await world.host("gpu1")
    for host in ("gpu1", "gpu2"):
        await world.until_model("big", "warm", host=host)
    await world.scheduler()
    async with paused(world):
        ask = await world.submit("big", tokens=LONG)
        await heard(ask, 5)
        worker.kill()
    job = await ask.end(30)
    assert job.state is State.DONE and (job.continues, job.owner) == (1, "gpu1"), job
    one_answer(ask, LONG)


async def test_a_drain_leaves_the_rest_to_another_host(world: World) -> None:
    """What does not end within the drain's time is given to whoever is there; it counts as nobody's loss."""
    await world.apply({"big": continued(replicas=2)}, drainTimeoutMs=200)
    for host in ("gpu1", "gpu2"):
        await world.host(host)
        await world.until_model("big", "warm", host=host)
    async with paused(world, "gpu2"):
        ask = await world.submit("big", tokens=LONG)
        await heard(ask, 5)
        await world.hosts["gpu1"].drain()
        await world.ended("gpu1")
    job = await ask.end(30)
    assert job.state is State.DONE and (job.losses, job.owner) == (0, "gpu2"), job
    one_answer(ask, LONG)


async def test_without_it_the_killed_workers_client_hears_an_error(world: World) -> None:
    await world.apply({"big": continued() | {"onLoss": "error"}})
    worker = world.process("workers.host")
    await world.until_model("big", "warm")
    ask = await world.submit("big", tokens=LONG)
    await heard(ask, 5)
    worker.kill()
    world.process("workers.host")
    job = await ask.end(30)
    assert (job.state, job.error) == (State.FAILED, errors.WorkerLost.code)


async def test_a_worker_that_cannot_go_on_after_all_says_so(world: World) -> None:
    """It does not begin anew: its client has half of another answer."""
    await world.apply({"big": continued()})
    await world.warm_host()
    ask = await world.submit("big", tokens=LONG)
    await heard(ask, 5)
    async with paused(world):
        world.runtime("big").kill()
        await ask.until_state(State.QUEUED)
        await world.store.command("SET", world.store.keys.request(ask.job_id), b'{"model":"big"}')
    job = await ask.end(30)
    assert (job.state, job.error) == (State.FAILED, errors.WorkerLost.code)
    assert "cannot be gone on from" in job.error_message


@asynccontextmanager
async def paused(world: World, host: str = "gpu1") -> AsyncIterator[None]:
    """No job is claimed meanwhile."""
    dispatcher = world.hosts[host].dispatcher
    dispatcher.stopped = True
    try:
        yield
    finally:
        dispatcher.stopped = False
        dispatcher.dispatch()
