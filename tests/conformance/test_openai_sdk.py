"""What the stock OpenAI SDK makes of us: its exception classes, its retries, its patience."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from api import stream as stream_module
from api.routes import chat as chat_module
from broker.store import Store
from tests.support.clients import Attempts, async_sdk, heard_out, sdk, text_of, user
from tests.support.gateway_process import House
from tests.support.live_api import live_api
from tests.support.waiting import block_until, until
from tests.support.worker_world import eventually, words

pytestmark = pytest.mark.real


def job(up: House, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{up.url}/v1/jobs/{job_id}").json()
    return found


def states(up: House) -> dict[str, str]:
    """What status calls every model."""
    return {model["name"]: model["state"] for model in httpx.get(f"{up.url}/v1/status").json()["models"]}


@contextmanager
def held(up: House, model: str, *, tokens: int) -> Iterator[str]:
    """A stream that holds a slot until the block ends; gives its job's id."""
    asked = {"model": model, "messages": user("hold"), "max_tokens": tokens, "stream": True}
    with (
        httpx.Client(timeout=30) as http,
        http.stream("POST", f"{up.url}/v1/chat/completions", json=asked) as response,
    ):
        assert response.status_code == 200
        yield response.headers["x-gateway-job"]


# --- names and answers -------------------------------------------------------------------------------------------


def test_models_are_listed_under_every_name(shared_house: House) -> None:
    """A picker offers models, aliases and routing names; an alias is answered by its model."""
    with sdk(shared_house.url, max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        assert {"tiny", "gpt-4o", "pretend", "narrow", "thoughtful", "fast-edit"} <= set(names)
        assert client.models.retrieve("gpt-4o").id == "gpt-4o"
        for asked, serves in (("gpt-4o", "tiny"), ("fast-edit", "pretend")):
            answer = client.chat.completions.create(model=asked, messages=user("hi"), max_tokens=2)
            assert answer.model == serves


async def test_five_equal_requests_at_once_are_five_answers(shared_house: House) -> None:
    """Parallel samples are no retries, however much they look alike."""
    async with async_sdk(shared_house.url, max_retries=0) as client:

        async def sample() -> tuple[str, str]:
            create = client.chat.completions.with_raw_response.create
            raw = await create(model="pretend", messages=user("same"), max_tokens=3)
            return raw.headers["x-gateway-job"], raw.parse().choices[0].message.content or ""

        samples = await asyncio.gather(*(sample() for _ in range(5)))
    assert len({job_id for job_id, _ in samples}) == 5
    assert {text for _, text in samples} == {words(3)}


async def test_the_async_client_streams(shared_house: House) -> None:
    async with async_sdk(shared_house.url, max_retries=0) as client:
        chunks = await heard_out(
            await client.chat.completions.create(
                model="pretend", messages=user("hi"), max_tokens=12, stream=True, stream_options={"include_usage": True}
            )
        )
    assert text_of(chunks) == words(12)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("model", ["tiny", "pretend"])
async def test_cached_tokens_are_told_to_the_client_and_in_status(shared_house: House, model: str) -> None:
    """The runtime's own figure, streamed and whole; the same prompt a second time is nearly all in the cache."""
    prompt = {"model": model, "messages": user(f"{model} " + "read this again " * 40), "max_tokens": 2}
    headers = {"X-Session-Affinity": f"again-{model}"}
    async with async_sdk(shared_house.url, max_retries=0) as client:
        whole = [await client.chat.completions.create(**prompt, extra_headers=headers) for _ in range(2)]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = await heard_out(await client.chat.completions.create(**prompt, **options, extra_headers=headers))
    for usage in (whole[1].usage, chunks[-1].usage):
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens is not None
        assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens * 0.8
    told = next(m for m in shared_house.status()["models"] if m["name"] == model)
    assert told["prompt_tokens"] > told["cached_tokens"] > usage.prompt_tokens * 1.6


# --- refusals ----------------------------------------------------------------------------------------------------


def test_every_choice_comes_whole_with_the_usage_of_all(shared_house: House) -> None:
    """Two choices of one real llama.cpp: no end of one is the end of the answer, and the last chunk counts both."""
    asked: dict[str, Any] = {"model": "tiny", "messages": user("hi"), "n": 2, "max_tokens": 5, "temperature": 1}
    with sdk(shared_house.url, max_retries=0) as client:
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [(choice.index, choice.finish_reason) for choice in whole.choices] == [(0, "length"), (1, "length")]
    assert all(choice.message.content for choice in whole.choices)
    ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert ends == {0: "length", 1: "length"} and [chunk.usage is not None for chunk in chunks].index(True) == (
        len(chunks) - 1
    )
    for usage in (whole.usage, chunks[-1].usage):
        assert usage is not None and usage.completion_tokens == 10
        assert usage.total_tokens == usage.prompt_tokens + 10
    assert not any("prompt_progress" in (told.model_extra or {}) for told in (whole, *chunks))


@pytest.mark.parametrize("several", [{"prompt": ["hello", "worlds"]}, {"prompt": "hello", "n": 2}])
def test_completions_tell_their_usage_once_and_no_progress(shared_house: House, several: dict[str, Any]) -> None:
    """llama.cpp tells the usage of each choice when it ends, and reads the second prompt behind the first text."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 1, **several}
    with sdk(shared_house.url, max_retries=0) as client:
        whole = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        quiet = list(client.completions.create(**asked, stream=True))
    last = chunks[-1]
    assert not last.choices and [chunk.usage is not None for chunk in chunks].index(True) == len(chunks) - 1
    assert not any(chunk.usage for chunk in quiet)
    for usage in (whole.usage, last.usage):
        assert usage is not None and usage.completion_tokens == 10
        assert usage.total_tokens == usage.prompt_tokens + 10
    assert not any("prompt_progress" in (told.model_extra or {}) for told in (whole, *chunks, *quiet))


def test_an_unknown_model_is_not_found(shared_house: House) -> None:
    attempts = Attempts()
    with sdk(shared_house.url, attempts=attempts) as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="tinny", messages=user("hi"))
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "did you mean tiny?" in caught.value.message
    assert len(attempts) == 1


def test_what_a_model_cannot_see_is_refused_once(shared_house: House) -> None:
    """llama-server says 500 to a picture; an SDK would ask again, and the gateway too."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with sdk(shared_house.url) as client:
        for content in ([picture], [{"type": "text"}]):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])  # type: ignore[typeddict-item]
            assert caught.value.code == "runtime_refused"
            job = httpx.get(f"{shared_house.url}/v1/jobs/{caught.value.response.headers['x-gateway-job']}").json()
            assert (job["state"], job["attempt"]) == ("failed", 1)


def test_a_malformed_request_is_a_bad_one(shared_house: House) -> None:
    with sdk(shared_house.url) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages="hi")  # type: ignore[call-overload]  # the point
        assert caught.value.code == "invalid_request"
        with pytest.raises(openai.BadRequestError) as too_long:
            client.chat.completions.create(model="tiny", messages=user("word " * 3000), max_tokens=5)
        assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("stream", [True, False])
def test_a_body_of_50_mb_is_too_large(shared_house: House, stream: bool) -> None:
    """The refusal arrives although the body was never read, and nobody sends it again."""
    attempts = Attempts()
    with sdk(shared_house.url, attempts=attempts) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="tiny", messages=user("x" * 50_000_000), stream=stream)
    assert caught.value.status_code == 413
    assert caught.value.code == "body_too_large"
    assert len(attempts) == 1


def test_a_full_lane_is_tried_again_when_it_said_so(shared_house: House) -> None:
    """The SDK honours Retry-After; what it raises in the end carries our code."""
    with sdk(shared_house.url, max_retries=0) as client:  # so that the gateway knows how fast the lane drains
        client.chat.completions.create(model="narrow", messages=user("hi"), max_tokens=2)
    with held(shared_house, "narrow", tokens=1000) as first, held_waiting(shared_house, "narrow"):
        attempts = Attempts()
        with (
            sdk(shared_house.url, attempts=attempts, max_retries=1) as client,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            client.chat.completions.create(model="narrow", messages=user("hi"), max_tokens=2)
        assert caught.value.status_code == 503
        assert caught.value.code == "lane_full"
        wait_s = int(caught.value.response.headers["retry-after"])
        assert 1 <= wait_s <= 30
        assert len(attempts) == 2
        assert attempts[1] - attempts[0] >= 1.0
        assert job(shared_house, first)["state"] == "streaming"
    until_idle(shared_house, "narrow")
    with sdk(shared_house.url, max_retries=0) as client:
        answer = client.chat.completions.create(model="narrow", messages=user("hi"), max_tokens=2)
    assert answer.choices[0].message.content == words(2)


@contextmanager
def held_waiting(up: House, model: str) -> Iterator[None]:
    """A stream that waits in the lane, its headers told and no answer begun."""
    with held(up, model, tokens=5) as job_id:
        assert job(up, job_id)["state"] == "queued"
        yield


def until_idle(up: House, model: str) -> None:
    """Waits until a model's slots are free again: closed streams settle first."""

    def idle() -> bool:
        models = httpx.get(f"{up.url}/v1/status").json()["models"]
        (found,) = (m for m in models if m["name"] == model)
        return found["running"] == found["waiting"] == found["slots_used"] == found["slots_settling"] == 0

    block_until(idle, what=f"{model} is idle")


# --- waiting and failing -----------------------------------------------------------------------------------------


def test_heartbeats_are_no_part_of_an_answer(shared_house: House) -> None:
    """Comments come before the first token; the SDK passes over them."""
    asked = {"model": "thoughtful", "messages": user("think " * 8), "max_tokens": 4, "stream": True}
    with httpx.Client(timeout=30) as http:
        lines = http.post(f"{shared_house.url}/v1/chat/completions", json=asked).text.splitlines()
    assert lines[0].startswith(": warmlane "), lines
    assert lines[-2] == "data: [DONE]"
    with sdk(shared_house.url, max_retries=0) as client:
        started = time.monotonic()
        asked["messages"] = user("ponder " * 8)  # a new prompt: the other one is cached
        chunks = list(client.chat.completions.create(**asked))
        assert time.monotonic() - started > 0.5
    assert text_of(chunks) == words(4)
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("fault", ["error_in_stream", "silent_end_after_tokens"])
async def test_an_answer_that_breaks_is_an_error_in_the_stream(shared_house: House, fault: str) -> None:
    """Also where the runtime itself ends as if nothing had happened: an end without a finish reason is none."""
    await shared_house.runtime("pretend").break_with(**{fault: 3}, times=1)
    async with async_sdk(shared_house.url) as client:
        heard = []
        async with await client.chat.completions.create(
            model="pretend", messages=user("hi"), max_tokens=20, stream=True
        ) as stream:
            with pytest.raises(openai.APIError) as caught:
                async for chunk in stream:
                    heard.append(chunk)
    assert caught.value.code == "runtime_failed"
    assert text_of(heard) == words(3)


async def test_a_broken_answer_nobody_saw_is_made_again(shared_house: House) -> None:
    """A client without a stream hears nothing of the first try."""
    await shared_house.runtime("pretend").break_with(error_in_stream=3, times=1)
    async with async_sdk(shared_house.url, max_retries=0) as client:
        raw = await client.chat.completions.with_raw_response.create(model="pretend", messages=user("hi"), max_tokens=6)
    assert raw.parse().choices[0].message.content == words(6)
    assert job(shared_house, raw.headers["x-gateway-job"])["attempt"] == 2


async def test_a_failure_after_whitespace_is_a_connection_error(
    shared_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a cut connection tells the SDK of a failure after a 200; it tries again, and then it says so."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(chat_module, "WHOLE_HOLD_S", 0.2)  # fifty seconds in earnest
    runtime = shared_house.runtime("pretend")
    await runtime.break_with(first_token_delay_ms=150, error_in_stream=0)
    attempts = Attempts()
    try:
        store = await Store.open(shared_house.redis_url, name="second-api")
        try:
            async with (
                live_api(store) as second,
                async_sdk(second.url, attempts=attempts, max_retries=1) as client,
            ):
                with pytest.raises(openai.APIConnectionError):
                    await client.chat.completions.create(model="pretend", messages=user("hi"), max_tokens=6)
        finally:
            await store.close()
    finally:
        await runtime.break_with(first_token_delay_ms=None, error_in_stream=None)
    assert len(attempts) == 2


async def test_a_hang_up_is_heard_by_the_runtime(shared_house: House) -> None:
    """Closing the SDK's stream ends the generation within a second."""
    runtime = shared_house.runtime("pretend")
    before = (await runtime.stats())["requests_aborted"]
    async with async_sdk(shared_house.url) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="pretend", messages=user("hi"), max_tokens=2000, stream=True
        )
        stream = raw.parse()
        await anext(aiter(stream))
        await stream.close()

    async def heard() -> bool:
        return bool((await runtime.stats())["requests_aborted"] > before)

    await eventually(heard, what="the runtime hears of the hang-up", timeout_s=1.0)
    job_id = raw.headers["x-gateway-job"]
    await until(lambda: job(shared_house, job_id)["state"] == "cancelled", what="the job is cancelled", timeout_s=1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_delete_is_heard_by_the_runtime(shared_house: House, stream: bool) -> None:
    """DELETE over HTTP ends the generation within a second, and whoever waits for it is told."""
    runtime = shared_house.runtime("pretend")
    before = (await runtime.stats())["requests_aborted"]
    async with httpx.AsyncClient(base_url=shared_house.url, timeout=20) as http:
        body = {"model": "pretend", "messages": user("hi"), "max_tokens": 2000, "stream": stream}
        known = set(await running_jobs(shared_house))
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))

        async def begun() -> str:
            new = set(await running_jobs(shared_house)) - known
            return new.pop() if new else ""

        job_id = await eventually(begun, what="the job streams")
        assert (await http.delete(f"/v1/jobs/{job_id}")).status_code == 200

        async def heard() -> bool:
            return bool((await runtime.stats())["requests_aborted"] > before)

        await eventually(heard, what="the runtime hears of the DELETE", timeout_s=1.0)
        told = await asking
        if stream:
            assert b'"code":"cancelled"' in told.content.replace(b'": "', b'":"')
            assert b"[DONE]" not in told.content
        else:
            assert (told.status_code, told.json()["error"]["code"]) == (499, "cancelled")


async def running_jobs(up: House) -> list[str]:
    """Ids of the jobs that stream now."""
    store = await Store.open(up.redis_url, name="test")
    try:
        live = [j.decode() for j in await store.command("ZRANGE", store.keys.due, 0, -1)]
        found = [j for j in live if await store.command("HGET", store.keys.job(j), "state") == b"streaming"]
        return found
    finally:
        await store.close()


def test_a_lost_worker_is_told_in_the_stream(shared_house: House) -> None:
    """SIGKILL in the middle of an answer; the next request is served by the worker that comes after it."""
    with sdk(shared_house.url, max_retries=0) as client:
        heard = []
        with pytest.raises(openai.APIError) as caught:
            for chunk in client.chat.completions.create(
                model="pretend", messages=user("hi"), max_tokens=2000, stream=True
            ):
                heard.append(chunk)
                if len(heard) == 10:
                    shared_house.kill_part("worker")
        assert caught.value.code == "worker_lost"
        assert words(2000).startswith(text_of(heard))
        assert len(text_of(heard)) > 10
    block_until(lambda: states(shared_house)["pretend"] == "warm", what="the model is warm again")
    with sdk(shared_house.url) as client:
        answer = client.chat.completions.create(model="pretend", messages=user("hi"), max_tokens=4)
    assert answer.choices[0].message.content == words(4)
