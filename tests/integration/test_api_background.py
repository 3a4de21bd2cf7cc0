"""Responses that are made in the background, with the stock OpenAI client: kept, followed, cancelled, deleted."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from api import background as background_module
from broker import jobs, kept, lanes
from broker.dialects.responses_background import ATTEMPT
from broker.lifecycle import State
from broker.records import JobRecord
from tests.support.clients import async_sdk, heard_out
from tests.support.live_api import LiveApi, RawClient, live_api
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, words, worker_world

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

SLOW = {"decodeTps": 40}
ASK: dict[str, Any] = {"model": "coder", "input": "Hi", "background": True, "max_output_tokens": 30}


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


@asynccontextmanager
async def api_of(world: World, **more: Any) -> AsyncIterator[LiveApi]:
    async with live_api(await world._open("api"), **more) as api:
        yield api


@asynccontextmanager
async def running(
    world: World, *, options: dict[str, Any] | None = None, **more: Any
) -> AsyncIterator[tuple[LiveApi, openai.AsyncOpenAI]]:
    """A warm model `coder`, and a client of the api before it."""
    await world.apply(
        {"coder": simulated(maxConcurrent=4, maxQueue=20, options=options or {})}, headerHoldMs=200, **more
    )
    await world.warm_host()
    async with api_of(world) as api, async_sdk(api.url, max_retries=0) as client:
        yield api, client


def job_of(response: Any) -> str:
    return str(response if isinstance(response, str) else response.id).removeprefix("resp_")


async def ended(client: openai.AsyncOpenAI, response_id: str) -> Any:
    """Polls as OpenAI's guide says."""

    async def check() -> Any:
        found = await client.responses.retrieve(response_id)
        return None if found.status in ("queued", "in_progress") else found

    return await eventually(check, what=f"the end of {response_id}")


async def until_state(world: World, job_id: str, *states: State) -> JobRecord:
    async def check() -> JobRecord | None:
        job = await jobs.read(world.store, job_id)
        return job if job.state in states else None

    return await eventually(check, what=f"{job_id} is {states}")


async def followed(client: openai.AsyncOpenAI, response_id: str, after: int | None = None) -> list[Any]:
    more: Any = {} if after is None else {"starting_after": after}
    return await heard_out(await client.responses.retrieve(response_id, stream=True, **more))


def numbers(events: list[Any]) -> list[int]:
    return [event.sequence_number for event in events]


# --- created and looked at ---------------------------------------------------------------------------------------


async def test_it_is_queued_runs_and_is_completed(world: World) -> None:
    async with running(world, options=SLOW) as (_, client):
        made = await client.responses.create(**ASK, instructions="Be kind.", metadata={"build": "7"})
        assert made.status in ("queued", "in_progress")
        assert (made.background, made.output, made.error) == (True, [], None)
        await until_state(world, job_of(made), State.STREAMING)
        now = await client.responses.retrieve(made.id)
        assert (now.id, now.created_at, now.status, now.output) == (made.id, made.created_at, "in_progress", [])
        assert (now.model, now.instructions, now.metadata) == ("coder", "Be kind.", {"build": "7"})
        whole = await ended(client, made.id)
    assert (whole.id, whole.status, whole.background, whole.store) == (made.id, "incomplete", True, True)
    assert whole.output_text == words(30) and whole.usage.output_tokens == 30
    assert whole.incomplete_details.reason == "max_output_tokens"
    job = await jobs.read(world.store, job_of(made))
    assert (job.mode, job.grace_ms, job.keep_ms, job.priority, job.seen) == (
        "async",
        -1,
        86_400_000,
        "interactive",
        False,
    )


async def test_what_cannot_be_let_in_is_refused_with_a_real_status(world: World) -> None:
    async with running(world) as (_, client):
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(**{**ASK, "model": "nobody"}, stream=True)
        with pytest.raises(openai.BadRequestError, match="background needs store"):
            await client.responses.create(**ASK, store=False)


async def test_who_hangs_up_right_after_asking_finds_it_made(world: World) -> None:
    """At OpenAI such a response stayed queued for ever. Here the job is there before the first byte."""
    async with running(world, options=SLOW) as (api, client):
        for stream in (False, True):
            for waits in (False, True):
                raw = await RawClient.open(api)
                await raw.send("POST", "/v1/responses", json.dumps({**ASK, "stream": stream}).encode())
                if waits:
                    await raw.head()
                    assert await world.store.command("EXISTS", world.store.keys.job(raw.headers["x-gateway-job"]))
                else:

                    async def is_there() -> bool:
                        return bool(await world.store.command("ZCARD", world.store.keys.due))

                    await eventually(is_there, what="the job")
                    [job_id] = [
                        one.decode() for one in await world.store.command("ZRANGE", world.store.keys.due, 0, -1)
                    ]
                    raw.headers["x-gateway-job"] = job_id
                raw.close()
                found = await ended(client, f"resp_{raw.headers['x-gateway-job']}")
                assert (found.status, found.output_text) == ("incomplete", words(30))


async def test_it_outlives_the_api_that_took_it(world: World) -> None:
    async with running(world, options=SLOW) as (_, client):
        made = await client.responses.create(**ASK)
    async with api_of(world) as api, async_sdk(api.url, max_retries=0) as client:
        assert (await ended(client, made.id)).output_text == words(30)
        assert numbers(await followed(client, made.id, 5))[0] == 6


async def test_it_is_kept_as_long_as_a_job_is(world: World) -> None:
    async with running(world, keepAsyncMs=700) as (_, client):
        made = await client.responses.create(**ASK)
        assert (await ended(client, made.id)).output_text == words(30)

        async def gone() -> bool:
            try:
                await client.responses.retrieve(made.id)
            except openai.NotFoundError as unknown:
                return unknown.code == "response_not_found"
            return False

        await eventually(gone, what="the end of the keep time", timeout_s=4)
        with pytest.raises(openai.NotFoundError):
            await followed(client, made.id, 3)
        with pytest.raises(openai.NotFoundError):
            await client.responses.cancel(made.id)


async def test_a_failure_is_told_alike_to_who_polls_and_who_follows(world: World) -> None:
    async with running(world, maxLosses=0) as (_, client):
        await world.runtime("coder").break_with(silent_end_after_tokens=3)
        events = await heard_out(await client.responses.create(**ASK, stream=True))
        found = await ended(client, events[0].response.id)
        again = await followed(client, found.id, events[-2].sequence_number)
    assert (found.status, found.output) == ("failed", [])
    assert found.error.code == "server_error" and found.error.reason == "runtime_failed"
    assert events[-1].type == "response.failed" and events[-1].response.error == found.error
    assert again == events[-1:]


# --- followed ----------------------------------------------------------------------------------------------------


async def test_the_events_are_those_of_any_other_response(world: World) -> None:
    async with running(world) as (_, client):
        events = await heard_out(await client.responses.create(**ASK, stream=True))
        whole = await client.responses.retrieve(events[0].response.id)
    assert numbers(events) == list(range(len(events)))
    assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert events[-1].type == "response.incomplete" and events[-1].response == whole
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == words(30)


async def test_after_its_end_every_number_leads_to_exactly_the_rest(world: World) -> None:
    async with running(world) as (_, client):
        made = await client.responses.create(**{**ASK, "max_output_tokens": 12})
        await ended(client, made.id)
        whole = await followed(client, made.id)
        for number in range(len(whole)):
            assert await followed(client, made.id, number) == whole[number + 1 :]
        assert await followed(client, made.id, 500) == []


async def test_while_it_is_made_every_number_leads_to_exactly_the_rest(world: World) -> None:
    """Clients come and go at every event of it, each with the last number that it has seen."""
    async with running(world, options=SLOW) as (_, client):
        made = await client.responses.create(**ASK, stream=True)
        heard, followers = [], []
        async with made:
            async for event in made:
                heard.append(event)
                followers.append(asyncio.create_task(followed(client, heard[0].response.id, event.sequence_number)))
                if len(followers) > 12:  # a job has so many readers and no more
                    await followers[-12]
        rests = await asyncio.gather(*followers)
    assert numbers(heard) == list(range(len(heard)))
    assert rests == [heard[number + 1 :] for number in range(len(heard))]


async def test_one_client_that_is_cut_off_again_and_again_misses_nothing(world: World) -> None:
    async with running(world, options=SLOW) as (_, client):
        stream = await client.responses.create(**ASK, stream=True)
        heard: list[Any] = []
        while not (heard and heard[-1].type == "response.incomplete"):
            async with stream:
                async for event in stream:
                    heard.append(event)
                    if len(heard) % 3 == 0:
                        break
            stream = await client.responses.retrieve(
                heard[0].response.id, stream=True, starting_after=heard[-1].sequence_number
            )
        await stream.close()
    assert numbers(heard) == list(range(len(heard)))


async def test_a_wait_is_told_in_comments_that_change_no_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_module, "HEARTBEAT_S", 0.1)
    sleepy = simulated(keepWarm=False, options={"coldStartMs": 1200})
    async with running(world) as (api, client):
        await world.apply({"coder": simulated(), "sleepy": sleepy}, headerHoldMs=200)
        await eventually(lambda: _knows(api, "sleepy"), what="the api knows the new model")
        raw = await RawClient.open(api)
        await raw.send("POST", "/v1/responses", json.dumps({**ASK, "model": "sleepy", "stream": True}).encode())
        assert await raw.head() == 200
        body = await raw.until_said(b'sequence_number":1,')
        response_id = f"resp_{raw.headers['x-gateway-job']}"
        assert (await client.responses.retrieve(response_id)).status == "queued"
        late = asyncio.create_task(followed(client, response_id, 1))
        body += await raw.body()
        first = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ")]
        assert body.count(b": warmlane ") > 3 and b"\n\n: warmlane" in body
        assert [event["sequence_number"] for event in first] == list(range(len(first)))
        assert [event.to_dict() for event in await late] == first[2:]


async def _knows(api: LiveApi, model: str) -> bool:
    await api.gateway.fleet.look()
    return api.gateway.book.active.model(model) is not None and api.gateway.fleet.picture.on_host.get(model) is not None


async def test_the_clients_own_collector_goes_on_from_a_number(world: World) -> None:
    async with running(world) as (_, client):
        made = await client.responses.create(**ASK)
        await ended(client, made.id)
        async with client.responses.stream(response_id=made.id, starting_after=4) as stream:
            assert numbers([event async for event in stream])[0] == 5
        async with client.responses.stream(response_id=made.id) as stream:
            async for _ in stream:
                pass
            with pytest.raises(RuntimeError):  # the SDK wants `response.completed`; this one is incomplete
                await stream.get_final_response()


async def test_an_api_that_stops_says_so_and_the_rest_is_told_by_another(world: World) -> None:
    """The stream ends and the response does not: that is an `error`, and costs its client no event."""
    async with running(world, options=SLOW) as (_, client):
        stream = await client.responses.create(**ASK, stream=True)
        heard: list[Any] = []
        async with api_of(world) as other, async_sdk(other.url, max_retries=0) as second:
            first = await anext(stream)
            heard.append(first)
            rest = await second.responses.retrieve(first.response.id, stream=True, starting_after=0)
            heard.append(await anext(rest))
            other.gateway._stop()
            with pytest.raises(openai.APIError, match="being restarted"):
                async for event in rest:
                    heard.append(event)
        heard += await followed(client, first.response.id, heard[-1].sequence_number)
        await stream.close()
    assert numbers(heard) == list(range(len(heard))) and heard[-1].type == "response.incomplete"


# --- lost and made anew ------------------------------------------------------------------------------------------


async def test_who_polls_does_not_notice_that_it_was_lost(world: World) -> None:
    async with running(world) as (_, client):
        await world.runtime("coder").break_with(stall_after_tokens=5)
        made = await client.responses.create(**ASK)
        await until_state(world, job_of(made), State.STREAMING)
        world.runtime("coder").kill()
        found = await ended(client, made.id)
    assert (found.status, found.output_text) == ("incomplete", words(30))
    assert (await jobs.read(world.store, job_of(made))).attempt > 1


async def test_who_followed_an_answer_that_was_lost_is_told_so_and_begins_anew(world: World) -> None:
    """No reader endangers the job. What was told is void, and no number of it leads into the new answer."""
    async with running(world) as (_, client):
        await world.runtime("coder").break_with(stall_after_tokens=5)
        stream = await client.responses.create(**ASK, stream=True)
        heard: list[Any] = []
        with pytest.raises(openai.APIError, match="made anew") as void:
            async for event in stream:
                heard.append(event)
                if sum(event.type == "response.output_text.delta" for event in heard) == 5:
                    world.runtime("coder").kill()
        assert void.value.code == "begun_again"
        response_id = heard[0].response.id
        for number in numbers(heard)[2:]:
            with pytest.raises(openai.APIStatusError) as refused:
                await followed(client, response_id, number)
            assert (refused.value.status_code, refused.value.code) == (410, "begun_again")
        anew = await followed(client, response_id, 1)
        assert (await ended(client, response_id)).output_text == words(30)
        attempt = (await jobs.read(world.store, job_of(response_id))).attempt
    assert attempt > 1 and numbers(anew) == [(attempt - 1) * ATTEMPT + 2 + n for n in range(len(anew))]
    assert "".join(event.delta for event in anew if event.type == "response.output_text.delta") == words(30)


async def test_a_follower_that_comes_between_two_attempts_is_told_too(world: World) -> None:
    """It has a number of the first one; the second has begun by the time that the log is read."""
    async with running(world) as (api, client):
        await world.runtime("coder").break_with(stall_after_tokens=5)
        made = await client.responses.create(**ASK)
        job_id = job_of(made)
        await until_state(world, job_id, State.STREAMING)
        followed_job = await jobs.read(world.store, job_id)
        world.runtime("coder").kill()
        await ended(client, made.id)
        body = await kept.request_of(world.store, job_id)
        late = background_module.Followed(api.gateway, followed_job, body, after=4, follower="anonymous")
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await late({"type": "http", "method": "GET", "path": f"/v1/responses/{made.id}", "headers": []}, _never, send)
    said = b"".join(message.get("body", b"") for message in sent)
    assert b'"code":"begun_again"' in said and said.count(b"data: ") == 1


async def _never() -> Any:
    await asyncio.Event().wait()


async def test_a_worker_that_is_killed_loses_no_response(world: World) -> None:
    await world.apply({"coder": simulated(options=SLOW)}, headerHoldMs=200)
    worker = world.process("workers.host")
    await world.until_model("coder", "warm")
    await world.scheduler()
    async with api_of(world) as api, async_sdk(api.url, max_retries=0) as client:
        made = await client.responses.create(**ASK)
        await until_state(world, job_of(made), State.STREAMING)
        worker.kill()
        world.process("workers.host")
        found = await ended(client, made.id)
    assert (found.status, found.output_text) == ("incomplete", words(30))
    job = await jobs.read(world.store, job_of(made))
    assert job.attempt == 2 and job.losses == 1


# --- cancelled and deleted ---------------------------------------------------------------------------------------


async def test_it_is_cancelled_once_and_for_all(world: World) -> None:
    async with running(world, options=SLOW) as (_, client):
        stream = await client.responses.create(**ASK, stream=True)
        first = await anext(stream)
        await until_state(world, job_of(first.response), State.STREAMING)
        once = await client.responses.cancel(first.response.id)
        twice = await client.responses.cancel(first.response.id)
        assert (once.status, once.error, once.output) == ("cancelled", None, []) and twice == once
        last = (await heard_out(stream))[-1]
        assert (last.type, last.response.status) == ("response.failed", "cancelled")
        assert (await client.responses.retrieve(first.response.id)) == once
        assert (await followed(client, first.response.id))[-1] == last

        done = await client.responses.create(**ASK)
        whole = await ended(client, done.id)
        assert await client.responses.cancel(done.id) == whole


async def test_while_it_waits_it_is_cancelled_too(world: World) -> None:
    async with running(world, options={"coldStartMs": 1_000}) as (_, client):
        world.runtime("coder").kill()
        await world.until_model("coder", "cold", "waking")
        made = await client.responses.create(**ASK)
        assert made.status == "queued"
        assert (await client.responses.cancel(made.id)).status == "cancelled"
        assert numbers(await followed(client, made.id)) == [0, 1, 2]
        assert await world.waiting("coder") == 0


async def test_it_is_deleted_with_all_that_is_kept_of_it(world: World) -> None:
    async with running(world, options=SLOW) as (_, client):
        for key, runs in (("k1", True), ("k2", False)):
            made = await client.responses.create(**ASK, extra_headers={"Idempotency-Key": key})
            again = await client.responses.create(**ASK, extra_headers={"Idempotency-Key": key})
            assert again.id == made.id
            await (until_state(world, job_of(made), State.STREAMING) if runs else ended(client, made.id))
            follower = asyncio.create_task(followed(client, made.id))
            await client.responses.delete(made.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(made.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.delete(made.id)
            await asyncio.wait([follower])
            left = [key async for key in world.store.scan(f"*{job_of(made)}*")]
            assert left == []
            fresh = await client.responses.create(**ASK, extra_headers={"Idempotency-Key": key})
            assert fresh.id != made.id
            await client.responses.delete(fresh.id)


# --- whose it is -------------------------------------------------------------------------------------------------


async def test_another_callers_response_is_as_unknown_as_one_that_never_was(world: World) -> None:
    await world.apply({"coder": simulated()}, headerHoldMs=200)
    await world.warm_host()
    async with api_of(world, keys="root:secret") as api:
        await api.name("ann", "bob")
        ann, bob = api.bearer("ann"), api.bearer("bob")
        async with httpx.AsyncClient(base_url=api.url, timeout=15) as http:
            made = (await http.post("/v1/responses", json=ASK, headers=ann)).json()["id"]
            kept_not = (await http.post("/v1/responses", json={**ASK, "background": False}, headers=ann)).json()["id"]
            chat = {"model": "coder", "messages": [{"role": "user", "content": "Hi"}]}
            chatted = (await http.post("/v1/chat/completions", json=chat, headers=ann)).headers["x-gateway-job"]
            ways = (("GET", ""), ("GET", "?stream=true&starting_after=1"), ("POST", "/cancel"), ("DELETE", ""))
            for method, end in ways:
                told = []
                for who, response_id in (
                    (bob, made), (bob, "resp_01KB5ZK4W80000000000000000"), (bob, kept_not), (ann, made[5:]),
                    (ann, f"resp_{chatted}"), (ann, "resp_../x"),
                ):  # fmt: skip
                    answer = await http.request(method, f"/v1/responses/{response_id}{end}", headers=who)
                    assert answer.status_code == 404, answer.text
                    if "/x" not in response_id:
                        error = answer.json()["error"]
                        told.append((error["code"], error["message"].replace(response_id, "")))
                assert len(set(told)) == 1 and told[0][0] == "response_not_found"
                answer = await http.request(method, f"/v1/responses/{kept_not}{end}", headers=ann)
                assert answer.status_code == 404 and "not made in the background" in answer.text
            assert (await http.get(f"/v1/responses/{made}", headers=ann)).status_code == 200


async def test_a_wrong_number_is_refused(world: World) -> None:
    async with running(world) as (api, client), httpx.AsyncClient(base_url=api.url) as http:
        made = await client.responses.create(**ASK)
        for wrong in ("stream=true&starting_after=-1", "stream=true&starting_after=x", "starting_after=1"):
            answer = await http.get(f"/v1/responses/{made.id}?{wrong}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "starting_after")


# --- retries -----------------------------------------------------------------------------------------------------


async def test_a_retry_comes_back_to_what_nobody_was_told_of_and_to_nothing_else(world: World) -> None:
    """Five alike stay five, also where one of them is sent again."""
    retry = {"x-stainless-retry-count": "1"}
    async with running(world, options=SLOW) as (api, client):
        made = [await client.responses.create(**ASK) for _ in range(4)]
        fifth = await client.responses.create(**ASK, extra_headers=retry)
        assert len({*(one.id for one in made), fifth.id}) == 5
        streamed = await client.responses.create(**ASK, stream=True)
        first = await anext(streamed)
        await streamed.close()
        again = await client.responses.create(**ASK, extra_headers=retry)
        assert again.id not in (first.response.id, fifth.id)

        lost = JobRecord(
            id="01KB5ZK4W80000000000000001", asked="coder", caller="anonymous", endpoint="/v1/responses", mode="async",
            session="s", keep_ms=60_000,
        )  # fmt: skip
        body = json.dumps({**ASK, "prompt_cache_key": "s"}).encode()
        lane = world.book.active.lane("coder")
        assert lane is not None
        await lanes.submit(world.store, world.book.active, world.fleet, lost, lane, body, reader="dead/1", retried=True)
        await jobs.detach(world.store, lost.id, reader="dead/1")  # its api died before it told anybody
        async with httpx.AsyncClient(base_url=api.url) as http:
            found = await http.post("/v1/responses", content=body, headers=retry)
            other = await http.post("/v1/responses", content=body, headers=retry)
        assert found.json()["id"] == f"resp_{lost.id}" != other.json()["id"]
