"""The real llama.cpp hears of a cancel: its connection is closed within a second, and by its own word its slot is idle
long before it would have read the prompt.

It looks for closed connections only after a second in which nobody asked it anything and nothing was done, and then
ends its batch first (small ones here, as in our default command). So nothing asks it for its slots here but the
gateway. Each text of a request for vectors is something done: where one takes less than a second all of them are read,
and its slot settles after the last. So those here are few (one takes about 0.6 s).
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker import jobs
from broker.lifecycle import State
from broker.policy import Policy
from tests.support.live_api import LiveApi, RawClient, live_api
from tests.support.llama_server import llama_command
from tests.support.redis_server import RedisServer
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.waiting import until
from tests.support.wire import Wire
from tests.support.worker_world import World, eventually, worker_world
from workers.runtimes import runtime_for
from workers.runtimes.base import Runtime
from workers.waker import Waker

pytestmark = pytest.mark.real

SOON_S = 1.0
IDLE_S = 12.0
"""A second of silence, a batch, and at most two and a quarter seconds to the next question; four times that, for a
machine that does other things. What is closed here would be at work for longer."""

WORD = "la "
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": WORD * 7_500}], "max_tokens": 4}
DECODING: dict[str, Any] = {
    "messages": [{"role": "user", "content": WORD}], "max_tokens": 8_000, "ignore_eos": True,
}  # fmt: skip
VECTORS: dict[str, Any] = {"input": [WORD * 200] * 6}


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that a prompt takes its time to go through."""
    return write_tiny_gguf(tmp_path_factory.mktemp("weights") / "slow.gguf", megabytes=60)


@dataclass
class Scene:
    """A gateway before a llama-server that somebody else runs, with a wire between them."""

    world: World
    api: LiveApi
    server: Runtime
    wire: Wire
    waker: Waker

    def prompt_read(self) -> int:
        """How many tokens of its prompt the runtime has read for the one attempt."""
        for attempt in self.world.hosts["gpu1"].dispatcher.attempts.values():
            return (attempt._reader.prompt_read or (0, 0))[0]
        return 0


@asynccontextmanager
async def gateway(server: RedisServer, directory: Path, file: Path, *, vectors: bool) -> AsyncIterator[Scene]:
    command = llama_command(pooling="mean" if vectors else "")
    theirs = {"backend": "llama.cpp", "model": str(file), "command": command, "contextTokens": 8192}
    model = Policy.parse(json.dumps({"models": {"m": {**theirs, "embeddings": vectors}}})).models["m"]
    runtime = runtime_for("m", model, state_dir=directory)
    try:
        await runtime.load(timeout_s=20)
        async with (
            Wire(runtime.endpoint().base_url).running() as wire,
            worker_world(server.socket_url, directory / "world") as world,
        ):
            ours = {"backend": "llama.cpp", "model": "any", "url": wire.url, "keepWarm": True, "embeddings": vectors}
            await world.apply({"m": {**ours, "maxConcurrent": 1, "memoryMb": 1}}, headerHoldMs=60_000)
            host = await world.warm_host()
            async with live_api(await world._open("api")) as api:
                yield Scene(world, api, runtime, wire, host.residents.wakers["m"])
    finally:
        await runtime.close()


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("path", "asked", "stream", "state", "delete"),
    [
        ("/v1/chat/completions", CHAT, True, State.CLAIMED, True),
        ("/v1/chat/completions", CHAT, False, State.CLAIMED, False),
        ("/v1/chat/completions", DECODING, False, State.STREAMING, True),
        ("/v1/embeddings", VECTORS, False, State.CLAIMED, False),
        ("/v1/embeddings", VECTORS, False, State.CLAIMED, True),
    ],
    ids=["prompt-stream-delete", "prompt-whole-hang-up", "words-whole-delete", "vectors-hang-up", "vectors-delete"],
)
async def test_a_cancel_frees_its_slot(
    redis_server: RedisServer,
    tmp_path: Path,
    gguf_file: Path,
    path: str,
    asked: dict[str, Any],
    stream: bool,
    state: State,
    delete: bool,
) -> None:
    vectors = path.endswith("embeddings")
    async with gateway(redis_server, tmp_path, gguf_file, vectors=vectors) as scene:
        more = {} if vectors else {"stream": stream}
        scene.wire.clear()  # of the wake and its probe
        client = await RawClient.open(scene.api)
        await client.send("POST", path, json.dumps({"model": "m", **asked, **more}).encode())
        job_id = await at_work(scene, path, state)
        if vectors:
            await eventually(scene.server.busy_slots, what="its texts are read")
        elif state is State.CLAIMED:
            await until(scene.prompt_read, what="some of the prompt was read")

        began_s = time.monotonic()
        if delete:
            async with httpx.AsyncClient(base_url=scene.api.url) as http:
                assert (await http.delete(f"/v1/jobs/{job_id}")).json()["state"] == "cancelled"
            assert await client.head() == 499
        client.close()
        await until(lambda: closed(scene, path), what="the connection to the runtime is closed")
        assert 0 < closed(scene, path)[-1] - began_s < SOON_S
        await until(lambda: scene.waker.slots.idle, what="the slot has settled", timeout_s=IDLE_S)
        assert (await jobs.read(scene.world.store, job_id)).state is State.CANCELLED
        assert await scene.server.busy_slots() == 0

        small = {"input": "la"} if vectors else {"messages": [{"role": "user", "content": "la"}], "max_tokens": 2}
        async with httpx.AsyncClient(base_url=scene.api.url) as http:
            assert (await http.post(path, json={"model": "m", **small})).status_code == 200


def closed(scene: Scene, path: str) -> list[float]:
    """When the worker closed a request at this path."""
    return [at for asked, at in scene.wire.hung_up if asked == path]


async def at_work(scene: Scene, path: str, state: State) -> str:
    """The one job, once the runtime has its request and it is in that state."""
    store = scene.world.store

    async def look() -> str:
        for job_id in await store.command("ZRANGE", store.keys.due, 0, -1):
            if (await jobs.read(store, job_id.decode())).state is state and scene.wire.requests(path):
                found: str = job_id.decode()
                return found
        return ""

    return await eventually(look, what=f"a job is {state}")
