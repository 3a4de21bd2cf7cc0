"""What a client of the chat route hears, over real HTTP: its answer, the signs of a wait, a failure.

The worker does what each test says. On fakeredis and on a real server.
"""

import asyncio
import json

import openai
import pytest

from broker.lifecycle import State
from tests.support.live_api import POLICY, RawClient, Scene
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)

# --- answers -----------------------------------------------------------------------------------------------------


async def test_the_openai_client_streams(scene: Scene) -> None:
    """The main job: pieces in order, the model under the name of the policy, a proper end."""
    async with scene.client() as client:
        stream = await client.chat.completions.create(
            model="big", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello world"
    assert {c.model for c in chunks} == {"big"}
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (await scene.until_state("", State.DONE)).seen


async def test_the_openai_client_gets_one_object(scene: Scene) -> None:
    """A client without a stream gets the folded answer, with usage."""
    async with scene.client() as client:
        answer = await client.chat.completions.create(model="big", messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content == "Hello world"
    assert answer.usage is not None and answer.usage.completion_tokens == 2
    assert not (await scene.job()).seen


async def test_the_bytes_of_a_stream(scene: Scene) -> None:
    """Whole events, [DONE], and headers that say which job it was and who served it."""
    client = await RawClient.open(scene.api)
    await client.chat("hello", model="fast-edit")
    assert await client.head() == 200
    assert client.headers["content-type"].startswith("text/event-stream")
    assert client.headers["x-gateway-lane"] == "small"
    assert client.headers["x-gateway-served-by"] == "small@gpu1"
    assert client.headers["x-gateway-job"] == scene.worker.seen[-1].id
    assert int(client.headers["x-gateway-first-token-ms"]) >= 0
    body = await client.body()
    assert body.endswith(b"data: [DONE]\n\n")
    assert b"id:" not in body.replace(b'"id":', b"")
    client.close()


async def test_one_connection_serves_many_requests(scene: Scene) -> None:
    """Keep-alive works after a stream, an object and an error alike."""
    client = await RawClient.open(scene.api)
    for said, stream, status in (("hello", True, 200), ("hello", False, 200), ("refuse", True, 422)):
        await client.chat(said, stream=stream)
        assert await client.head() == status
        await client.body()
    client.close()


async def test_the_job_record_says_what_the_headers_asked(scene: Scene) -> None:
    """Lane, session and deadline come from headers; the body reaches the worker untouched."""
    client = await RawClient.open(scene.api)
    await client.chat("hello", x_gateway_lane="fast-edit", x_session_affinity="tab-7", x_slo_ttft_ms="1500")
    assert await client.head() == 200
    await client.body()
    client.close()
    job = await scene.job()
    assert (job.lane, job.asked, job.session, job.grace_ms) == ("small", "fast-edit", "tab-7", 0)


async def test_a_deadline_of_the_client_tightens_the_promotion(scene: Scene) -> None:
    """X-SLO-TTFT-Ms may bring the promotion forward, never put it off."""
    client = await RawClient.open(scene.api)
    await client.chat("hello", x_slo_ttft_ms="1500")
    assert await client.head() == 200
    await client.body()
    client.close()
    job = await scene.job()
    assert job.promote_at - job.submitted_at == 1500


@pytest.mark.parametrize(
    ("headers", "within_ms"),
    [
        ({"x_stainless_read_timeout": "2.5"}, 2000),
        ({"x_stainless_read_timeout": "2.5", "x_slo_ttft_ms": "1500"}, 1500),
        ({"x_stainless_read_timeout": "1", "x_slo_ttft_ms": "1500"}, 800),
        ({"x_stainless_read_timeout": "600"}, 60_000),
        ({"x_stainless_read_timeout": "None"}, 60_000),
        ({"x_stainless_read_timeout": "0"}, 60_000),
    ],
)
async def test_the_patience_of_an_sdk_tightens_it_too(scene: Scene, headers: dict[str, str], within_ms: int) -> None:
    """A fallback has a fifth of the read timeout left; the 600 s that nobody chose change nothing."""
    client = await RawClient.open(scene.api)
    await client.chat("hello", **headers)
    assert await client.head() == 200
    await client.body()
    client.close()
    job = await scene.job()
    assert job.promote_at - job.submitted_at == within_ms


async def test_an_answer_names_the_model_to_which_its_lane_was_led_meanwhile(scene: Scene) -> None:
    """A policy may lead a lane to another model while a job waits in it: headers, chunks and record name that one."""
    side = POLICY + "lanes:\n  side:\n    fallback: null\n    target: "
    await scene.worker.book.apply(side + "big")
    await scene.api.gateway.book.reload()
    await scene.beat(big="waking")
    client = await RawClient.open(scene.api)
    await client.chat("hello", model="side")
    assert (await scene.only_job()).model == "big"
    await scene.worker.book.apply(side + "small")
    assert await client.head() == 200
    assert client.headers["x-gateway-served-by"] == "small@gpu1"
    body = await client.body()
    assert (body.count(b'"model":"small"'), body.count(b'"model":"big"')) == (3, 0)
    assert (await scene.until_state("", State.DONE)).model == "small"


# --- waiting -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_long_wait_is_told_in_comments(scene: Scene) -> None:
    """After the hold the status goes out, and every client skips the comments until the answer comes."""
    await scene.beat(big="waking")
    async with scene.client() as client:
        asked = asyncio.create_task(
            client.chat.completions.create(model="big", messages=[{"role": "user", "content": "hello"}], stream=True)
        )
        stream = await asyncio.wait_for(asked, 10)  # the status is there before any token is
        assert (await scene.only_job()).state is State.QUEUED
        await scene.beat()
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Hello world"


@pytest.mark.usefixtures("quick_heartbeats")
async def test_heartbeats_say_how_it_stands(scene: Scene) -> None:
    """Lane, place and state while it waits; the host while it is worked on."""
    await scene.beat(big="waking")
    client = await RawClient.open(scene.api)
    await client.chat("wait")
    assert await client.head() == 200
    said = await client.until_said(b"\n\n")
    assert said.startswith(b": warmlane waiting in lane big behind 0, big is waking")
    await scene.beat()
    await client.until_said(b"big on gpu1 reads the prompt")
    scene.go.set()
    assert (await client.body()).endswith(b"data: [DONE]\n\n")
    client.close()


@pytest.mark.usefixtures("quick_heartbeats")
async def test_whitespace_before_an_object(scene: Scene) -> None:
    """A client without a stream is kept awake by blanks, which JSON allows."""
    async with scene.client() as client:
        asked = asyncio.create_task(
            client.chat.completions.create(model="big", messages=[{"role": "user", "content": "wait"}])
        )
        await until(lambda: scene.worker.seen, what="the claim")
        await asyncio.wait({asked}, timeout=0.7)
        assert not asked.done()
        scene.go.set()
        assert (await asyncio.wait_for(asked, 5)).choices[0].message.content == "Hello world"


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_failure_after_whitespace_cuts_the_connection(scene: Scene) -> None:
    """An error object under a 200 reads as an empty success: only a broken body makes the SDK notice."""
    async with scene.client() as client:
        asked = asyncio.create_task(
            client.chat.completions.create(model="big", messages=[{"role": "user", "content": "wait_and_break"}])
        )
        await until(lambda: scene.worker.seen, what="the claim")
        await asyncio.wait({asked}, timeout=0.7)
        scene.go.set()
        with pytest.raises(openai.APIConnectionError):
            await asyncio.wait_for(asked, 5)


async def test_an_answer_that_began_again_is_not_repeated_to_a_waiting_client(scene: Scene) -> None:
    """What a lost attempt had said is void for a client that has not been given any of it."""
    async with scene.client() as client:
        asked = asyncio.create_task(
            client.chat.completions.create(model="big", messages=[{"role": "user", "content": "restart"}])
        )
        await until(lambda: scene.worker.seen, what="the first claim")
        await scene.until_state(scene.worker.seen[0].id, State.STREAMING)
        scene.go.set()
        assert (await asyncio.wait_for(asked, 5)).choices[0].message.content == "Hello world"
    assert [job.attempt for job in scene.worker.seen] == [1, 2]


async def test_a_slow_client_gets_everything_and_holds_up_nobody(scene: Scene) -> None:
    """A client that reads late gets every byte; another one is served meanwhile."""
    slow = await RawClient.open(scene.api)
    await slow.chat("flood")
    assert await slow.head() == 200
    other = await RawClient.open(scene.api)
    await other.chat("hello")
    assert await other.head() == 200
    assert (await other.body()).endswith(b"data: [DONE]\n\n")
    await scene.until_state(slow.headers["x-gateway-job"], State.DONE, timeout_s=20)
    body = await slow.body()
    pieces = [json.loads(e[6:]) for e in body.decode().split("\n\n") if e.startswith("data: {")]
    numbers = [p["choices"][0]["delta"]["content"].split()[0] for p in pieces if p["choices"][0]["delta"]]
    assert numbers == [str(n) for n in range(400)]
    slow.close()
    other.close()


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_early_failures_keep_their_status(scene: Scene, stream: bool) -> None:
    """What fails inside the hold is a status that the SDK turns into its own error class."""
    async with scene.client() as client:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            await client.chat.completions.create(
                model="big", messages=[{"role": "user", "content": "refuse"}], stream=stream
            )
        assert refused.value.code == "runtime_refused" and "temperature" in refused.value.message
        with pytest.raises(openai.InternalServerError) as broke:
            await client.chat.completions.create(
                model="big", messages=[{"role": "user", "content": "break_early"}], stream=stream
            )
        assert (broke.value.status_code, broke.value.code) == (502, "runtime_failed")


async def test_a_late_failure_is_told_inside_the_stream(scene: Scene) -> None:
    """After the first token an error event ends the stream, without [DONE], and the SDK raises."""
    async with scene.client() as client:
        stream = await client.chat.completions.create(
            model="big", messages=[{"role": "user", "content": "break_late"}], stream=True
        )
        got = [(await anext(stream)).choices[0].delta.content]
        scene.go.set()
        with pytest.raises(openai.APIError) as caught:
            async for _ in stream:
                pass
    assert got == ["Hello"] and caught.value.code == "runtime_failed"
    raw = await RawClient.open(scene.api)
    await raw.chat("break_late")
    await raw.head()
    body = await raw.body()
    assert b"[DONE]" not in body and body.rstrip().endswith(b"}")
    raw.close()


async def test_an_expired_wait_is_a_503_even_without_a_scheduler(scene: Scene) -> None:
    """Nobody is stranded by a dead scheduler: the api looks after the overdue jobs of its own clients."""
    await scene.beat(hasty="waking")
    client = await RawClient.open(scene.api)
    await client.chat("hello", model="hasty", stream=False)
    assert await client.head() == 503
    told = json.loads(await client.body())["error"]
    assert told["code"] == "cold_start_deadline" and 1 <= int(client.headers["retry-after"]) <= 30
    client.close()
