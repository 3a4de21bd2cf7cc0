"""Webhooks as they run: real schedulers, a real receiver, Redis cut off; the receiver verifies with its library."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from ulid import ULID

from broker import jobs, lanes, webhook_secrets, webhooks
from broker.lifecycle import State
from broker.records import JobRecord
from broker.store import Store
from tests.support.redis_server import RedisServer
from tests.support.waiting import until
from tests.support.webhook_endpoint import Receiver, receiver, verified
from tests.support.worker_world import World, eventually, simulated, worker_world
from workers import clockwork
from workers.courier import AT_ONCE, Courier
from workers.post import Post

pytestmark = [pytest.mark.real, pytest.mark.timeout(90)]

BOUND_S = 25.0


@pytest_asyncio.fixture
async def world(server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(server.socket_url, tmp_path) as world:
        await world.apply({"big": simulated()}, webhooks={"allow": ["127.0.0.0/8"]})
        yield world


async def ended(world: World, end: Receiver) -> str:
    """A job with a webhook that has been cancelled."""
    active, job_id = world.book.active, str(ULID())
    record = JobRecord(id=job_id, mode="async", webhook=end.url)
    await lanes.submit(world.store, active, world.fleet, record, active.lanes()["big"], b"{}", wanted=False)
    await jobs.cancel(world.store, job_id)
    return job_id


async def states(world: World) -> set[str]:
    return {one.state for one in await webhooks.listed(world.store)}


async def test_a_job_that_ends_is_told_with_a_signature_that_holds(world: World) -> None:
    """From a worker's finish to the receiver's `verify`, on the real clock."""
    secret = (await webhook_secrets.make(world.store, "anonymous")).secret
    await world.scheduler()
    await world.host()
    await world.until_model("big", "warm")
    async with receiver() as end:
        ask = await world.submit("big", mode="async", webhook=end.url)
        assert (await ask.end()).state is State.DONE
        await until(lambda: end.requests, what="the webhook came", timeout_s=BOUND_S)
        ((headers, body),) = end.requests
        told = verified(secret, headers, body)
        assert (told["type"], told["data"]["id"]) == ("job.done", ask.job_id)
        assert told["data"]["usage"]["completion_tokens"] > 0 and ask.text not in body

        async def delivered() -> bool:
            return await states(world) == {"delivered"}

        await eventually(delivered, what="it is noted", timeout_s=BOUND_S)


async def test_a_scheduler_killed_in_the_middle_delivers_again_under_the_same_id(world: World) -> None:
    secret = (await webhook_secrets.make(world.store, "anonymous")).secret
    async with receiver() as end:
        end.hold.clear()
        job_id = await ended(world, end)
        scheduler = world.process("workers.scheduler")
        await asyncio.wait_for(end.holding.wait(), BOUND_S)
        scheduler.kill()
        end.hold.set()

        other = await world._open("courier")
        async with Post() as post:
            courier = Courier(other, world.book, post)
            assert await courier.round() == 0, "its lease runs"
            late = await other.now_ms() + webhooks.LEASE_MS
            other.clock = lambda: late
            assert await courier.round() == 1
        first, second = end.requests
        assert first[0]["webhook-id"] == second[0]["webhook-id"] and first[1] == second[1]
        assert {verified(secret, *request)["data"]["id"] for request in end.requests} == {job_id}
        assert await states(world) == {"delivered"}


async def test_events_survive_a_restart_of_redis_and_of_arq(
    world: World, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that ended while no scheduler was there, too."""
    monkeypatch.setattr(clockwork, "RESTART_PAUSE_S", 0.2)
    # under `everysec` a kill may take the last writes with it while a sync is going on: not what this is about
    await world.store.command("CONFIG", "SET", "appendfsync", "always")
    await webhook_secrets.make(world.store, "anonymous")
    async with receiver() as end:
        end.hold.clear()
        ids = [await ended(world, end) for _ in range(5)]
        await world.scheduler()
        await asyncio.wait_for(end.holding.wait(), BOUND_S)
        await asyncio.to_thread(server.restart)
        end.hold.set()
        ids += [await ended(world, end) for _ in range(5)]

        def came() -> bool:
            return {verified_id(body) for _, body in end.requests} == set(ids)

        await until(came, what="all came", timeout_s=BOUND_S)


def verified_id(body: str) -> str:
    found: str = json.loads(body)["data"]["id"]
    return found


async def test_chores_find_a_place_beside_slow_endpoints(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that hang are as many as arq may run at once, but for the chores."""
    await webhook_secrets.make(world.store, "anonymous")
    monkeypatch.setattr(clockwork, "SWEEP_SECONDS", set(range(60)))
    swept: list[Store] = []

    async def sweep(store: Store, _book: object) -> None:
        swept.append(store)

    monkeypatch.setattr("workers.chores.sweep", sweep)
    async with receiver() as end:
        end.hold.clear()
        for _ in range(40):
            await ended(world, end)
        await world.scheduler()
        await until(lambda: len(end.requests) > AT_ONCE, what="a second round hangs too", timeout_s=BOUND_S)
        count = len(swept)
        await until(lambda: len(swept) >= count + 2, what="sweeps go on", timeout_s=BOUND_S)
        end.hold.set()
