"""The api over real HTTP, with a worker that does what each test says. On fakeredis and on a real server."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from api import exchange as exchange_module
from api import stream as stream_module
from api import visit as visit_module
from api.routes import chat as chat_module
from broker import errors, jobs, readers
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import JobRecord
from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace
from tests.support.live_api import LiveApi, RawClient, chat_body, live_api, until_true
from tests.support.redis_server import RedisServer, start_server
from tests.support.scripted_worker import ScriptedWorker, Turn, hello
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)

POLICY = """
headerHoldMs: 400
disconnectGraceMs: 700
models:
  big:
    backend: simulated
    model: weights-big
    maxConcurrent: 2
    maxQueue: 3
    coldStartBudgetMs: 60000
    fallback: small
    aliases: ["qwen/coder:32b"]
  small:
    backend: simulated
    model: weights-small
    maxConcurrent: 2
    maxQueue: 1
  hasty:
    backend: simulated
    model: weights-hasty
    maxWaitMs: 300
    contextTokens: 50
routing:
  - match: { lane: "fast-edit" }
    target: small
"""
SDK: Any = {"x_stainless_lang": "python", "x_stainless_retry_count": "0"}


@dataclass
class Scene:
    """What a test holds: the api, the worker, and switches for its scripts."""

    store: Store
    api: LiveApi
    worker: ScriptedWorker
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def job(self, job_id: str = "") -> JobRecord:
        return await jobs.read(self.store, job_id or self.worker.seen[-1].id)

    async def until_state(self, job_id: str, *states: State, timeout_s: float = 5) -> JobRecord:
        async def reached() -> JobRecord | None:
            job = await self.job(job_id)
            return job if job.state in states else None

        found: JobRecord = await until_true(reached, what=f"job {job_id} is {states}", timeout_s=timeout_s)
        return found

    async def beat(self, **states: str) -> None:
        """The worker tells its models' states, and the api looks."""
        await self.worker.beat(**states)
        await self.api.gateway.fleet.look()

    async def only_job(self) -> JobRecord:
        """The one job that Redis knows, claimed or not."""
        due = self.store.keys.due
        found = await until_true(lambda: self.store.command("ZRANGE", due, 0, -1), what="a job")
        assert len(found) == 1
        return await self.job(found[0].decode())

    def client(self, **more: Any) -> openai.AsyncOpenAI:
        options = {"base_url": f"{self.api.url}/v1", "api_key": "any", "max_retries": 0, "timeout": 15} | more
        return openai.AsyncOpenAI(**options)  # type: ignore[arg-type]


def scripts(scene: Scene) -> dict[str, Callable[[Turn], Any]]:
    async def wait(turn: Turn) -> None:
        await scene.go.wait()
        await hello(turn)

    async def pause(turn: Turn) -> None:
        await turn.say("Hello")
        await scene.go.wait()
        await turn.say(" world")
        await turn.finish()

    async def refuse(turn: Turn) -> None:
        await turn.fail(errors.RuntimeRefused("temperature must be below 2", status=422))

    async def break_early(turn: Turn) -> None:
        await turn.fail(errors.RuntimeFailed("the runtime closed the connection"))

    async def break_late(turn: Turn) -> None:
        await turn.say("Hello")
        await scene.go.wait()
        await turn.fail(errors.RuntimeFailed("the runtime closed the connection"))

    async def wait_and_break(turn: Turn) -> None:
        await scene.go.wait()
        await turn.fail(errors.RuntimeFailed("the runtime closed the connection"))

    async def restart(turn: Turn) -> None:
        if turn.record.attempt == 1:
            await turn.say("never to be seen")
            await scene.go.wait()
            return await turn.give_back()
        await hello(turn)

    async def flood(turn: Turn) -> None:
        for number in range(400):
            await turn.say(f"{number} " + "x" * 4_000)
        await turn.finish()

    async def deluge(turn: Turn) -> None:
        for number in range(200):
            await turn.say(f"{number} " + "x" * 100_000)
        await turn.finish()

    return {
        "hello": hello, "wait": wait, "pause": pause, "refuse": refuse, "break_early": break_early, "flood": flood,
        "deluge": deluge, "break_late": break_late, "wait_and_break": wait_and_break, "restart": restart,
    }  # fmt: skip


@pytest_asyncio.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "fake":
        opened = Store.fake(fake_redis(), namespace=new_namespace())
    else:
        url = request.getfixturevalue("redis_server").url
        opened = await Store.open(url, namespace=new_namespace(), name="test-api")
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def scene(store: Store) -> AsyncIterator[Scene]:
    """Everything warm, nothing asked for yet."""
    book = PolicyBook(store)
    await book.apply(POLICY)
    worker = ScriptedWorker(store, book)
    async with worker.running(), live_api(store) as running:
        scene = Scene(store, running, worker)
        worker.scripts = scripts(scene)
        yield scene


@pytest.fixture
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats and holds that a test can wait for."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.15)
    monkeypatch.setattr(chat_module, "WHOLE_HOLD_S", 0.3)


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
        (400, "context_length_exceeded"),
        (405, "method_not_allowed"),
        (404, "not_found"),
        (405, "method_not_allowed"),
    ]
    assert "did you mean big" in found[1].json()["error"]["message"]
    assert await scene.store.command("ZCARD", scene.store.keys.due) == 0
    assert not [k for k in await scene.store.command("KEYS", f"{scene.store.keys.namespace}:job:*")]


@pytest.mark.parametrize("says_its_size", [True, False])
async def test_a_body_of_50_mb_is_refused_readably(scene: Scene, says_its_size: bool) -> None:
    """The sender gets to read the answer, although it is still sending; nothing of the body is kept."""
    client = await RawClient.open(scene.api)
    size = 50 << 20
    length = f"content-length: {size}" if says_its_size else "transfer-encoding: chunked"
    client.writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\n{length}\r\n\r\n".encode())

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
    lines = "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 50000000\r\nexpect: 100-continue\r\n\r\n"
    client.writer.write(lines.encode())
    assert await client.head() == 413
    client.close()


async def test_without_a_policy_the_api_says_what_is_missing(store: Store) -> None:
    """An api that was started before any policy answers, and says what to do."""
    async with live_api(store) as running, httpx.AsyncClient(base_url=running.url) as client:
        refused = await client.post("/v1/chat/completions", content=chat_body("x"))
        ready, alive = await client.get("/readyz"), await client.get("/healthz")
        metrics = await client.get("/metrics")
    assert refused.status_code == 503 and "gateway policy apply" in refused.json()["error"]["message"]
    assert (ready.status_code, alive.status_code, metrics.status_code) == (503, 200, 200)


# --- hang-ups ----------------------------------------------------------------------------------------------------


async def test_a_hang_up_while_it_waits_frees_the_place(scene: Scene) -> None:
    """A queued job of a client without a retry is cancelled at once."""
    await scene.beat(big="waking")
    client = await RawClient.open(scene.api)
    await client.chat("hello")
    job = await scene.only_job()
    client.close()
    ended = await scene.until_state(job.id, State.CANCELLED, timeout_s=1)
    assert ended.error_message == "its client hung up"
    assert await scene.store.command("XLEN", scene.store.keys.lane("big")) == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("said", ["wait", "pause"])
async def test_a_hang_up_while_it_runs_ends_it(scene: Scene, said: str, stream: bool) -> None:
    """A claimed or streaming job is cancelled within a second, and its worker's next write is refused."""
    client = await RawClient.open(scene.api)
    await client.chat(said, stream=stream)
    await until(lambda: scene.worker.seen, what="the claim")
    if said == "pause":
        await scene.until_state("", State.STREAMING)
    client.close()
    await scene.until_state(scene.worker.seen[0].id, State.CANCELLED, timeout_s=1)
    scene.go.set()
    await until(lambda: scene.worker.refusals, what="a refused write")
    assert scene.worker.refusals == ["already_ended"]


async def test_a_client_that_may_retry_is_waited_for(scene: Scene) -> None:
    """With an SDK's headers the job outlives the hang-up by the grace, and not longer."""
    client = await RawClient.open(scene.api)
    await client.chat("wait", **SDK)
    await until(lambda: scene.worker.seen, what="the claim")
    client.close()
    job_id = scene.worker.seen[0].id

    async def left() -> bool:
        return not await scene.store.command("EXISTS", scene.store.keys.readers(job_id))

    async def settled() -> bool:
        try:
            await jobs.cancel(scene.store, job_id, if_abandoned=True)
        except errors.NotDue:
            return False
        return True

    await until_true(left, what="the reader is gone", timeout_s=2)
    job = await scene.job(job_id)
    assert job.live and 0 < job.abandon_at - await scene.store.now_ms() <= 700
    await until_true(settled, what="the end of the grace", timeout_s=3)
    assert (await scene.job(job_id)).state is State.CANCELLED


async def test_once_some_of_it_was_read_nobody_waits_for_a_retry(scene: Scene) -> None:
    """A retry would begin anew: what was half read is of no use to it."""
    client = await RawClient.open(scene.api)
    await client.chat("pause", **SDK)
    await client.head()
    await client.until_said(b"Hello")
    client.close()
    await scene.until_state("", State.CANCELLED, timeout_s=1)


async def test_a_job_that_is_to_be_kept_goes_on_without_its_client(scene: Scene) -> None:
    """X-Gateway-On-Disconnect: keep makes the answer available to whoever follows the job."""
    client = await RawClient.open(scene.api)
    await client.chat("pause", x_gateway_on_disconnect="keep")
    await client.head()
    job_id = client.headers["x-gateway-job"]
    await client.until_said(b"Hello")
    client.close()
    scene.go.set()
    assert (await scene.until_state(job_id, State.DONE)).abandon_at == 0


async def test_a_lease_is_renewed_by_one_task_for_all(scene: Scene) -> None:
    """Readers keep their lease while their clients wait, however long that is."""
    clients = [await RawClient.open(scene.api) for _ in range(2)]
    for client in clients:
        await client.chat("wait")
    await until(lambda: len(scene.worker.seen) == 2, what="both claims")
    before = [(await scene.job(job.id)).abandon_at for job in scene.worker.seen]
    await scene.api.gateway.readers.renew()
    after = [(await scene.job(job.id)).abandon_at for job in scene.worker.seen]
    assert all(b < a for b, a in zip(before, after, strict=True))
    for client in clients:
        client.close()
    for job in scene.worker.seen:
        await scene.until_state(job.id, State.CANCELLED)


# --- retries with a key ------------------------------------------------------------------------------------------


async def test_an_idempotency_key_leads_to_the_same_job(scene: Scene) -> None:
    """The second request replays the first one's answer; another body under the key is refused."""
    first, second, third = [await RawClient.open(scene.api) for _ in range(3)]
    await first.chat("pause", idempotency_key="k1")
    await first.head()
    await first.until_said(b"Hello")
    await second.chat("pause", idempotency_key="k1")
    assert await second.head() == 200
    assert second.headers["x-gateway-job"] == first.headers["x-gateway-job"]
    await second.until_said(b"Hello")
    await third.chat("hello", idempotency_key="k1")
    assert await third.head() == 422
    first.close()  # the other one still reads, so the job goes on
    scene.go.set()
    assert (await second.body()).endswith(b"data: [DONE]\n\n")
    assert len(scene.worker.seen) == 1
    for client in (second, third):
        client.close()


# --- jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("said", ["queued", "wait", "pause"])
async def test_delete_ends_a_job_in_every_state(scene: Scene, said: str, stream: bool) -> None:
    """The record says cancelled, the client is told: by a status that no SDK repeats, or in its stream."""
    if said == "queued":
        await scene.beat(big="waking")
    client = await RawClient.open(scene.api)
    await client.chat(said, stream=stream)
    job = await scene.only_job()
    if said != "queued":
        await scene.until_state(job.id, State.STREAMING if said == "pause" else State.CLAIMED)
    in_band = said == "pause" and stream
    if in_band:
        await client.head()
        await client.until_said(b"Hello")
    async with httpx.AsyncClient(base_url=scene.api.url) as other:
        deleted = await other.delete(f"/v1/jobs/{job.id}")
        again = await other.delete(f"/v1/jobs/{job.id}")
        shown = await other.get(f"/v1/jobs/{job.id}")
    assert [r.json()["state"] for r in (deleted, again, shown)] == ["cancelled"] * 3
    if in_band:
        assert b'"code":"cancelled"' in await client.body()
    else:
        assert await client.head() == 499
        assert json.loads(await client.body())["error"]["code"] == "cancelled"
    client.close()


async def test_unknown_jobs_are_a_404(scene: Scene) -> None:
    """Ids that never were, or that are no ids at all."""
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        for job_id in ("01JZZZZZZZZZZZZZZZZZZZZZZZ", "a:request", "%2e%2e", "x" * 200):
            for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events"):
                answer = await client.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found"), path


def events(body: str) -> list[tuple[str, str, Any]]:
    """Reads server-sent events as (id, event, data), comments left out."""
    found = []
    for block in body.split("\n\n"):
        said = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if said:
            found.append((said.get("id", ""), said["event"], json.loads(said["data"])))
    return found


async def test_a_job_can_be_followed_and_resumed(scene: Scene) -> None:
    """Frames with their ids, the end, and after a broken connection exactly the rest."""
    asking = await RawClient.open(scene.api)
    await asking.chat("pause", x_gateway_on_disconnect="keep")
    await asking.head()
    path = f"/v1/jobs/{asking.headers['x-gateway-job']}/events"
    first = await RawClient.open(scene.api)
    await first.send("GET", path)
    assert await first.head() == 200
    early = events((await first.until_said(b"Hello")).decode())
    first.close()
    asking.close()
    scene.go.set()
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        whole = events((await client.get(path)).text)
        rest = events((await client.get(path, headers={"last-event-id": early[-1][0]})).text)
        over = await client.get(path, headers={"last-event-id": whole[-1][0]})
        bad = await client.get(path, headers={"last-event-id": "seven"})
    assert early + rest == whole
    assert [frame_id for frame_id, _, _ in whole] == ["1-1", "1-2", "1-3", "1-4"]
    assert [name for _, name, _ in whole] == ["frame", "frame", "frame", "end"]
    assert whole[-1][2]["kind"] == "done"
    assert (over.status_code, bad.status_code) == (204, 400)


async def test_a_follower_hears_that_the_answer_began_again(scene: Scene) -> None:
    """It may be told, because it does not make the answer seen."""
    asking = await RawClient.open(scene.api)
    await asking.chat("restart", stream=False)
    job = await scene.only_job()
    await scene.until_state(job.id, State.STREAMING)
    following = await RawClient.open(scene.api)
    await following.send("GET", f"/v1/jobs/{job.id}/events")
    await following.head()
    got = await following.until_said(b"never to be seen")
    scene.go.set()
    got += await following.body()
    names = [name for _, name, _ in events(got.decode())]
    assert names == ["frame", "restarted", "frame", "frame", "frame", "end"]
    assert not (await scene.job(job.id)).seen
    assert await asking.head() == 200
    for client in (asking, following):
        client.close()


# --- keys --------------------------------------------------------------------------------------------------------


async def test_keys_open_the_gateway_and_keep_jobs_apart(store: Store) -> None:
    """No key or a wrong one is a 401; a caller sees its own jobs only; health needs no key."""
    book = PolicyBook(store)
    await book.apply(POLICY)
    async with ScriptedWorker(store, book).running(), live_api(store, keys="ann:secret-a,bob:secret-b") as running:
        ann, bob = {"authorization": "Bearer secret-a"}, {"x-api-key": "secret-b"}
        async with httpx.AsyncClient(base_url=running.url) as client:
            for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "secret-a"}):
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
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0) as sdk:
            with pytest.raises(openai.AuthenticationError):
                await sdk.models.list()


# --- what else it tells ------------------------------------------------------------------------------------------


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
    assert found["gateway_completion_tokens_total", (("caller", "anonymous"), ("model", "big"))] == 2
    assert found["gateway_time_to_first_token_seconds_count", (("lane", "big"), ("model", "big"))] == 1
    assert found["gateway_model_state", (("model", "big"), ("state", "warm"))] == 1
    assert found["gateway_host_up", (("host", "gpu1"),)] == 1
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
    assert big["memory_bytes"] == 3 << 30
    lane = next(x for x in told["lanes"] if x["name"] == "big")
    assert 0 <= lane["oldest_waiting_ms"] < 5000
    assert told["policy"] == ["big fallback -> small after 60000ms cold-start budget"]
    assert told["hosts"][0]["memory_headroom"] == 10 << 30
    scene.go.set()
    for client in clients:
        await client.head()
        client.close()


# --- Redis goes away ---------------------------------------------------------------------------------------------


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that the test may kill."""
    server = start_server()
    yield server
    server.close()


@pytest.mark.real
@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_redis_that_comes_back_is_waited_for(own_server: RedisServer) -> None:
    """Who streams hears heartbeats and then the rest, once and in order; who comes meanwhile waits at the door."""
    store = await Store.open(own_server.url, namespace=new_namespace(), name="test-api")
    book = PolicyBook(store)
    await book.apply(POLICY)
    worker = ScriptedWorker(store, book)
    async with worker.running(), live_api(store) as running:
        scene = Scene(store, running, worker)
        worker.scripts = scripts(scene)
        reading, coming = [await RawClient.open(running) for _ in range(2)]
        await reading.chat("pause")
        await reading.head()
        got = await reading.until_said(b"Hello")
        own_server.kill()
        got += await reading.until_said(b"Redis does not answer")
        async with httpx.AsyncClient(base_url=running.url) as client:
            alive, ready = await client.get("/healthz"), await client.get("/readyz")
            page = (await client.get("/metrics")).text
        assert (alive.status_code, alive.json()["redis"], ready.status_code) == (200, "away", 503)
        assert "gateway_redis_up 0.0" in page
        await coming.chat("hello", model="small")
        own_server.start()
        await worker.beat()
        scene.go.set()
        got += await reading.body()
        assert got.endswith(b"data: [DONE]\n\n")
        assert [got.count(b'"content":"Hello"'), got.count(b'"content":" world"')] == [1, 1]
        assert await coming.head() == 200
        await coming.body()
    await store.close()


@pytest.mark.real
async def test_a_job_that_redis_lost_is_handed_in_again(own_server: RedisServer) -> None:
    """A killed Redis may lose what it had not yet written; whoever still waits gets an answer all the same, once."""
    store = await Store.open(own_server.url, namespace=new_namespace(), name="test-api")
    book = PolicyBook(store)
    await book.apply(POLICY)
    worker = ScriptedWorker(store, book)
    async with worker.running(), live_api(store) as running:
        scene = Scene(store, running, worker)
        worker.scripts = scripts(scene)
        waiting = await RawClient.open(running)
        await waiting.chat("wait", model="small")
        lost = await scene.only_job()
        own_server.kill()
        shutil.rmtree(own_server.directory / "appendonlydir")
        own_server.start()
        await until_true(partial(_applied, book), what="the policy is there again")
        await worker.beat()
        found = await until_true(partial(_another, scene, lost.id), what="the job is handed in again", timeout_s=15)
        assert found.id != lost.id
        scene.go.set()
        assert await waiting.head() == 200
        got = await waiting.body()
        assert got.count(b'"content":"Hello"') == 1
        assert got.endswith(b"data: [DONE]\n\n")
        with pytest.raises(errors.NoSuchJob):
            await scene.job(lost.id)
    await store.close()


async def _applied(book: PolicyBook) -> bool:
    try:
        return await book.apply(POLICY) > 0
    except errors.BrokerUnavailable:
        return False


async def _another(scene: Scene, lost: str) -> JobRecord | None:
    for job_id in await scene.store.command("ZRANGE", scene.store.keys.due, 0, -1):
        if job_id.decode() != lost:
            return await scene.job(job_id.decode())
    return None


@pytest.mark.real
async def test_a_redis_that_stays_away_is_a_503(own_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever: a new request gets a status, a stream an error inside it, never a clean-looking end."""
    monkeypatch.setattr(visit_module, "DOOR_OUTAGE_S", 0.3)
    monkeypatch.setattr(visit_module, "OUTAGE_LIMIT_S", 0.5)
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.1)
    store = await Store.open(own_server.url, namespace=new_namespace(), name="test-api")
    book = PolicyBook(store)
    await book.apply(POLICY)
    worker = ScriptedWorker(store, book)
    async with worker.running(), live_api(store) as running:
        scene = Scene(store, running, worker)
        worker.scripts = scripts(scene)
        reading, coming = [await RawClient.open(running) for _ in range(2)]
        await reading.chat("pause")
        await reading.head()
        await reading.until_said(b"Hello")
        own_server.kill()
        rest = await reading.body()
        assert b'"code":"broker_unavailable"' in rest and b"[DONE]" not in rest
        await coming.chat("hello")
        assert await coming.head() == 503
        assert json.loads(await coming.body())["error"]["code"] == "broker_unavailable"
    await store.close()


# --- the process -------------------------------------------------------------------------------------------------


async def test_a_stopping_api_tells_its_clients_and_cancels_nothing(store: Store) -> None:
    """Who has part of an answer hears so in the stream, who waits gets a 503, and a kept job goes on."""
    book = PolicyBook(store)
    await book.apply(POLICY)
    worker = ScriptedWorker(store, book)
    async with worker.running():
        async with live_api(store) as running:
            scene = Scene(store, running, worker)
            worker.scripts = scripts(scene)
            reading, waiting = [await RawClient.open(running) for _ in range(2)]
            await reading.chat("pause", x_gateway_on_disconnect="keep")
            await reading.head()
            await reading.until_said(b"Hello")
            await waiting.chat("wait", stream=False, **SDK)
            await until(lambda: len(worker.seen) == 2, what="both claims")
            running.server.should_exit = True
            rest = await reading.body()
            assert b'"code":"broker_unavailable"' in rest and b"[DONE]" not in rest
            assert await waiting.head() == 503
        kept, left = [await jobs.read(store, job.id) for job in worker.seen]
        assert kept.live and left.live and left.abandon_at > 0
        scene.go.set()
        assert (await scene.until_state(kept.id, State.DONE)).stream
        reading.close()
        waiting.close()


async def test_a_stalled_client_is_cut_off(scene: Scene) -> None:
    """A client that takes nothing any more does not hold its job for ever."""
    client = await RawClient.open(scene.api)
    client.reader._limit = 1  # type: ignore[attr-defined]  # the loop stops reading almost at once
    await client.chat("deluge")
    await until(
        lambda: any(e.sending_since for e in scene.api.gateway.exchanges), what="a send that waits", timeout_s=20
    )
    for exchange in list(scene.api.gateway.exchanges):
        exchange.interrupt(exchange_module.Stalled)
    await until(lambda: not scene.api.gateway.exchanges, what="the end of the exchange")
    assert (await scene.until_state("", State.CANCELLED, State.DONE)).state in (State.CANCELLED, State.DONE)
    client.close()


async def test_settling_looks_only_at_what_is_overdue(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The api is not a second scheduler: it looks at its own jobs, a while after their instant."""
    looked: list[str] = []

    async def look(job_id: str) -> None:
        looked.append(job_id)

    monkeypatch.setattr(scene.api.gateway.readers, "_look", look)
    client = await RawClient.open(scene.api)
    await client.chat("wait")
    job = await scene.only_job()
    await scene.api.gateway.readers.settle()
    assert looked == []
    now = await scene.store.now_ms()
    await scene.store.command("ZADD", scene.store.keys.due, now - readers.OVERDUE_MS - 5, job.id)
    await scene.api.gateway.readers.settle()
    assert looked == [job.id]
    client.close()
    await scene.until_state(job.id, State.CANCELLED)
