"""`maxConcurrent` is believed as far as the runtime runs in parallel; the rest waits in its lane, where it is seen."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import httpx
import pytest
import pytest_asyncio

from broker import jobs
from broker.lifecycle import State
from tests.support.llama_server import llama_command
from tests.support.redis_server import RedisServer
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.waiting import until
from tests.support.worker_world import ROOT, World, eventually, simulated, worker_world
from workers import overlap
from workers.overlap import Overlap, measure
from workers.runtimes.base import Endpoint
from workers.runtimes.process import fill_command, free_port

pytestmark = [pytest.mark.real, pytest.mark.timeout(90)]


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


@contextmanager
def running(*command: str) -> Iterator[None]:
    process = Popen(command, env={"PYTHONPATH": str(ROOT)}, stdout=DEVNULL, stderr=DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def pretended(*, parallel: int, decode_tps: int = 200) -> AsyncIterator[str]:
    """A server that somebody else started, with so many slots and a queue of its own."""
    port = free_port()
    module = [sys.executable, "-P", "-m", "workers.runtimes.simulated_server", "--port", str(port)]
    with running(*module, "--parallel", str(parallel), "--decode-tps", str(decode_tps)):
        await healthy(url := f"http://127.0.0.1:{port}")
        yield url


async def healthy(url: str) -> None:
    async def answers() -> bool:
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(f"{url}/health")).status_code == 200
        except httpx.HTTPError:
            return False

    await eventually(answers, what=f"{url} is healthy", timeout_s=30)


async def stats(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(trust_env=False) as client:
        found: dict[str, Any] = (await client.get(f"{url}/simulated/stats")).json()
        return found


@pytest.mark.parametrize(("parallel", "count", "runs"), [(1, 2, 1), (2, 2, 2), (2, 4, 2), (4, 4, 4)])
async def test_a_hidden_queue_is_seen(parallel: int, count: int, runs: int) -> None:
    """From outside, by who gets a token while others go on; afterwards nothing of ours runs there any more."""
    async with pretended(parallel=parallel) as url:
        assert await measure(Endpoint(url), count=count, first_token_s=0.01) == runs

        async def idle() -> bool:
            return (await stats(url))["active"] == 0

        await eventually(idle, what="the server is idle again")


@pytest.mark.parametrize(("parallel", "slots"), [(1, 1), (2, 2)])
async def test_a_real_llama_server_is_measured(parallel: int, slots: int, tmp_path: Path) -> None:
    """With `-np 1` the second generation waits inside it, whatever the policy says."""
    file, port = write_tiny_gguf(tmp_path / "slow.gguf", megabytes=60), free_port()
    words = {"model": str(file), "port": port, "parallel": parallel, "context": 4096}
    with running(*fill_command(llama_command(), words)):
        await healthy(url := f"http://127.0.0.1:{port}")
        found = Overlap(2)
        await found.measure(Endpoint(url), kind="llama.cpp", first_token_s=0.01, stop=lambda: False)
        assert (found.known, found.slots) == (True, slots)


@pytest.mark.parametrize(("parallel", "total"), [(1, 1), (2, 2)])
async def test_slots_are_capped_at_what_the_runtime_tells(world: World, parallel: int, total: int) -> None:
    """The second job waits in its lane, where it can be promoted, and not inside the runtime."""
    await world.apply({"big": simulated(maxConcurrent=2, options={"parallel": parallel})})
    await world.warm_host()
    told = await world.model("big")
    assert (told.slots_total, told.parallel) == (total, 1 if parallel == 1 else 0)
    await world.runtime("big").break_with(stall_after_tokens=1)
    asked = [await world.submit("big", tokens=5) for _ in range(2)]

    async def held() -> bool:
        return (await world.model("big")).slots_used == total

    await eventually(held, what="what can run runs")
    assert (await world.runtime("big").stats())["max_waiting"] == 0
    assert await world.waiting("big") == 2 - total
    for ask in reversed(asked):
        await jobs.cancel(world.store, ask.job_id)
        await ask.end()


@pytest.mark.parametrize(("parallel", "total"), [(1, 1), (2, 2)])
async def test_slots_of_a_foreign_server_are_measured_while_it_is_idle(world: World, parallel: int, total: int) -> None:
    """It is warm before that, and capped after it."""
    async with pretended(parallel=parallel) as url:
        model = {"backend": "llama.cpp", "model": "x", "url": url, "keepWarm": True, "maxConcurrent": 2}
        await world.apply({"big": model})
        host = await world.warm_host()
        waker = host.residents.wakers["big"]
        await until(lambda: waker.overlap.known and waker.slots.idle, what="it is measured", timeout_s=30)
        assert waker.slots.total == total

        async def told() -> bool:
            there = await world.model("big")
            return (there.slots_total, there.slots_used) == (total, 0)

        await eventually(told, what="the heartbeat tells of it")


async def test_whoever_waits_ends_the_measurement(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that cannot become clear holds the slots for a moment only, and is made another time."""
    monkeypatch.setattr(overlap, "judge", lambda *_: None)
    async with pretended(parallel=2, decode_tps=20) as url:
        model = {"backend": "llama.cpp", "model": "x", "url": url, "keepWarm": True, "maxConcurrent": 2}
        await world.apply({"big": model})
        host = await world.warm_host()
        waker = host.residents.wakers["big"]
        await until(lambda: waker.slots.free == 0, what="it is being measured", timeout_s=30)
        started = asyncio.get_running_loop().time()
        ask = await world.submit("big", tokens=2)
        assert (await ask.end()).state is State.DONE
        assert asyncio.get_running_loop().time() - started < overlap.MEASURE_S_MAX / 2
        assert not waker.overlap.known and waker.slots.total == 2
