"""The api under a real uvicorn on a free port, in the test's own loop: streaming and hang-ups are as they are.

A `Scene` is such an api with a worker that does what each test says.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import openai

from api.app import Server
from api.gateway import Gateway
from broker import errors, jobs
from broker.callers import Keys
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import JobRecord
from broker.store import Store
from tests.support.scripted_worker import ScriptedWorker, Turn, hello
from tests.support.waiting import POLL_S, until

POLICY = """
headerHoldMs: 400
disconnectGraceMs: 700
models:
  big:
    backend: simulated
    model: weights-big
    maxConcurrent: 2
    maxQueue: 3
    coldStartBudgetMs: 60000
    fallback: small
    aliases: ["qwen/coder:32b"]
  small:
    backend: simulated
    model: weights-small
    maxConcurrent: 2
    maxQueue: 1
  hasty:
    backend: simulated
    model: weights-hasty
    maxWaitMs: 300
    contextTokens: 50
routing:
  - match: { lane: "fast-edit" }
    target: small
"""
SDK: Any = {"x_stainless_lang": "python", "x_stainless_retry_count": "0"}


async def until_true(seen: Callable[[], Awaitable[Any]], *, what: str, timeout_s: float = 5.0) -> Any:
    """Waits for a question that has to be asked over a connection; gives its first true answer."""
    end = asyncio.get_running_loop().time() + timeout_s
    while not (found := await seen()):
        assert asyncio.get_running_loop().time() < end, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)
    return found


class QuietServer(Server):
    """The server without its hands on the signals of the test run."""

    def capture_signals(self) -> Any:
        return nullcontext()


class LiveApi:
    """A running api and its address."""

    def __init__(self, gateway: Gateway, server: Server, port: int) -> None:
        self.gateway = gateway
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.clients: list[RawClient] = []


@asynccontextmanager
async def live_api(
    store: Store, *, keys: str = "", stop_after_s: float = 0.0, origins: str = ""
) -> AsyncIterator[LiveApi]:
    """Runs it for the length of the block; raw clients hang up with it."""
    gateway = Gateway(store, Keys.parse(keys), version="1.2.3", origins=frozenset(origins.split()))
    server = QuietServer(gateway, stop_after_s=stop_after_s)
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listener]), name="uvicorn")
    running = LiveApi(gateway, server, listener.getsockname()[1])
    try:
        await until(lambda: server.started or task.done(), what="the api has started")
        assert not task.done(), task.result()
        yield running
    finally:
        for client in running.clients:
            client.close()
        server.should_exit = True
        await asyncio.wait_for(task, 15)


class RawClient:
    """A client that shows every byte, and that can hang up, stall and send what a well-bred one does not."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(cls, api: LiveApi) -> Self:
        client = cls(*await asyncio.open_connection("127.0.0.1", api.port))
        api.clients.append(client)
        return client

    async def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        """Sends a request; header names are written with underscores."""
        lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self.writer.drain()

    async def chat(self, said: str, *, model: str = "big", stream: bool = True, **headers: str) -> None:
        await self.send("POST", "/v1/chat/completions", chat_body(said, model=model, stream=stream), **headers)

    async def head(self) -> int:
        """Reads status and headers."""
        status, *lines = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 15)).decode().split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return self.status

    async def piece(self) -> bytes:
        """Reads one piece of a chunked body, b"" at its proper end; raises IncompleteReadError where it is cut."""
        size = int((await asyncio.wait_for(self.reader.readuntil(b"\r\n"), 15)).strip(), 16)
        data = await asyncio.wait_for(self.reader.readexactly(size + 2), 15)
        return data[:-2]

    async def body(self) -> bytes:
        """Reads the whole body, however long it says it is."""
        if "content-length" in self.headers:
            return await asyncio.wait_for(self.reader.readexactly(int(self.headers["content-length"])), 15)
        parts = []
        while part := await self.piece():
            parts.append(part)
        return b"".join(parts)

    async def until_said(self, words: bytes) -> bytes:
        """Reads pieces until one of them holds these words; gives everything read."""
        got = b""
        while words not in got:
            part = await self.piece()
            assert part, f"the answer ended without {words!r}: {got!r}"
            got += part
        return got

    def close(self) -> None:
        """Hangs up."""
        self.writer.transport.abort()


def chat_body(said: str, *, model: str = "big", stream: bool = True, **more: Any) -> bytes:
    """A chat request as clients send it."""
    asked = {"model": model, "messages": [{"role": "user", "content": said}], "stream": stream, **more}
    return json.dumps(asked).encode()


@dataclass
class Scene:
    """What a test holds: the api, the worker, and switches for its scripts."""

    store: Store
    api: LiveApi
    worker: ScriptedWorker
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def job(self, job_id: str = "") -> JobRecord:
        return await jobs.read(self.store, job_id or self.worker.seen[-1].id)

    async def until_state(self, job_id: str, *states: State, timeout_s: float = 5) -> JobRecord:
        async def reached() -> JobRecord | None:
            job = await self.job(job_id)
            return job if job.state in states else None

        found: JobRecord = await until_true(reached, what=f"job {job_id} is {states}", timeout_s=timeout_s)
        return found

    async def beat(self, **states: str) -> None:
        """The worker tells its models' states, and the api looks."""
        await self.worker.beat(**states)
        await self.api.gateway.fleet.look()

    async def only_job(self) -> JobRecord:
        """The one job that Redis knows, claimed or not."""
        due = self.store.keys.due
        found = await until_true(lambda: self.store.command("ZRANGE", due, 0, -1), what="a job")
        assert len(found) == 1
        return await self.job(found[0].decode())

    def client(self, **more: Any) -> openai.AsyncOpenAI:
        options = {"base_url": f"{self.api.url}/v1", "api_key": "any", "max_retries": 0, "timeout": 15} | more
        return openai.AsyncOpenAI(**options)  # type: ignore[arg-type]


@asynccontextmanager
async def live_scene(store: Store, *, keys: str = "", policy: str = POLICY) -> AsyncIterator[Scene]:
    """Everything warm, nothing asked for yet."""
    book = PolicyBook(store)
    await book.apply(policy)
    worker = ScriptedWorker(store, book)
    async with worker.running(), live_api(store, keys=keys) as running:
        scene = Scene(store, running, worker)
        worker.scripts = scripts(scene)
        yield scene


def scripts(scene: Scene) -> dict[str, Callable[[Turn], Any]]:
    async def wait(turn: Turn) -> None:
        await scene.go.wait()
        await hello(turn)

    async def pause(turn: Turn) -> None:
        await turn.say("Hello")
        await scene.go.wait()
        await turn.say(" world")
        await turn.finish()

    async def refuse(turn: Turn) -> None:
        await turn.fail(errors.RuntimeRefused("temperature must be below 2", status=422))

    async def break_early(turn: Turn) -> None:
        await turn.fail(errors.RuntimeFailed("the runtime closed the connection"))

    async def break_late(turn: Turn) -> None:
        await turn.say("Hello")
        await scene.go.wait()
        await turn.fail(errors.RuntimeFailed("the runtime closed the connection"))

    async def wait_and_break(turn: Turn) -> None:
        await scene.go.wait()
        await turn.fail(errors.RuntimeFailed("the runtime closed the connection"))

    async def restart(turn: Turn) -> None:
        if turn.record.attempt == 1:
            await turn.say("never to be seen")
            await scene.go.wait()
            return await turn.give_back()
        await hello(turn)

    async def flood(turn: Turn) -> None:
        for number in range(400):
            await turn.say(f"{number} " + "x" * 4_000)
        await turn.finish()

    async def deluge(turn: Turn) -> None:
        for number in range(200):
            await turn.say(f"{number} " + "x" * 100_000)
        await turn.finish()

    return {
        "hello": hello, "wait": wait, "pause": pause, "refuse": refuse, "break_early": break_early, "flood": flood,
        "deluge": deluge, "break_late": break_late, "wait_and_break": wait_and_break, "restart": restart,
    }  # fmt: skip
