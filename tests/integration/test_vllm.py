"""vLLM against a double with its traps: it is healthy while it sleeps, and keeps whoever asks it then for ever."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.policy import Policy
from tests.support.scripted_runtime import ScriptedVllm
from workers.runtimes import runtime_for, vllm
from workers.runtimes.base import LoadFailed, ProbeFailed, RuntimeProblem, RuntimeUnreachable
from workers.runtimes.process import free_port
from workers.runtimes.vllm import Load, Vllm, read_metrics

BOUND_S = 15.0


@asynccontextmanager
async def vllm_at(url: str, state_dir: Path, **options: Any) -> AsyncIterator[Vllm]:
    keys = {"backend": "vllm", "model": "weights", "url": url, "maxConcurrent": 2, "options": options}
    runtime = runtime_for("m", Policy.parse(json.dumps({"models": {"m": keys}})).models["m"], state_dir=state_dir)
    assert isinstance(runtime, Vllm)
    try:
        yield runtime
    finally:
        await runtime.close()


@asynccontextmanager
async def vllm_of(state_dir: Path, *, dev: bool = True, **options: Any) -> AsyncIterator[tuple[ScriptedVllm, Vllm]]:
    async with ScriptedVllm(dev=dev).running() as server, vllm_at(server.url, state_dir, **options) as runtime:
        yield server, runtime


async def test_it_sleeps_and_wakes(tmp_path: Path) -> None:
    async with vllm_of(tmp_path) as (server, runtime):
        assert (runtime.kind, runtime.local, runtime.manageable) == ("vllm", True, False), "nobody has asked it yet"
        assert (await runtime.state(), runtime.manageable) == ("loaded", True)
        await runtime.load(timeout_s=BOUND_S)
        assert server.steps == [], "it is awake already"
        assert await runtime.probe(timeout_s=BOUND_S) > 0
        assert await runtime.memory_bytes() is None
        await runtime.unload()
        assert (await runtime.state(), server.steps) == ("absent", ["sleep 1 wait"]), "the default aborts what runs"
        await runtime.unload()
        await runtime.load(timeout_s=BOUND_S)
        assert (await runtime.state(), server.steps) == ("loaded", ["sleep 1 wait", "wake kv_cache weights"])


async def test_from_deep_sleep_the_weights_are_read_again_between_the_halves_of_the_wake(tmp_path: Path) -> None:
    """Woken without them it answers, and what it says is noise."""
    async with vllm_of(tmp_path, sleepLevel=2) as (server, runtime):
        await runtime.unload()
        await runtime.load(timeout_s=BOUND_S)
        assert server.steps == ["sleep 2 wait", "wake weights", "rpc reload_weights", "wake kv_cache"]
        assert not server.garbage and await runtime.state() == "loaded"


@pytest.mark.parametrize(("found", "option", "reloads"), [(2, 1, True), (1, 2, False)])
async def test_how_deep_it_sleeps_is_asked_and_not_assumed(
    tmp_path: Path, found: int, option: int, reloads: bool
) -> None:
    """Somebody else may have put it to sleep, at another level than ours."""
    async with vllm_of(tmp_path, sleepLevel=option) as (server, runtime):
        async with vllm_at(server.url, tmp_path, sleepLevel=found) as other:
            await other.unload()
        await runtime.load(timeout_s=BOUND_S)
        assert ("rpc reload_weights" in server.steps) is reloads
        assert not server.garbage


async def test_a_probe_does_not_ask_a_sleeping_one(tmp_path: Path) -> None:
    """It would take the request in and let it wait for ever."""
    async with vllm_of(tmp_path) as (server, runtime):
        await runtime.unload()
        with pytest.raises(ProbeFailed, match="is asleep, and a probe must not wake it"):
            await runtime.probe(timeout_s=BOUND_S)
        assert server.chat_bodies == [] and server.steps == ["sleep 1 wait"]


async def test_a_wake_under_way_is_loading(tmp_path: Path) -> None:
    async with vllm_of(tmp_path) as (server, runtime):
        await runtime.unload()
        server.hold_loads()
        load = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="load")
        async with asyncio.timeout(BOUND_S):
            await server.load_seen.wait()
        assert await runtime.state() == "loading"
        server.release_loads()
        await load
        server.hold_loads()
        await runtime.unload()
        with pytest.raises(LoadFailed, match=r"did not wake within 0.2 s"):
            await runtime.load(timeout_s=0.2)


async def test_without_its_development_endpoints_it_is_used_as_it_is(tmp_path: Path) -> None:
    async with vllm_of(tmp_path, dev=False) as (server, runtime):
        assert (await runtime.state(), runtime.manageable) == ("loaded", False)
        await runtime.load(timeout_s=BOUND_S)
        await runtime.unload()
        assert (await runtime.state(), server.steps) == ("loaded", [])
        assert await runtime.probe(timeout_s=BOUND_S) > 0


async def test_one_that_refuses_to_sleep_says_what_it_lacks(tmp_path: Path) -> None:
    async with vllm_of(tmp_path) as (server, runtime):
        server.sleep_enabled = False
        with pytest.raises(RuntimeProblem, match="was it started with --enable-sleep-mode"):
            await runtime.unload()
        assert not runtime.manageable and await runtime.state() == "loaded"
        assert not runtime.manageable, "asking its state must not make it so again"


async def test_a_wake_short_of_memory_is_told_apart(tmp_path: Path) -> None:
    async with vllm_of(tmp_path) as (server, runtime):
        await runtime.unload()
        server.wake_error = "CUDA out of memory. Tried to allocate 2.00 GiB"
        with pytest.raises(LoadFailed, match="/wake_up was answered CUDA out of memory") as failed:
            await runtime.load(timeout_s=BOUND_S)
        assert failed.value.oom
        server.wake_error = "EngineCore is not there"
        with pytest.raises(LoadFailed) as failed:
            await runtime.load(timeout_s=BOUND_S)
        assert not failed.value.oom


async def test_its_own_figures_say_what_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with vllm_of(tmp_path) as (server, runtime):
        assert await runtime.busy_slots() == 0
        server.active, server.waiting = 2, 3
        assert await runtime.work() == Load(running=2, waiting=3, cache_used=0.25, sleep_level=0)
        assert await runtime.busy_slots() == 5, "what waits in there keeps its slot"
        assert await runtime.busy_slots() == 5
        told = [record.getMessage() for record in caplog.records if "hidden_queue" in record.getMessage()]
        assert len(told) == 1, "a line inside vLLM is one that the gateway cannot see"
        server.active = server.waiting = 0


def test_the_figures_of_several_engines_are_added_up() -> None:
    text = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.1
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 9.5e-01
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 0.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="discard_all"} 1.0
"""
    assert read_metrics(text) == Load(running=3, waiting=4, cache_used=0.95, sleep_level=2)
    assert read_metrics("process_cpu_seconds_total 1.0\n") is None


async def test_an_engine_that_died_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "REFUSED_WAIT_S", 0.2)
    async with vllm_of(tmp_path) as (server, runtime):
        server.dead = True
        assert await runtime.state() == "unreachable"
        with pytest.raises(LoadFailed, match="no vLLM answers"):
            await runtime.load(timeout_s=300)


async def test_no_vllm_at_all_is_given_up_on_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "REFUSED_WAIT_S", 0.2)
    async with vllm_at(f"http://127.0.0.1:{free_port()}", tmp_path) as runtime:
        assert await runtime.state() == "unreachable"
        with pytest.raises(LoadFailed, match="it does not listen before its engine is up"):
            await runtime.load(timeout_s=300)
        with pytest.raises(RuntimeUnreachable):
            await runtime.probe(timeout_s=1)
        with pytest.raises(RuntimeUnreachable):
            await runtime.unload()
        assert await runtime.busy_slots() is None
