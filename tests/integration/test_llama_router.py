"""llama-server as a router, against a double with a router's traps: a GET that loads, a failed load that looks like an
unloaded model, a load that outlives who asked for it."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.policy import Policy
from tests.support.scripted_runtime import ScriptedLlamaServer, ScriptedRouter
from tests.support.worker_world import eventually
from workers.runtimes import llama_router, runtime_for
from workers.runtimes.base import LoadFailed, ProbeFailed, Runtime, RuntimeUnreachable
from workers.runtimes.process import free_port

BOUND_S = 15.0


@asynccontextmanager
async def runtime_at(url: str, state_dir: Path, model: str = "weights") -> AsyncIterator[Runtime]:
    keys = {"backend": "llama.cpp", "model": model, "url": url, "maxConcurrent": 2}
    runtime = runtime_for("m", Policy.parse(json.dumps({"models": {"m": keys}})).models["m"], state_dir=state_dir)
    try:
        yield runtime
    finally:
        await runtime.close()


@asynccontextmanager
async def router_with(
    state_dir: Path, *models: str, model: str = "weights"
) -> AsyncIterator[tuple[ScriptedRouter, Runtime]]:
    async with ScriptedRouter(*models).running() as router, runtime_at(router.url, state_dir, model) as runtime:
        yield router, runtime


def paths(router: ScriptedRouter) -> set[str]:
    return {call.path for call in router.calls}


async def becomes(ask: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    async def check() -> bool:
        return bool(await ask() == wanted)

    await eventually(check, what=f"{wanted}")


async def test_a_router_loads_answers_and_unloads(tmp_path: Path) -> None:
    async with router_with(tmp_path, "other", "weights") as (router, runtime):
        assert (runtime.kind, runtime.manageable) == ("llama.cpp", False), "nobody has asked it yet"
        assert await runtime.state() == "absent"
        assert runtime.manageable
        await runtime.load(timeout_s=BOUND_S)
        assert (await runtime.state(), router.states) == ("loaded", {"other": "unloaded", "weights": "loaded"})
        assert (runtime.endpoint().slots, runtime.endpoint().query) == (2, "autoload=false")
        assert await runtime.probe(timeout_s=BOUND_S) > 0
        assert await runtime.busy_slots() == 0
        await runtime.load(timeout_s=BOUND_S)
        assert router.loads_started == ["weights"], "a second load of a loaded model asks for nothing"
        await runtime.unload()
        assert (await runtime.state(), router.states["weights"]) == ("absent", "unloaded")
        await runtime.unload()


async def test_no_question_loads_a_model(tmp_path: Path) -> None:
    """On a router any GET that names a model loads it, and may evict another for it."""
    async with router_with(tmp_path, "weights") as (router, runtime):
        assert await runtime.state() == "absent"
        assert await runtime.busy_slots() == 0
        assert await runtime.memory_bytes() is None
        with pytest.raises(ProbeFailed, match="a probe must not load it"):
            await runtime.probe(timeout_s=BOUND_S)
        router.states["weights"] = "sleeping"
        assert (await runtime.state(), await runtime.busy_slots()) == ("absent", 0)
        assert router.loads_started == []
        assert paths(router) == {"/models"}


async def test_the_kind_of_server_is_asked_once_and_again_when_it_was_away(tmp_path: Path) -> None:
    port = free_port()
    async with runtime_at(f"http://127.0.0.1:{port}", tmp_path) as runtime:
        assert await runtime.state() == "unreachable"
        single = ScriptedLlamaServer()
        async with single.server.listening(port):
            assert [await runtime.state() for _ in range(3)] == ["loaded"] * 3
            assert not runtime.manageable
            assert sum(call.path == "/models" for call in single.calls) == 1
        assert await runtime.state() == "unreachable"
        async with ScriptedRouter("weights").server.listening(port):
            assert await runtime.state() == "absent"
            assert runtime.manageable
        assert await runtime.state() == "unreachable"
        assert runtime.endpoint().query == "autoload=false", "a request that reaches it first must not load anything"


async def test_a_server_that_still_starts_is_waited_for_and_then_asked(tmp_path: Path) -> None:
    async with ScriptedLlamaServer().running() as single, runtime_at(single.url, tmp_path) as runtime:
        single.hold_loads()
        load = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="load")
        await becomes(runtime.state, "loading")
        single.release_loads()
        await load
        assert (await runtime.state(), runtime.manageable) == ("loaded", False)


@pytest.mark.parametrize("event", ["status_change", "model_status"])
async def test_a_load_tells_how_far_it_is(tmp_path: Path, event: str) -> None:
    async with router_with(tmp_path, "other", "weights") as (router, runtime):
        router.sse_event = event
        router.hold_loads()
        load = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="load")
        async with asyncio.timeout(BOUND_S):
            await router.load_seen.wait()
        assert (await runtime.state(), await runtime.progress()) == ("loading", None)
        for share in (0.25, 0.75):
            router.say_progress("other", 0.5)
            router.say_progress("weights", share)
            await becomes(runtime.progress, share)
        router.release_loads()
        await load
        assert await runtime.progress() is None


async def test_a_failed_load_is_not_taken_for_an_unloaded_model(tmp_path: Path) -> None:
    """It shows as `unloaded`, as if nobody had asked; waiting for `loaded` would be for ever."""
    async with router_with(tmp_path, "weights") as (router, runtime):
        router.fail_loads = True
        with pytest.raises(LoadFailed, match="could not load weights: its server ended with exit code 1"):
            await runtime.load(timeout_s=300)
        assert await runtime.state() == "absent"
        router.fail_loads = False
        await runtime.load(timeout_s=BOUND_S)
        assert await runtime.state() == "loaded"


async def test_a_load_that_somebody_else_started_is_waited_for(tmp_path: Path) -> None:
    """Whoever asked for it, a router's load goes on, and asking again is refused."""
    async with router_with(tmp_path, "weights") as (router, runtime):
        router.hold_loads()
        first = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="first")
        async with asyncio.timeout(BOUND_S):
            await router.load_seen.wait()
        first.cancel()
        await asyncio.wait({first})
        assert await runtime.state() == "loading"
        second = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="second")
        router.release_loads()
        await second
        assert router.loads_started == ["weights"]


async def test_a_load_that_takes_too_long_is_given_up_on(tmp_path: Path) -> None:
    async with router_with(tmp_path, "weights") as (router, runtime):
        router.hold_loads()
        with pytest.raises(LoadFailed, match=r"did not load weights within 0.3 s"):
            await runtime.load(timeout_s=0.3)
        await runtime.unload()
        assert router.states["weights"] == "unloaded"


async def test_a_router_without_a_free_place_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_router, "FULL_PAUSE_S", 0.02)
    monkeypatch.setattr(llama_router, "FULL_WAIT_S", 0.1)
    async with router_with(tmp_path, "other", "weights") as (router, runtime):
        router.models_max, router.states["other"] = 1, "loaded"
        with pytest.raises(LoadFailed, match="all models that the router may hold are busy: model limit reached"):
            await runtime.load(timeout_s=BOUND_S)
        monkeypatch.setattr(llama_router, "FULL_WAIT_S", BOUND_S)
        load = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="load")
        await asyncio.wait({load}, timeout=0.05)
        router.become("other", "unloaded")
        await load
        assert router.states["weights"] == "loaded"


async def test_a_sleeping_model_is_cold_and_a_load_wakes_it(tmp_path: Path) -> None:
    """Asking the router to load it would be refused: it runs already."""
    async with router_with(tmp_path, "weights") as (router, runtime):
        router.states["weights"] = "sleeping"
        assert await runtime.state() == "absent"
        await runtime.load(timeout_s=BOUND_S)
        assert "/models/load" not in paths(router)
        assert len(router.chat_bodies) == 1 and router.chat_bodies[0]["max_tokens"] == 1


async def test_a_model_that_the_router_lacks_is_named_beside_those_it_has(tmp_path: Path) -> None:
    async with router_with(tmp_path, "one", "two") as (_, runtime):
        with pytest.raises(LoadFailed, match="does not know weights; it has one, two"):
            await runtime.load(timeout_s=BOUND_S)


async def test_an_alias_leads_to_its_model(tmp_path: Path) -> None:
    async with router_with(tmp_path, "weights", model="weights-alias") as (router, runtime):
        router.hold_loads()
        load = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="load")
        async with asyncio.timeout(BOUND_S):
            await router.load_seen.wait()
        router.say_progress("weights", 0.5)
        await becomes(runtime.progress, 0.5)
        router.release_loads()
        await load
        assert (await runtime.state(), router.loads_started) == ("loaded", ["weights"])


async def test_the_child_of_a_local_router_is_measured(tmp_path: Path) -> None:
    """Found by the command line that the router tells; the router itself is somebody else's process."""
    words = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()", f"--alias-{os.getpid()}"]
    child = await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        assert child.stdout is not None
        await child.stdout.readline()
        async with router_with(tmp_path, "weights") as (router, runtime):
            await runtime.load(timeout_s=BOUND_S)
            assert await runtime.memory_bytes() is None
            router.args["weights"] = words
            assert (await runtime.memory_bytes() or 0) > 1 << 20
            assert await runtime.file_bytes() is None
            weights = tmp_path / "weights.gguf"
            await asyncio.to_thread(weights.write_bytes, bytes(1000))
            router.args["weights"] = ["llama-server", "-m", str(weights), "--port", "1"]
            assert await runtime.file_bytes() == 1000, "what a load will need is guessed from it"
    finally:
        child.kill()
        await child.communicate()


async def test_no_router_at_all_is_unreachable(tmp_path: Path) -> None:
    async with router_with(tmp_path, "weights") as (router, runtime):
        await runtime.load(timeout_s=BOUND_S)
        url = router.url
    async with runtime_at(url, tmp_path) as runtime:
        assert await runtime.state() == "unreachable"
        with pytest.raises(RuntimeUnreachable):
            await runtime.probe(timeout_s=1)
