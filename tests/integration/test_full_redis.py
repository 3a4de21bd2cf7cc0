"""A Redis that holds as much as it may: what runs goes on, what waits waits unharmed, and whatever makes room works."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from api.doctor import Facts, RedisFacts, examine
from api.status_table import status_table
from broker import batches, errors, files, jobs, lanes
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import BatchRecord
from broker.status import Snapshot
from broker.store import Store
from tests.support.batch_files import CHAT, jsonl, line
from tests.support.broker_world import new_namespace
from tests.support.live_api import RawClient, chat_body, live_scene
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, until, words, worker_world
from workers import dispatcher

pytestmark = pytest.mark.real


@pytest_asyncio.fixture
async def world(server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(server.socket_url, tmp_path) as world:
        yield world


@asynccontextmanager
async def full(store: Store) -> AsyncIterator[None]:
    """For the length of the block it holds more than it may."""
    await store.command("CONFIG", "SET", "maxmemory", "1")
    try:
        yield
    finally:
        await store.command("CONFIG", "SET", "maxmemory", "0")


async def test_an_answer_under_way_goes_on_and_who_waits_is_unharmed(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A lease that cannot be renewed ends a healthy answer, and a claim whose frames cannot be written is an attempt
    for nothing: some of these, and the job is called lost."""
    await world.apply({"big": simulated(maxConcurrent=1, maxQueue=9, options={"decodeTps": 60})})
    await world.scheduler()
    await world.warm_host()
    ask = await world.submit("big", tokens=90)
    waits = [await world.submit("big") for _ in range(3)]
    await ask.until_state(State.STREAMING)
    claim, refused = lanes.claim, []

    async def counted(*args: Any, **more: Any) -> Any:
        try:
            return await claim(*args, **more)
        except errors.RedisFull:
            refused.append(time.monotonic())
            raise

    monkeypatch.setattr(lanes, "claim", counted)

    async with full(world.store):
        with caplog.at_level(logging.WARNING, "warmlane.dispatcher"):
            record = await ask.end()
            assert (record.state, record.attempt, ask.text) == (State.DONE, 1, words(90))
            await until(lambda: len(refused) == 3, what="the free slot was tried for them again and again")
        assert min(later - before for before, later in pairwise(refused)) >= dispatcher.FULL_PAUSE_S
        found = [await other.record() for other in waits]
        assert {(r.state, r.attempt, r.losses) for r in found} == {(State.QUEUED, 0, 0)}
        assert caplog.text.count("event=claims_wait") == 1 and "event=claim_retry" not in caplog.text

    assert {(await other.end()).state for other in waits} == {State.DONE}
    assert {(await other.record()).attempt for other in waits} == {1}


async def test_a_lease_is_renewed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "RENEW_EVERY_S", 0.1)
    await world.apply({"big": simulated()})
    await world.warm_host()
    await world.runtime("big").break_with(stall_after_tokens=1)
    ask = await world.submit("big", tokens=9)
    await ask.until_state(State.STREAMING)
    async with full(world.store):
        lease = (await ask.record()).lease_until

        async def renewed() -> bool:
            return (await ask.record()).lease_until > lease

        await eventually(renewed, what="its lease goes on")
        await jobs.cancel(world.store, ask.job_id)
        assert (await ask.end()).state is State.CANCELLED


async def test_who_has_waited_long_enough_is_told_so_and_later_starts_come(world: World) -> None:
    await world.apply({"big": simulated(keepWarm=False, maxQueue=9, maxWaitMs=600, options={"coldStartMs": 60_000})})
    await world.host()
    waits = await world.submit("big")
    later = await world.submit("big", mode="async", not_before=await world.store.now_ms() + 300)
    async with full(world.store):
        await world.scheduler()
        assert (await waits.end()).state is State.EXPIRED
        await later.until_state(State.QUEUED)
        assert (await later.end()).state is State.EXPIRED


async def test_a_batch_ends_and_its_file_goes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """They are the largest things in memory. arq, which can write nothing down, is not needed for it."""
    await world.apply({"big": simulated(keepWarm=False, maxQueue=9, options={"coldStartMs": 60_000})})
    await world.host()
    store = world.store
    upload = files.Upload(store, world.book.active, "anonymous")
    await upload.write(jsonl(*(line(f"line {n}") for n in range(3))))
    sent = await upload.finish("in.jsonl")
    asked = BatchRecord(id="", caller="anonymous", input_file_id=sent.id, endpoint=CHAT, keep_ms=60_000)
    batch = await batches.open_batch(store, asked, within_ms=60_000, said="")
    await world.scheduler()

    async def asked_for() -> bool:
        return int(await store.command("ZCARD", store.keys.due)) == 3

    await eventually(asked_for, what="its lines are jobs")
    with caplog.at_level(logging.INFO, "warmlane"):
        async with full(store):
            await until(lambda: "event=chores_by_hand" in caplog.text, what="the chores go on without arq")
            await batches.stop(store, batch.id, "cancelled")

            async def ended() -> bool:
                return (await batches.read(store, batch.id)).state == "cancelled"

            await eventually(ended, what="the batch has ended")
            await files.drop(store, sent.id, caller="anonymous")
        assert int(await store.command("ZCARD", store.keys.due)) == 0
        assert "event=arq_restart" not in caplog.text and caplog.text.count("event=chores_by_hand") == 1


async def test_nothing_new_is_let_in_and_its_client_hears_why(server: RedisServer) -> None:
    store = await Store.open(server.url, namespace=new_namespace(), name="test-api")
    async with live_scene(store) as scene, httpx.AsyncClient(base_url=scene.api.url) as client:
        reading = await RawClient.open(scene.api)
        await reading.chat("pause")
        await reading.head()
        await reading.until_said(b"Hello")
        async with full(store):
            began = time.monotonic()
            refused = [
                await client.post("/v1/chat/completions", content=chat_body("hello")),
                await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", b"{}\n")}),
            ]
            assert time.monotonic() - began < 2, "it may stay full: nobody waits for it at the door"
            assert [(r.status_code, r.headers["retry-after"]) for r in refused] == [(503, "5")] * 2
            assert {r.json()["error"]["code"] for r in refused} == {"broker_unavailable"}
            assert all("Redis is full" in r.json()["error"]["message"] for r in refused)
            scene.go.set()
            assert (await reading.body()).endswith(b"data: [DONE]\n\n")
        assert (await client.post("/v1/chat/completions", content=chat_body("hello", stream=False))).status_code == 200
    await store.close()


async def test_a_policy_and_keys_can_still_be_changed(server: RedisServer) -> None:
    """A key that leaked is revoked now, and a policy may be what makes room."""
    store = await Store.open(server.url, namespace=new_namespace(), name="test-api")
    async with full(store):
        assert await PolicyBook(store).apply('{"models": {"m": {"backend": "simulated", "model": "m"}}}') == 1
    await store.close()


async def test_health_and_status_say_so(server: RedisServer) -> None:
    """In words that `gateway doctor` takes over too: it is nothing that one sees at the requests alone."""
    store = await Store.open(server.url, namespace=new_namespace(), name="test-api")
    async with live_scene(store) as scene, httpx.AsyncClient(base_url=scene.api.url) as client:
        async with full(store):
            [said] = (await client.get("/healthz")).json()["unfit"]
            shown = Snapshot.from_json((await client.get("/v1/status")).json())
        assert said.startswith("Redis is full (") and "`maxmemory`" in said
        assert f"note: {said}" in status_table(shown).splitlines()
        found = examine(Facts(scene.api.url, redis=RedisFacts(unfit=(said,))))
        assert ("redis", "wrong", said) in [(finding.subject, finding.state, finding.sentence) for finding in found]
        assert (await client.get("/healthz")).json()["unfit"] == []
        assert (await client.get("/v1/status")).json()["redis_note"] == ""
    await store.close()
