"""OpenAI's Responses at the front door, with the stock client, before a runtime that knows chat only."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from api import stream as stream_module
from api.visit import Visit
from broker.dialects import responses_object, responses_voice
from broker.lifecycle import State
from tests.support.clients import async_sdk
from tests.support.live_api import LiveApi, RawClient, live_api
from tests.support.redis_server import RedisServer
from tests.support.scripted_runtime import ScriptedVllm
from tests.support.worker_world import World, eventually, simulated, worker_world
from tests.unit.dialects import runtime_streams as streams
from workers.runtimes.http_server import Exchange

pytestmark = pytest.mark.real

TOOLS: list[Any] = [
    {"type": "function", "name": "read", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "custom", "name": "apply_patch"},
    {"type": "web_search"},
]
PATCH = (
    streams.vllm({"role": "assistant", "content": ""})
    + streams.vllm({"reasoning": "Mend it."})
    + streams.vllm(streams.call(0, id="call_p", name="apply_patch", arguments='{"input":"*** Begin'))
    + streams.vllm(streams.call(0, arguments='\\n"}'))
    + streams.vllm({}, "tool_calls")
    + streams.usage_chunk("weights")
    + streams.DONE
)


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
        await world.apply(models, headerHoldMs=200)
        await world.warm_host()
        async with live_api(await world._open("api")) as api:
            yield world, api


@asynccontextmanager
async def a_chat(server: RedisServer, directory: Path, stream: bytes = b"") -> AsyncIterator[tuple[Scripted, LiveApi]]:
    """A gateway in front of a vLLM."""
    async with Scripted().running() as fake:
        fake.stream = stream
        model = {"backend": "vllm", "model": "weights", "url": fake.url, "keepWarm": True}
        async with running(server, directory, coder=model) as (_, api):
            yield fake, api


def events_of(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]


def asked(**more: Any) -> bytes:
    return json.dumps({"model": "coder", "input": "Hi", "stream": True} | more).encode()


async def test_a_turn_with_a_tool_is_asked_through_chat_and_told_in_the_clients_words(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """As Codex does it: a thought, a custom tool's call, and its output in the next request."""
    async with a_chat(redis_server, tmp_path, PATCH) as (fake, api), async_sdk(api.url, max_retries=0) as client:
        first: dict[str, Any] = {"model": "coder", "instructions": "Be brief.", "input": "Mend a.py", "tools": TOOLS}
        whole = await client.responses.create(**first, reasoning={"effort": "low", "summary": "auto"}, store=False)
        thought, call = whole.output
        assert thought.type == "reasoning" and thought.summary[0].text == "Mend it."
        assert call.type == "custom_tool_call"
        assert (call.name, call.call_id, call.input) == ("apply_patch", "call_p", "*** Begin\n")
        assert (whole.status, whole.model, whole.store) == ("completed", "coder", False)
        assert whole.usage is not None
        assert (whole.usage.input_tokens, whole.usage.input_tokens_details.cached_tokens) == (31, 24)
        sent = fake.chat_bodies[-1]
        assert (sent["model"], sent["stream"], sent["reasoning_effort"]) == ("weights", True, "low")
        assert [tool["function"]["name"] for tool in sent["tools"]] == ["read", "apply_patch"]

        fake.stream = streams.VLLM_REASONING
        back = [
            {"role": "user", "content": "Mend a.py"},
            *(item.model_dump(exclude_none=True) for item in whole.output),
            {"type": "custom_tool_call_output", "call_id": "call_p", "output": "done"},
        ]
        events = [
            event
            async for event in await client.responses.create(
                model="coder",
                input=back,
                tools=TOOLS,
                stream=True,  # type: ignore[arg-type]
            )
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last = events[-1]
        assert last.type == "response.completed" and last.response.output_text == "Yes."
        assert [message["role"] for message in fake.chat_bodies[-1]["messages"]] == ["user", "assistant", "tool"]
        assert fake.chat_bodies[-1]["messages"][1]["tool_calls"][0]["function"]["name"] == "apply_patch"


async def test_the_clients_own_collector_makes_the_same_answer(redis_server: RedisServer, tmp_path: Path) -> None:
    """The SDK puts the pieces together by their indexes and needs `response.created` first."""
    async with a_chat(redis_server, tmp_path, streams.LLAMA_TOOLS) as (_, api), async_sdk(api.url) as client:
        tools = [{"type": "function", "name": name, "parameters": {}, "strict": False} for name in ("read", "list")]
        async with client.responses.stream(model="coder", input="Hi", tools=tools) as stream:  # type: ignore[arg-type]
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert [(item.type, getattr(item, "name", "")) for item in final.output] == [
        ("function_call", "read"),
        ("function_call", "list"),
    ]


async def test_a_cold_start_is_heard_as_events_in_one_count(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codex hangs up after 300 s without an event; comments are none."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.2)
    sleepy = simulated(keepWarm=False, options={"coldStartMs": 1500})
    async with (
        running(redis_server, tmp_path, coder=simulated(), sleepy=sleepy) as (world, api),
        async_sdk(api.url, max_retries=0) as client,
    ):
        events = [
            event
            async for event in await client.responses.create(
                model="sleepy", input="Hi", max_output_tokens=5, stream=True
            )
        ]
        kinds = [event.type for event in events]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert kinds[0] == "response.created" and kinds.count("response.created") == 1
        assert kinds.count("response.in_progress") >= 3
        assert kinds[-1] in ("response.completed", "response.incomplete")
        assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")
        assert events[0].response.id == events[-1].response.id  # type: ignore[union-attr]
        job = await world.store.command("EXISTS", world.store.keys.job(events[0].response.id.removeprefix("resp_")))
        assert job == 1


async def test_a_job_that_redis_lost_goes_on_as_the_same_response(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another job, and its client has heard of the first one already: id and time are the first one's."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(Visit, "redis_came_back", True)
    for module in (responses_object, responses_voice):  # within a second the times of both would be one
        monkeypatch.setattr(module, "created_s", lambda job_id: sum(job_id.encode()))
    sleepy = simulated(keepWarm=False, options={"coldStartMs": 1500})
    async with running(redis_server, tmp_path, coder=simulated(), sleepy=sleepy) as (world, api):
        raw = await RawClient.open(api)
        await raw.send("POST", "/v1/responses", asked(model="sleepy", max_output_tokens=5))
        assert await raw.head() == 200
        heard = await raw.until_said(b"response.in_progress")
        lost, keys = raw.headers["x-gateway-job"], world.store.keys
        [(entry, _)] = await world.store.command("XRANGE", keys.lane("sleepy"), "-", "+")
        await world.store.command("XDEL", keys.lane("sleepy"), entry)
        await world.store.command("ZREM", keys.due, lost)
        await world.store.command("DEL", keys.job(lost), keys.request(lost), keys.readers(lost))
        events = events_of(heard + await raw.body())
        said = [event["response"] for event in events if "response" in event]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert said[-1]["status"] in ("completed", "incomplete") and said[-1]["output"][0]["content"][0]["text"]
        assert {(response["id"], response["created_at"]) for response in said} == {(f"resp_{lost}", sum(lost.encode()))}
        assert lost not in said[-1]["output"][0]["id"]  # another job has made it


async def test_a_promoted_job_stays_the_same_response(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client has heard of it before another model answers."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.2)
    sleepy = simulated(keepWarm=False, fallback="coder", coldStartBudgetMs=600, options={"coldStartMs": 20_000})
    async with running(redis_server, tmp_path, coder=simulated(), sleepy=sleepy) as (world, api):
        scheduler = await world.scheduler()
        raw = await RawClient.open(api)
        await raw.send("POST", "/v1/responses", asked(model="sleepy", max_output_tokens=5))
        assert await raw.head() == 200
        said = [event["response"] for event in events_of(await raw.body()) if "response" in event]
        assert (said[0]["model"], said[-1]["model"]) == ("sleepy", "coder") and len(said) > 2
        assert len({(response["id"], response["created_at"]) for response in said}) == 1
        await world.stop_scheduler(scheduler)


async def test_a_loss_in_the_middle_is_a_failed_response(redis_server: RedisServer, tmp_path: Path) -> None:
    """And never a finished one: agents act on what is finished."""
    async with a_chat(redis_server, tmp_path, streams.VLLM_ERROR_THEN_DONE) as (_, api):
        raw = await RawClient.open(api)
        await raw.send("POST", "/v1/responses", asked())
        assert await raw.head() == 200 and raw.headers["content-type"].startswith("text/event-stream")
        body = await raw.body()
        found = events_of(body)
        assert b"[DONE]" not in body
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        assert "response.output_item.done" not in [event["type"] for event in found]
        error = found[-1]["response"]["error"]
        assert (found[-1]["type"], found[-1]["response"]["status"]) == ("response.failed", "failed")
        assert (error["code"], error["reason"]) == ("server_error", "runtime_failed")
        assert "EngineCore died" in error["message"]

        whole = await RawClient.open(api)
        await whole.send("POST", "/v1/responses", asked(stream=False))
        assert await whole.head() == 502
        assert json.loads(await whole.body())["error"]["code"] == "runtime_failed"


async def test_what_expires_while_its_client_waits_says_when_to_come_back(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with running(
        redis_server,
        tmp_path,
        coder=simulated(),
        slow=simulated(keepWarm=False, maxWaitMs=700, options={"coldStartMs": 5000}),
    ) as (world, api):
        scheduler = await world.scheduler()
        raw = await RawClient.open(api)
        await raw.send("POST", "/v1/responses", asked(model="slow"))
        assert await raw.head() == 200
        last = events_of(await raw.body())[-1]
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "rate_limit_exceeded"
        assert "try again in" in last["response"]["error"]["message"]
        await world.stop_scheduler(scheduler)


async def test_what_is_not_kept_is_refused_at_the_door(redis_server: RedisServer, tmp_path: Path) -> None:
    async with running(redis_server, tmp_path, coder=simulated()) as (_, api), async_sdk(api.url) as client:
        for more in ({"previous_response_id": "resp_1"}, {"store": False, "background": True}, {"conversation": "c"}):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(model="coder", input="Hi", **more)  # type: ignore[call-overload]
            assert refused.value.code == "invalid_request" and refused.value.param == next(iter(more))
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.responses.create(model="nobody", input="Hi")
        assert unknown.value.code == "model_not_found"


async def test_a_retry_gets_the_same_response(redis_server: RedisServer, tmp_path: Path) -> None:
    """It attaches to the first one's job, and the object's id is the job's."""
    async with running(redis_server, tmp_path, coder=simulated()) as (_, api), async_sdk(api.url) as client:
        first, second = [
            await client.responses.create(
                model="coder", input="Hi", max_output_tokens=3, extra_headers={"Idempotency-Key": "one"}
            )
            for _ in range(2)
        ]
        stream = await client.responses.create(
            model="coder", input="Hi", max_output_tokens=3, extra_headers={"Idempotency-Key": "two"}, stream=True
        )
        events = [event async for event in stream]
    assert first.id == second.id and first.output_text == second.output_text
    assert events[0].type == "response.created" and events[0].response.id != first.id


async def test_a_hang_up_ends_the_job(redis_server: RedisServer, tmp_path: Path) -> None:
    async with running(redis_server, tmp_path, coder=simulated(options={"decodeTps": 20})) as (world, api):
        raw = await RawClient.open(api)
        await raw.send("POST", "/v1/responses", asked(max_output_tokens=400))
        await raw.head()
        job_id = raw.headers["x-gateway-job"]
        await raw.until_said(b"response.output_text.delta")
        raw.close()

        async def cancelled() -> bool:
            state = await world.store.command("HGET", world.store.keys.job(job_id), "state")
            return bool(state == State.CANCELLED.value.encode())

        await eventually(cancelled, what="the job is cancelled")
