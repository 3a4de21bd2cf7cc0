"""Whose a load is: not the client's whose request caused it, and not for ever a worker's that was killed meanwhile."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from broker import jobs, wake
from broker.lifecycle import State
from tests.support.fake_ollama import FakeOllama
from tests.support.redis_server import RedisServer
from tests.support.scripted_runtime import ScriptedRouter, ScriptedRuntime, ScriptedVllm
from tests.support.worker_world import World, eventually, simulated, until, worker_world
from workers import chores
from workers.runtimes.base import LoadFailed
from workers.runtimes.llama_server import LlamaServer

pytestmark = pytest.mark.real
BOUND_S = 15.0
SHORT_MS = 2_500
"""What is left of a lease that a test waits out: long enough for another host to try it before."""


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


@asynccontextmanager
async def cold_runtime(name: str) -> AsyncIterator[tuple[ScriptedRuntime, dict[str, Any]]]:
    """A runtime whose load waits for the test, and the model of a policy that it serves."""
    doubles = {"ollama": FakeOllama("weights"), "llama.cpp": ScriptedRouter("weights"), "vllm": ScriptedVllm()}
    async with doubles[name].running() as double:
        if isinstance(double, ScriptedVllm):
            double.put_to_sleep(1)
        double.hold_loads()
        yield double, {"backend": name, "model": "weights", "url": double.url, "coldStartBudgetMs": 60_000}


async def seen(event: asyncio.Event) -> None:
    async with asyncio.timeout(BOUND_S):
        await event.wait()


@pytest.mark.parametrize("name", ["ollama", "llama.cpp", "vllm"])
async def test_the_client_that_caused_a_load_hangs_up_and_the_next_one_is_served(world: World, name: str) -> None:
    """Ollama would abort the load with the connection that asked for it: that connection is ours."""
    async with cold_runtime(name) as (double, model):
        await world.apply({"big": model})
        await world.host()
        first = await world.submit("big")
        await seen(double.load_seen)
        assert await jobs.cancel(world.store, first.job_id) == "queued"
        assert (await first.end()).state is State.CANCELLED
        assert (await world.model("big")).state == "waking"
        double.release_loads()
        await world.until_model("big", "warm")
        probes = len(double.chat_bodies)

        record = await (await world.submit("big")).end()
        assert (record.state, record.served_by) == (State.DONE, "big@gpu1")
        assert len(double.chat_bodies) == probes + 1, "nobody generated for the one that hung up"
        if isinstance(double, FakeOllama):
            assert (double.loads_started, double.loads_aborted) == (["weights:latest"], [])
        elif isinstance(double, ScriptedRouter):
            assert double.loads_started == ["weights"]
        elif isinstance(double, ScriptedVllm):
            assert double.steps == ["wake kv_cache weights"]


async def test_a_worker_killed_while_it_loads_leaves_no_server_and_no_stuck_lock(world: World) -> None:
    """Its server goes with it. Its lock keeps other hosts from a second load until its lease is over, and not longer;
    the same host's next worker knows that the first is dead, and does not wait for that."""
    never = {"coldStartMs": 60_000}
    await world.apply({"again": simulated(hosts=["gpu1"], options=never), "moves": simulated(options=never)})
    worker = world.process("workers.host", "gpu1")
    for model in ("again", "moves"):
        await world.until_model(model, "waking")
    servers = [await pid_of(world, model) for model in ("again", "moves")]
    taken = await wake.holder(world.store, "again")

    worker.kill()
    left_s = int(await world.store.command("PTTL", world.store.keys.wake("again"))) / 1000
    assert 0 < left_s <= wake.WAKE_TTL_MS / 1000
    assert await world.store.command("PTTL", world.store.keys.wake("moves")) > SHORT_MS
    await world.store.command("PEXPIRE", world.store.keys.wake("moves"), SHORT_MS)  # most of its lease is over
    aged_at = asyncio.get_running_loop().time()
    await until(lambda: all(is_gone(pid) for pid in servers), what="no orphan server is left")
    await world.apply({"again": simulated(hosts=["gpu1"], options=never), "moves": simulated(hosts=["gpu2"])})
    await world.host("gpu2")
    world.process("workers.host", "gpu1")

    async def taken_over() -> bool:
        return await wake.holder(world.store, "again") not in ("", taken)

    await eventually(taken_over, what="the next worker of this host takes its lock over", timeout_s=left_s - 1)

    async def started_again() -> bool:
        return await pid_of(world, "again") not in servers

    await eventually(started_again, what="it loads again", timeout_s=left_s - 1)
    await world.until_model("moves", "warm", host="gpu2", timeout_s=SHORT_MS / 1000 + 5)
    assert asyncio.get_running_loop().time() - aged_at > SHORT_MS / 1000, "a lock that holds was broken"


async def test_a_worker_killed_while_an_ollama_loads_takes_the_load_along(world: World) -> None:
    """Its connection was the load's; a router's load would go on, and the next worker finds it."""
    async with cold_runtime("ollama") as (ollama, model), cold_runtime("llama.cpp") as (router, routed):
        assert isinstance(ollama, FakeOllama) and isinstance(router, ScriptedRouter)
        routed = {**routed, "memoryMb": 100}  # a load of unknown size would wait for the other
        await world.apply({"big": model | {"keepWarm": True}, "small": routed | {"keepWarm": True}})
        worker = world.process("workers.host", "gpu1")
        await seen(ollama.load_seen)
        await seen(router.load_seen)
        worker.kill()
        await seen(ollama.abort_seen)
        assert router.states == {"weights": "loading"}
        ollama.release_loads()
        router.release_loads()
        await world.host("gpu1")
        for name in ("big", "small"):
            await world.until_model(name, "warm")
        assert (ollama.loads_started, router.loads_started) == (["weights:latest"] * 2, ["weights"])


async def test_a_model_in_line_for_ollamas_one_loader_does_not_fail_for_being_slow(world: World) -> None:
    """Ollama says nothing of a load that waits; its time counts from when it is its turn."""
    async with FakeOllama("one", "two").running() as ollama:
        ollama.hold_loads()
        model = {"backend": "ollama", "url": ollama.url}
        await world.apply(
            {"first": {**model, "model": "one"}, "second": {**model, "model": "two", "wakeTimeoutMs": 1_000}}
        )
        host = await world.host()
        asks = [await world.submit("first")]
        await seen(ollama.load_seen)
        asks.append(await world.submit("second"))
        await world.until_model("second", "waking")
        over_s = asyncio.get_running_loop().time() + 1.2
        await until(lambda: asyncio.get_running_loop().time() > over_s, what="its wakeTimeoutMs is over")
        assert host.residents.wakers["second"].state == "waking"

        async def says_why() -> bool:
            return (await world.model("second")).reason == "waits for its runtime to end another load"

        await eventually(says_why, what="it says for what it waits")
        ollama.release_loads()
        assert [(await ask.end()).state for ask in asks] == [State.DONE] * 2
        assert ollama.loads_started == ["one:latest", "two:latest"]
        assert host.residents.wakers["second"].reason == ""


async def test_a_model_that_is_removed_while_it_loads_does_not_stay(world: World) -> None:
    """A router goes on loading without us, and would keep it for ever: nobody here knows of it any more."""
    async with cold_runtime("llama.cpp") as (double, model):
        assert isinstance(double, ScriptedRouter)
        await world.apply({"big": {**model, "keepWarm": True}, "other": simulated()})
        host = await world.host()
        await seen(double.load_seen)
        await world.apply({"other": simulated()})
        await chores.sweep(world.store, world.book)
        await until(lambda: "big" not in host.residents.wakers, what="the host knows it no more")
        await until(lambda: double.states["weights"] == "unloaded", what="the router is told to stop")
        double.release_loads()
        await world.until_model("other", "warm")
        assert double.states["weights"] == "unloaded"


async def test_what_cannot_be_unloaded_is_not_called_cold(world: World) -> None:
    """An idle vLLM is put to sleep and wakes for the next request; one that cannot sleep stays what it is: warm."""
    async with ScriptedVllm().running() as sleeper, ScriptedVllm(dev=False).running() as bare:
        model = {"backend": "vllm", "model": "weights", "idleUnloadMs": 300}
        await world.apply({"sleeper": {**model, "url": sleeper.url}, "bare": {**model, "url": bare.url}})
        host = await world.host()
        for name in ("bare", "sleeper"):
            await (await world.submit(name)).end()
        await hosts_forget(world, "bare", "sleeper")
        await world.until_model("sleeper", "cold")
        assert sleeper.steps == ["sleep 1 wait"]
        idle = host.residents.wakers["bare"]
        await until(lambda: idle.idle_ms > 4 * 300, what="the bare one has been idle for long")
        assert idle.state == "warm"
        assert (await (await world.submit("sleeper")).end()).state is State.DONE
        assert sleeper.steps == ["sleep 1 wait", "wake kv_cache weights"]


async def hosts_forget(world: World, *models: str) -> None:
    """Nobody wants these any more: else their last request would, for another minute."""
    for model in models:
        await world.store.command("HSET", world.store.keys.model(model), "wanted_until", "0")
    for host in world.hosts.values():
        await host._fleet.look()


async def test_a_worker_that_is_stopped_just_as_a_load_fails_stops(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a failure and a cancellation in one moment, a task group raises the failure alone: the waker would go on for
    ever, and its worker wait for it."""
    loading, may_fail = asyncio.Event(), asyncio.Event()
    wakers: list[asyncio.Task[None]] = []

    async def fails(runtime: LlamaServer, *, timeout_s: float) -> None:
        loading.set()
        await may_fail.wait()
        asyncio.get_running_loop().call_soon(wakers[0].cancel)
        raise LoadFailed("the runtime went away")

    monkeypatch.setattr(LlamaServer, "load", fails)
    await world.apply({"big": simulated()})
    host = await world.host()
    await seen(loading)
    wakers.append(host.residents._running["big"])
    may_fail.set()
    _, going_on = await asyncio.wait(wakers, timeout=5)
    assert not going_on


async def pid_of(world: World, model: str) -> int:
    async def check() -> int:
        try:
            return int(json.loads((world.state_dir() / f"{model}.pid").read_text())["pid"])
        except (OSError, ValueError):
            return 0

    return await eventually(check, what=f"the server of {model} was started")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
