"""A model that leaves the policy: it gives its runtime's memory back, and holds nobody up who has to go.

Its runtime is an Ollama: nobody stops that when the worker forgets the model, so only an unload frees the memory.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker import hosts, jobs
from broker.lifecycle import State
from tests.support.fake_ollama import FakeOllama
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, simulated, until, worker_world
from workers import chores, upkeep
from workers.runtimes.http_server import Exchange

pytestmark = pytest.mark.real


class SlowOllama(FakeOllama):
    """An Ollama whose answers can be held back, and that knows when it was asked for memory."""

    def __init__(self) -> None:
        super().__init__("weights")
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked = asyncio.Event()
        self.unload_asked_at = 0.0

    async def _handle(self, exchange: Exchange) -> None:
        if exchange.path == "/api/generate" and exchange.json().get("keep_alive") == 0:
            self.unload_asked_at = time.monotonic()
        if exchange.path == "/v1/chat/completions" and not self.may_answer.is_set():
            self.asked.set()
            await self.may_answer.wait()
        await super()._handle(exchange)


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


@pytest_asyncio.fixture
async def ollama() -> AsyncIterator[SlowOllama]:
    ollama = SlowOllama()
    async with ollama.running():
        yield ollama


async def removed_while_it_settles(world: World, ollama: SlowOllama, *, settle_ms: int) -> float:
    """Cancels an answer of `big` and removes the model; gives the instant of the cancel.

    Ollama cannot say when it is done with a closed answer, so the slot settles for as long as the policy says.
    """
    small = simulated()
    big = {"backend": "ollama", "model": "weights", "url": ollama.url, "keepWarm": True, "settleMs": settle_ms}
    await world.apply({"big": big, "small": small})
    host = await world.warm_host()
    found = host.residents.wakers["big"]
    ollama.may_answer.clear()
    ask = await world.submit("big")
    await asyncio.wait_for(ollama.asked.wait(), 5)
    cancelled_at = time.monotonic()
    await jobs.cancel(world.store, ask.job_id)
    await until(lambda: found.slots.settling, what="the slot of the cancelled answer settles")

    await world.apply({"small": small})
    await chores.sweep(world.store, world.book)
    await until(lambda: found.leaving, what="the worker hears that the model is gone")
    return cancelled_at


async def test_it_is_unloaded_when_its_last_answer_has_settled(
    world: World, ollama: SlowOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before: the runtime may still be at work on it. And not by the way that its server ends with its worker."""
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.2)
    cancelled_at = await removed_while_it_settles(world, ollama, settle_ms=2000)
    assert (await (await world.submit("small")).end()).state is State.DONE

    await until(lambda: not ollama.loaded, what="the runtime has its memory back")

    assert ollama.unload_asked_at - cancelled_at >= 2
    await until(lambda: "big" not in world.hosts["gpu1"].residents.wakers, what="nobody looks after it any more")
    assert (await (await world.submit("small")).end()).state is State.DONE


async def test_a_worker_does_not_wait_for_it_to_settle_before_it_goes(world: World, ollama: SlowOllama) -> None:
    await removed_while_it_settles(world, ollama, settle_ms=600_000)
    host = world.hosts["gpu1"]

    await asyncio.wait_for(host.drain(), 5)
    await world.ended()

    assert await hosts.read(world.store, "gpu1") is None
