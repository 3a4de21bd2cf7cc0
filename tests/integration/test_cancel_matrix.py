"""Nobody wants the answer any more: every endpoint, in every state, by every way to leave it, as its runtime sees it.

What is run is `tests.support.cancel_table`; a new endpoint of the product is not in there and fails the first test.
"""

import asyncio
import gc
import json
import math
import os
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.routes import chat as chat_module
from api.routes.chat import ChatCompletions
from broker import jobs
from broker.lifecycle import State
from broker.records import JobRecord
from tests.support.cancel_table import ASKS, DIALECTS, GRACE_S, HOLD_S, IMPOSSIBLE, NO_GENERATION, Cell, cells, table
from tests.support.held_runtime import Held, HeldLlamaServer, HeldOllama, HeldVllm, Holding, prompt
from tests.support.invariants import take, violations
from tests.support.live_api import LiveApi, RawClient, live_api
from tests.support.redis_server import RedisServer
from tests.support.starvation import Starvation
from tests.support.waiting import until
from tests.support.worker_world import World, eventually, worker_world
from workers import upkeep
from workers.asking import OWN, THROUGH

pytestmark = pytest.mark.real

SOON_S = 1.0
"""What the promise gives the gateway, from the DELETE or hang-up, or from the end of the grace. Time for which this
process or Redis was not let onto a core comes on top."""

CELL_S_MAX = 40.0
CELLS_PER_PLACE = 24
TURNS = 6
"""So many cells do something at one moment, the others wait for a grace or for a slot: all is one process, and what is
to be timed must not stand in line behind fifty others."""

FAILED_MAX = 12
"""More of them say nothing new, and each may take its time."""


def routes(kind: type[ChatCompletions] = ChatCompletions) -> set[str]:
    """The paths of the api's generation endpoints."""
    found = {kind.path} if kind.__module__.startswith("api.") else set()
    return found.union(*(routes(sub) for sub in kind.__subclasses__()))


def test_every_endpoint_is_in_the_table() -> None:
    """Whoever adds one says here how it is asked, and every cell of it is run."""
    assert set(ASKS) == set(OWN) | set(THROUGH) == routes() - NO_GENERATION
    run = {(cell.path, cell.own) for cell in cells()}
    assert run == {(path, True) for path in OWN} | {(path, False) for path in THROUGH}


@pytest.mark.parametrize("reason", IMPOSSIBLE)
def test_no_reason_is_empty(reason: str) -> None:
    """One that excuses nothing, or only what another excuses, is a leftover."""
    others = [other for words, other in IMPOSSIBLE.items() if words != reason]
    assert any(IMPOSSIBLE[reason](cell) and not any(other(cell) for other in others) for cell in table())


# --- the gateway -------------------------------------------------------------------------------------------------

DOUBLES: dict[str, Callable[[], Holding]] = {
    "llama": HeldLlamaServer,
    "llama vectors": HeldLlamaServer,
    "vllm": HeldVllm,
    "ollama": lambda: HeldOllama("weights"),
    "ollama vectors": lambda: HeldOllama("weights"),
}


@dataclass
class Place:
    """A model with one slot, and its runtime."""

    model: str
    double: Holding


@dataclass
class Scene:
    """A gateway with a place for many cells at once."""

    world: World
    api: LiveApi
    http: httpx.AsyncClient
    turns: asyncio.Semaphore
    places: dict[str, list[Place]]
    redis_pid: int

    async def ask(self, place: Place, cell: Cell, stage: str, name: str, **headers: str) -> RawClient:
        """Sends a request of the cell's endpoint that is answered up to a stage."""
        asked = {"model": place.model, "stream": cell.stream} if not cell.vectors else {"model": place.model}
        body = json.dumps(asked | ASKS[cell.path](prompt(stage, name))).encode()
        client = await RawClient.open(self.api)
        await client.send("POST", cell.path, body, x_cell=name, **headers)
        return client

    async def held(self, place: Place, name: str) -> Held:
        """The request as the runtime has it, once it is answered as far as it may be."""
        await until(lambda: name in place.double.held, what=f"{name} reaches the runtime")
        found = place.double.held[name]
        await asyncio.wait_for(found.reached.wait(), 5)
        return found

    async def newest_job(self, place: Place, count: int) -> str:
        """The job that came last into the lane, once it holds so many."""
        lane = self.world.store.keys.lane(place.model)

        async def look() -> str:
            entries = await self.world.store.command("XRANGE", lane, "-", "+")
            if len(entries) < count:
                return ""
            fields = entries[-1][1]
            found: bytes = dict(zip(fields[::2], fields[1::2], strict=True))[b"job"]
            return found.decode()

        return await eventually(look, what=f"{count} jobs in lane {place.model}")

    async def job(self, job_id: str) -> JobRecord:
        return await jobs.read(self.world.store, job_id)

    async def until_state(self, job_id: str, state: State, *, timeout_s: float = 5.0) -> JobRecord:
        async def look() -> JobRecord | None:
            job = await self.job(job_id)
            return job if job.state is state else None

        return await eventually(look, what=f"job {job_id} is {state}", timeout_s=timeout_s)

    def upstream_began(self, job_id: str) -> bool:
        """Whether the worker has the headers of the runtime's answer."""
        attempts = self.world.hosts["gpu1"].dispatcher.attempts
        attempt = next((a for (job, _), a in attempts.items() if job == job_id), None)
        return attempt is not None and attempt._exchange is not None and attempt._exchange.status == 200

    def present(self, name: str) -> bool:
        """Whether the api still serves this client."""
        return any(exchange.header(b"x-cell") == name for exchange in self.api.gateway.exchanges)


@asynccontextmanager
async def gateway(server: RedisServer, directory: Path, counts: dict[str, int], **policy: Any) -> AsyncIterator[Scene]:
    """A gateway with so many places of each kind."""
    places = {
        kind: [Place(f"{kind.replace(' ', '-')}-{number}", DOUBLES[kind]()) for number in range(count)]
        for kind, count in counts.items()
    }
    async with all_running([place.double for found in places.values() for place in found]):
        async with worker_world(server.socket_url, directory) as world:
            models = {place.model: _model(kind, place) for kind, found in places.items() for place in found}
            await world.apply(models, **policy)
            await world.scheduler()
            await world.warm_host()
            async with (
                live_api(await world._open("api")) as api,
                httpx.AsyncClient(base_url=api.url, timeout=10) as http,
            ):
                yield Scene(world, api, http, asyncio.Semaphore(TURNS), places, server.pid)


def _model(kind: str, place: Place) -> dict[str, Any]:
    backend = "llama.cpp" if kind.startswith("llama") else kind.split(" ")[0]
    known = {"backend": backend, "model": "weights", "url": place.double.url, "keepWarm": True, "memoryMb": 1}
    if backend == "ollama":
        known["settleMs"] = 200  # it tells nobody when it is idle
    return {**known, "maxConcurrent": 1, "embeddings": kind.endswith("vectors")}


@asynccontextmanager
async def all_running(doubles: list[Holding]) -> AsyncIterator[None]:
    """Runs them beside each other, so that a failure is not told once for each."""
    stop = asyncio.Event()

    async def serve(double: Holding) -> None:
        async with double.running():
            await stop.wait()

    async with asyncio.TaskGroup() as tasks:
        for double in doubles:
            tasks.create_task(serve(double), name="double")
        try:
            await until(lambda: all(double.url for double in doubles), what="all runtimes listen")
            yield
        finally:
            stop.set()


# --- one cell ----------------------------------------------------------------------------------------------------


REACHED = {"queued": State.QUEUED, "claimed": State.CLAIMED, "prefill": State.CLAIMED, "streaming": State.STREAMING}


@dataclass
class Asked:
    """A cell's request and what came of it."""

    client: RawClient
    job_id: str
    held: Held | None  # the runtime has it
    before: RawClient | None  # who holds the slot that it waits for
    said: bytes  # what the client has heard
    sent_s: float  # when it was sent, on the loop's clock


async def run(scene: Scene, place: Place, cell: Cell, *, grace_s: float) -> None:
    """Brings a job into the state, leaves it, and looks at the runtime, the job, the client and the slot."""
    name, end = cell.name, cell.end
    async with scene.turns:
        asked = await bring(scene, place, cell)
    if end.told and not cell.heard_some:
        assert await asked.client.head() == 200
    async with scene.turns:
        starved = Starvation(os.getpid(), scene.redis_pid)
        began_ms, began_s = await scene.world.store.now_ms(), asyncio.get_running_loop().time()
        await leave(scene, cell, asked)
        if end.keep:
            await go_on(scene, place, asked)
        elif not grace_s:
            await gone(scene, asked, began_s, began_ms, 0.0, starved)
    if grace_s:
        await gone(scene, asked, began_s, began_ms, grace_s, starved)
    if asked.before is not None:
        place.double.held[f"{name}.before"].go.set()
        await whole(asked.before)
        if end.keep:
            await scene.until_state(asked.job_id, State.DONE)
    await whole(await scene.ask(place, cell, "no", f"{name}.after"))
    assert (name in place.double.held) == (cell.state != "queued" or end.keep), "what the runtime was asked"
    assert not place.double.overlaps, f"the runtime was asked before its slot had settled: {place.double.overlaps}"


async def bring(scene: Scene, place: Place, cell: Cell) -> Asked:
    """Sends the request, and waits for its job to be in the state."""
    name, before = cell.name, None
    if cell.state == "queued":
        before = await scene.ask(place, cell, "prefill", f"{name}.before")
        await scene.held(place, f"{name}.before")
    headers = {key: value.format(cell=name) for key, value in cell.end.headers.items()}
    sent_s = asyncio.get_running_loop().time()
    client = await scene.ask(place, cell, "no" if before else cell.state, name, **headers)
    job_id = await scene.newest_job(place, 2 if before else 1)
    held = None if before else await scene.held(place, name)
    await scene.until_state(job_id, REACHED[cell.state])
    if cell.state == "prefill":
        await until(lambda: scene.upstream_began(job_id), what="the worker has the runtime's headers")
    said = b""
    if cell.heard_some:
        assert await client.head() == 200
        said = await client.until_said(b"Hello")
    return Asked(client, job_id, held, before, said, sent_s)


async def leave(scene: Scene, cell: Cell, asked: Asked) -> None:
    """Hangs up, or has somebody else cancel the job, which its client is told."""
    if cell.end.delete:
        answer = await scene.http.delete(f"/v1/jobs/{asked.job_id}")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        await hear(cell, asked)
    else:
        asked.client.close()
        await until(lambda: not scene.present(cell.name), what="the api sees the hang-up")


async def gone(scene: Scene, asked: Asked, began_s: float, began_ms: int, grace_s: float, starved: Starvation) -> None:
    """The runtime is rid of the request, and the job is cancelled: when the grace is over, and soon then."""
    if asked.held is not None:
        await asyncio.wait_for(asked.held.over.wait(), grace_s + 5)
        assert asked.held.closed_s is not None
        within(asked.held.closed_s - began_s, grace_s, starved, "the runtime's connection is closed")
    job = await scene.until_state(asked.job_id, State.CANCELLED, timeout_s=grace_s + 5)
    within((job.ended_at - began_ms) / 1000, grace_s, starved, "the job ends")
    assert job.error == "cancelled"


def within(took_s: float, grace_s: float, starved: Starvation, what: str) -> None:
    """Not before the grace is over, and within SOON_S of that."""
    assert grace_s - 0.002 <= took_s, f"{what} {took_s:.3f} s after: too soon, a retry could still come"
    limit_s = grace_s + SOON_S + starved.seconds
    assert took_s <= limit_s, f"{what} {took_s:.3f} s after: {limit_s:.3f} s is the limit"


async def hear(cell: Cell, asked: Asked) -> None:
    """What the client is told of a DELETE by somebody else: a status, words in its stream, or a cut connection."""
    client, told_to_wait = asked.client, cell.end.told
    in_band = cell.heard_some or told_to_wait
    if not in_band:
        status = await client.head()
        if status == 200 and asyncio.get_running_loop().time() - asked.sent_s > HOLD_S:
            in_band = told_to_wait = True  # on a busy machine its hold was over before we came to the DELETE
        else:
            assert status == 499
    if told_to_wait and not cell.stream:  # after a 200 nothing else is honest
        with pytest.raises(asyncio.IncompleteReadError):
            await client.body()
        return
    told = DIALECTS[cell.path](asked.said + await client.body(), in_band=in_band)
    assert (told["code"], told["message"]) == ("cancelled", "cancelled by its caller")
    client.close()


async def go_on(scene: Scene, place: Place, asked: Asked) -> None:
    """A job that is to be kept has nobody left, and ends well."""
    store, job = scene.world.store, await scene.job(asked.job_id)
    assert job.live and job.abandon_at == 0
    assert not await store.command("EXISTS", store.keys.readers(asked.job_id))
    if asked.held is not None:
        assert asked.held.closed_s is None
        asked.held.go.set()
        await scene.until_state(asked.job_id, State.DONE)


async def whole(client: RawClient) -> None:
    """Reads a good answer to its end."""
    assert await client.head() == 200
    body = await client.body()
    assert b"world" in body or b"0.5" in body, body
    client.close()


# --- all cells ---------------------------------------------------------------------------------------------------


@pytest.fixture
def short_pauses() -> Iterator[None]:
    """The collector leaves alone what pytest and all other tests have imported, as in our processes: one look at that
    takes half a second on a machine that does other things."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # what another test left open is not ours to be told of
        gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("short_pauses")
async def test_every_cell(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once, each on a model with one slot, which has to be free again for the next one."""
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 1.0)
    monkeypatch.setattr(chat_module, "WHOLE_HOLD_S", HOLD_S)
    todo: dict[str, deque[Cell]] = {}
    for cell in cells():
        todo.setdefault(cell.double, deque()).append(cell)
    counts = {kind: math.ceil(len(found) / CELLS_PER_PLACE) for kind, found in todo.items()}
    failed: list[str] = []

    async def serve(scene: Scene, place: Place, left: deque[Cell]) -> None:
        while left and len(failed) < FAILED_MAX:
            cell = left.popleft()
            try:
                await asyncio.wait_for(run(scene, place, cell, grace_s=cell.grace_s), CELL_S_MAX)
            except (AssertionError, TimeoutError, OSError, EOFError, KeyError, ValueError) as problem:
                failed.append(f"{cell.name} on {place.model}: {problem!r}")
                place.double.overlaps.clear()
                for held in place.double.held.values():
                    held.go.set()

    policy = {"headerHoldMs": round(HOLD_S * 1000), "disconnectGraceMs": round(GRACE_S * 1000)}
    async with gateway(redis_server, tmp_path, counts, **policy) as scene:
        async with asyncio.TaskGroup() as tasks:
            for kind, found in todo.items():
                for place in scene.places[kind]:
                    tasks.create_task(serve(scene, place, found), name=place.model)
        assert not failed, "\n".join(failed)
        await nothing_is_left(scene)


async def test_the_grace_of_a_policy_that_names_none(redis_server: RedisServer, tmp_path: Path) -> None:
    """Four seconds."""
    cell = Cell("/v1/chat/completions", own=True, stream=True, state="prefill", way="hang-up, SDK")
    async with gateway(redis_server, tmp_path, {cell.double: 1}) as scene:
        await run(scene, scene.places[cell.double][0], cell, grace_s=4.0)
        await nothing_is_left(scene)


async def nothing_is_left(scene: Scene) -> None:
    """Neither in Redis nor in a process."""
    host, api = scene.world.hosts["gpu1"], scene.api.gateway
    await until(lambda: not api.exchanges and not host.dispatcher.busy, what="nobody is at work")
    left = await take(scene.world.store)
    assert not violations(left)
    assert not left.due and not any(stream.entries for stream in left.lanes.values())
    for pattern in ("readers:<id>", "idem:<caller>:<key>", "retries:<caller>:<session>", "job:<id>:request"):
        assert not left.of(pattern), pattern
    assert not api.readers._stays and not api.hub._readers
    assert all(waker.slots.idle for waker in host.residents.wakers.values())
