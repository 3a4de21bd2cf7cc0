"""A reply of Redis that is lost on its way: what was done is found to be done, and is not done again."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from broker import errors, jobs
from broker.lifecycle import State
from broker.store import Store
from tests.support.broker_world import new_namespace
from tests.support.clients import ask, user
from tests.support.invariants import take, violations
from tests.support.live_api import RawClient, Scene, live_api, live_scene
from tests.support.redis_server import RedisServer
from tests.support.worker_world import policy, simulated, words, worker_world

pytestmark = pytest.mark.real


def lose_first_reply(
    store: Store,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    meanwhile: Callable[[], Awaitable[object]] | None = None,
) -> list[object]:
    """Has the first reply to a verb never arrive, although the verb was done; gives what it would have said.

    `meanwhile` happens after the verb was done and before its caller learns that it has no reply.
    """
    run = store.run
    lost: list[object] = []

    async def done_and_not_heard(name: str, *args: Any) -> Any:
        found = await run(name, *args)
        if name == verb and not lost:
            lost.append(found)
            if meanwhile is not None:
                await meanwhile()
            raise errors.BrokerUnavailable("the connection to Redis was lost")
        return found

    monkeypatch.setattr(store, "run", done_and_not_heard)
    return lost


async def test_a_claim_that_was_made_without_our_hearing_of_it(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its client would wait for a lease to end, with a free slot beside it."""
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply({"pretend": simulated(maxConcurrent=1, memoryMb=1)})
        lost = lose_first_reply((await world.host())._store, "claim", monkeypatch)
        await world.until_model("pretend", "warm")
        record = await (await world.submit("pretend", tokens=4)).end(timeout_s=3)
        assert lost
        assert (record.state, record.attempt, record.losses) == (State.DONE, 1, 0)
        again = await world.submit("pretend", tokens=4)
        assert (await again.end(timeout_s=3)).state is State.DONE
        assert again.text == words(4)
        stats = await world.runtime("pretend").stats()
        assert stats["requests_finished"] <= 2 + 2  # two answers, and what the wake has asked for


async def test_a_submit_that_was_made_without_our_hearing_of_it(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The api asks again with the same id: one job, one answer."""
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply({"pretend": simulated(maxConcurrent=1, memoryMb=1)})
        await world.host()
        await world.until_model("pretend", "warm")
        store = await Store.open(world.url, namespace=world.namespace, name="api")
        lost = lose_first_reply(store, "submit", monkeypatch)
        try:
            async with live_api(store) as api, httpx.AsyncClient(timeout=10) as http:
                told = await ask(http, api.url, {"model": "pretend", "messages": user("hi"), "max_tokens": 4})
        finally:
            await store.close()
        assert lost
        assert told.text == words(4)
        picture = await take(world.store)
        assert [job.attempt for job in picture.jobs.values()] == [1]
        assert not violations(picture)


@pytest_asyncio.fixture
async def scene(redis_server: RedisServer) -> AsyncIterator[Scene]:
    """An api and a worker that does what the test says."""
    store = await Store.open(redis_server.url, namespace=new_namespace(), name="api")
    async with live_scene(store) as scene:
        yield scene
    await store.close()


@pytest.mark.parametrize("refusal", ["lane_full", "model_unavailable", "model_not_found"])
async def test_a_submit_without_a_reply_is_found_before_anything_refuses_it(
    refusal: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is in: that its lane is full by now, or its model away, or out of the policy, is no answer to it."""
    book = scene.worker.book
    await scene.beat(small="waking")

    async def meanwhile() -> None:
        if refusal == "model_unavailable":
            await scene.beat(small="quarantined")
        elif refusal == "model_not_found":
            await book.apply(policy({"big": simulated()}))
            await scene.api.gateway.book.reload()

    client, other = [await RawClient.open(scene.api) for _ in range(2)]
    lost = lose_first_reply(scene.store, "submit", monkeypatch, meanwhile=meanwhile)
    await client.chat("hello", model="small")
    assert await client.head() == 200, await client.body()  # it waits: what is said after headerHoldMs
    assert lost
    await other.chat("hello", model="small")  # a job that is not in hears what this one was spared
    assert await other.head() != 200
    assert json.loads(await other.body())["error"]["code"] == refusal
    await scene.beat()
    assert (await client.body()).endswith(b"data: [DONE]\n\n")
    picture = await take(scene.store)
    assert [(job.id, job.attempt) for job in picture.jobs.values()] == [(client.headers["x-gateway-job"], 1)]
    assert not violations(picture)


@pytest.mark.parametrize("verb", ["first_token", "emit", "end"])
async def test_a_write_that_was_made_without_our_hearing_of_it(
    verb: str, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is repeated, and the repeat changes nothing."""
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply({"pretend": simulated(maxConcurrent=1, memoryMb=1, options={"decodeTps": 50})})
        host = await world.host()
        await world.until_model("pretend", "warm")
        lost = lose_first_reply(host._store, verb, monkeypatch)
        asked = await world.submit("pretend", tokens=6)
        record = await asked.end(timeout_s=5)
        assert lost
        assert (record.state, record.attempt, record.losses) == (State.DONE, 1, 0)
        assert asked.text == words(6)
        assert (await jobs.read(world.store, asked.job_id)).last_seq == asked.frames[-1].seq
