"""The traps that corrupt results: on every runtime, an answer that only looks whole ends as a failed job."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker import lanes
from broker.lifecycle import State
from broker.policy import Policy
from broker.records import Frame, JobRecord
from tests.support.broker_world import World, fake_world
from tests.support.fake_ollama import FakeOllama
from tests.support.llama_server import llama_command
from tests.support.scripted_runtime import (
    BREAKS,
    TRAPS,
    ScriptedLlamaServer,
    ScriptedRouter,
    ScriptedRuntime,
    ScriptedVllm,
)
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.worker_world import eventually
from workers.attempt import Attempt, Ended, Limits
from workers.runtimes import runtime_for
from workers.runtimes.base import Runtime
from workers.stream_client import StreamClient

BOUND_S = 15.0
LOSSES = 2
DOUBLES: dict[str, tuple[str, Callable[[], ScriptedRuntime]]] = {
    "ollama": ("ollama", lambda: FakeOllama("weights")),
    "llama-server": ("llama.cpp", ScriptedLlamaServer),
    "router": ("llama.cpp", lambda: ScriptedRouter("weights")),
    "vllm": ("vllm", ScriptedVllm),
}


class Bench:
    """A job in a lane, and a loaded runtime that a real attempt asks."""

    def __init__(self, world: World, double: ScriptedRuntime, runtime: Runtime) -> None:
        self.world = world
        self.double = double
        self.runtime = runtime
        self.client = StreamClient()
        self.job_id = ""
        self.attempt: Attempt
        self.ended: list[Ended] = []

    async def serve(self, *, first_token_ms: int = 60_000, **body: Any) -> JobRecord:
        """Claims the job again and again until it has ended; gives its record."""
        asked = {"model": "big", "messages": [{"role": "user", "content": "hi"}], "stream": True, **body}
        self.job_id = await self.world.submit("big", stream=True, reader="api1/r1", body=json.dumps(asked).encode())
        self.ended.clear()
        while True:
            waiting = await self.world.waiting(self.job_id)
            claimed = await lanes.claim(self.world.store, self.world.book.active, waiting, host="gpu1", boot="boot1")
            limits = Limits(first_token_ms, 60_000, max_losses=LOSSES)
            attempt = Attempt(
                self.world.store, self.client, claimed, self.runtime.endpoint(), limits, served_by="big@gpu1"
            )
            self.attempt = attempt
            self.ended.append(await attempt.run())
            record = await self.world.job(self.job_id)
            if record.state is not State.QUEUED:
                return record

    async def log(self) -> list[Frame]:
        return await self.world.log(self.job_id)


@asynccontextmanager
async def bench_of(name: str, state_dir: Path) -> AsyncIterator[Bench]:
    backend, make = DOUBLES[name]
    async with fake_world() as world, make().running() as double:
        await world.apply()
        await world.warm(big=2)
        async with loaded(state_dir, backend=backend, model="weights", url=double.url) as runtime:
            bench = Bench(world, double, runtime)
            yield bench
            bench.client.close()


@asynccontextmanager
async def loaded(state_dir: Path, **keys: Any) -> AsyncIterator[Runtime]:
    model = Policy.parse(json.dumps({"models": {"m": keys}})).models["m"]
    runtime = runtime_for("m", model, state_dir=state_dir)
    try:
        await runtime.load(timeout_s=BOUND_S)
        yield runtime
    finally:
        await runtime.close()


@pytest.mark.parametrize("name", DOUBLES)
@pytest.mark.parametrize("trap", [*TRAPS, *BREAKS])
async def test_an_answer_that_only_looks_whole_is_a_failed_job(name: str, trap: str, tmp_path: Path) -> None:
    """Under a 200, and with a clean end or a `[DONE]` where the runtime sends one. A part that was seen is kept and
    its client told; nothing that was not seen is delivered, and tried again at most so often."""
    async with bench_of(name, tmp_path) as bench:
        bench.double.trap = trap
        record = await bench.serve()

        log = await bench.log()
        assert (record.state, record.error) == (State.FAILED, "runtime_failed")
        assert [frame.kind for frame in log if frame.terminal] == ["failed"]
        told = json.loads(log[-1].data)
        assert told["code"] == "runtime_failed" and told["message"]
        if trap == "role only":
            assert [frame.kind for frame in log] == ["failed"], "a role is no first token"
            assert [ended.outcome for ended in bench.ended] == ["released"] * LOSSES + ["failed"]
            assert record.first_token_at == 0
        else:
            assert [ended.outcome for ended in bench.ended] == ["failed"], "its client has seen a part"
            assert b" the" in log[0].data if trap == "repeated token" else b'"content"' in log[0].data
        assert all(b"proxy error" not in frame.data for frame in log if not frame.terminal)
        assert all(b"[DONE]" not in frame.data for frame in log)

        bench.double.trap = ""
        record = await bench.serve()
        assert (record.state, len(bench.ended)) == (State.DONE, 1)


@pytest.mark.parametrize("name", DOUBLES)
@pytest.mark.parametrize("trap", ["silent end", "text error", "swallowed error", "error + [DONE]"])
async def test_one_that_breaks_before_its_first_token_is_tried_again_and_then_failed(
    name: str, trap: str, tmp_path: Path
) -> None:
    async with bench_of(name, tmp_path) as bench:
        bench.double.trap, bench.double.after = trap, 0
        record = await bench.serve()
        assert (record.state, record.error, record.losses) == (State.FAILED, "runtime_failed", LOSSES + 1)
        assert [ended.outcome for ended in bench.ended] == ["released"] * LOSSES + ["failed"]
        assert [frame.kind for frame in await bench.log()] == ["failed"]
        assert len(bench.double.chat_bodies) == LOSSES + 1


@pytest.mark.parametrize("name", DOUBLES)
async def test_a_server_that_is_healthy_and_makes_no_token_is_a_failed_job(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its role chunk, and the progress of its prompt where there is one, come at once: neither is a first token."""
    monkeypatch.setattr("workers.attempt.LOOK_EVERY_S", 0.05)
    async with bench_of(name, tmp_path) as bench:
        bench.double.mute, bench.double.prefill_steps = True, 3
        assert await bench.runtime.state() == "loaded"
        record = await bench.serve(first_token_ms=200)
        assert (record.state, record.error, record.first_token_at) == (State.FAILED, "runtime_failed", 0)
        told = json.loads((await bench.log())[-1].data)
        assert told["message"].startswith("no first token within 0.2 s") and told["status"] == 504


@pytest.mark.parametrize("name", DOUBLES)
async def test_what_a_runtime_is_asked(name: str, tmp_path: Path) -> None:
    """Always for a stream: a closed connection is only noticed while one is written. None of the client's headers."""
    async with bench_of(name, tmp_path) as bench:
        assert (await bench.serve(stream=False)).state is State.DONE
        assert bench.double.chat_bodies[-1]["stream"] is True
        assert bench.double.chat_bodies[-1]["model"] == "weights"
        allowed = {"host", "content-type", "accept", "content-length"}
        assert bench.double.headers[-1].keys() <= allowed, "X-Conversation-Id would outlive a hang-up"


@pytest.mark.parametrize("name", ["ollama", "router", "vllm"])
async def test_a_model_that_the_runtime_lost_is_not_the_requests_fault(name: str, tmp_path: Path) -> None:
    """Deleted, or unloaded by somebody else: the job goes back into its lane and the runtime is looked at, instead of
    telling every client in turn that its request was wrong. And none of them loads it behind the gateway's back."""
    async with bench_of(name, tmp_path) as bench:
        double = bench.double
        if isinstance(double, FakeOllama):
            double.digests.clear()
        elif isinstance(double, ScriptedRouter):
            double.become("weights", "unloaded")
        elif isinstance(double, ScriptedVllm):
            double.name = "other"
        record = await bench.serve()
        assert (record.state, record.error) == (State.FAILED, "runtime_failed")
        assert [ended.outcome for ended in bench.ended] == ["released"] * LOSSES + ["failed"]
        assert all(ended.suspect for ended in bench.ended)
        assert "the runtime does not have the model now" in json.loads((await bench.log())[-1].data)["message"]
        if isinstance(double, ScriptedRouter):
            assert double.states["weights"] == "unloaded" and double.loads_started == ["weights"]


async def test_vllms_own_admission_is_asked_again(tmp_path: Path) -> None:
    async with bench_of("vllm", tmp_path) as bench:
        assert isinstance(bench.double, ScriptedVllm)
        bench.double.refuse_new = True
        record = await bench.serve()
        assert (record.state, record.error, record.losses) == (State.FAILED, "runtime_failed", LOSSES + 1)
        assert "503: The engine is currently busy" in json.loads((await bench.log())[-1].data)["message"]
        bench.double.refuse_new = False
        assert (await bench.serve()).state is State.DONE


async def test_a_routers_unload_in_the_middle_of_an_answer_is_no_success(tmp_path: Path) -> None:
    """It kills what streams, with a line of text in the middle of a 200 that then ends cleanly."""
    async with bench_of("router", tmp_path) as bench:
        router = bench.double
        assert isinstance(router, ScriptedRouter)
        serving = asyncio.create_task(bench.serve(max_tokens=10**6), name="serve")

        async def streaming() -> bool:
            return bool(bench.job_id) and (await bench.world.job(bench.job_id)).state is State.STREAMING

        await eventually(streaming, what="the answer has begun")
        await bench.runtime.unload()
        record = await serving
        assert (record.state, record.error) == (State.FAILED, "runtime_failed")
        assert (
            json.loads((await bench.log())[-1].data)["message"]
            == "the runtime says: proxy error: Failed to read connection"
        )


async def test_a_client_cannot_make_an_ollama_load_again(tmp_path: Path) -> None:
    """Mixed clients with a num_ctx of their own each would have it load the model with every request."""
    async with bench_of("ollama", tmp_path) as bench:
        options = {"num_ctx": 9216, "num_gpu": 0, "temperature": 0}
        record = await bench.serve(keep_alive="5m", num_ctx=8192, options=options, user="ann")
        assert record.state is State.DONE
        asked = bench.double.chat_bodies[-1]
        assert asked["options"] == {"temperature": 0} and asked["user"] == "ann"
        assert asked.keys().isdisjoint({"keep_alive", "num_ctx"})


@pytest.mark.parametrize("name", ["llama-server", "router"])
async def test_a_prompt_that_is_still_being_read_is_no_first_token(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its progress shows that the runtime works, in the words of a failure; no client is sent any of it."""
    monkeypatch.setattr("workers.attempt.LOOK_EVERY_S", 0.05)
    async with bench_of(name, tmp_path) as bench:
        bench.double.prefill_steps = 4
        assert (await bench.serve()).state is State.DONE
        assert bench.double.chat_bodies[-1]["return_progress"] is True
        assert all(b"prompt_progress" not in frame.data for frame in await bench.log())
        bench.double.mute = True
        await bench.serve(first_token_ms=200)
        told = json.loads((await bench.log())[-1].data)["message"]
        assert told == "no first token within 0.2 s; the runtime has read 24 of 32 prompt tokens"


async def test_the_real_llama_cpp_tells_its_progress_and_its_cache(tmp_path: Path) -> None:
    """Nothing of the progress reaches the client; a second turn finds the prompt of the first in the slot's cache."""
    weights = write_tiny_gguf(tmp_path / "tiny.gguf")
    keys = {"model": str(weights), "command": llama_command(), "contextTokens": 4096}
    async with fake_world() as world, loaded(tmp_path, backend="llama.cpp", **keys) as runtime:
        await world.apply()
        await world.warm(big=2)
        bench = Bench(world, ScriptedLlamaServer(), runtime)
        message = {"role": "user", "content": "tell me more " * 100}
        usages = []
        for _ in range(2):
            record = await bench.serve(messages=[message], max_tokens=3)
            assert record.state is State.DONE
            read, total = bench.attempt._reader.prompt_read or (0, 0)
            assert 500 < read <= total, "it was asked to tell, and does"
            assert all(b"prompt_progress" not in frame.data for frame in await bench.log())
            usages.append(json.loads(record.usage))
        first, second = usages
        assert first["cached_tokens"] == 0
        assert second["prompt_tokens"] - 16 < second["cached_tokens"] < second["prompt_tokens"]
        bench.client.close()
