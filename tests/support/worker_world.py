"""A gateway without an api: workers and schedulers in this process or as real ones, and a client that speaks broker.

The models are simulated children. `world.runtime(model)` reaches the one that a worker started, to break it and to ask
what it has seen.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from ulid import ULID

from broker import admission, hosts, jobs
from broker.frames import Hub, Restarted
from broker.hosts import Fleet
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import Frame, JobRecord, ModelOnHost
from broker.store import Store
from tests.support.broker_world import new_namespace
from tests.support.waiting import POLL_S, until
from workers.host import Host
from workers.runtimes.base import client_for
from workers.scheduler import Scheduler
from workers.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 12.0

Found = TypeVar("Found")


def simulated(**keys: Any) -> dict[str, Any]:
    """A simulated model for a policy; words of the simulated server go into `options`."""
    return {"backend": "simulated", "model": "pretend", "keepWarm": True, **keys}


def policy(models: dict[str, dict[str, Any]], **more: Any) -> str:
    """A policy file; JSON is YAML too."""
    return json.dumps({"models": models, **more})


async def eventually(check: Callable[[], Awaitable[Found | None]], *, what: str, timeout_s: float = BOUND_S) -> Found:
    """Gives the first true answer of `check`, and fails with `what` if there never is one."""
    end = time.monotonic() + timeout_s
    while not (found := await check()):
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)
    return found


class Ask:
    """One request as the api would hold it: a job and the reader of its frames."""

    def __init__(self, world: "World", job_id: str) -> None:
        self.job_id = job_id
        self.lane = ""
        self.frames: list[Frame] = []
        self.restarts = 0
        self._world = world
        self._reader = world.hub.open(job_id)

    async def next(self, timeout_s: float = BOUND_S) -> Frame:
        """The next frame; those of an attempt that was started again are forgotten."""
        found = await self._reader.next(timeout_s=timeout_s)
        assert found is not None, f"no frame of {self.job_id} within {timeout_s:g} s"
        if isinstance(found, Restarted):
            self.restarts += 1
            self.frames.clear()
            return await self.next(timeout_s)
        self.frames.append(found)
        return found

    async def end(self, timeout_s: float = BOUND_S) -> JobRecord:
        """Reads to the terminal frame; gives the record."""
        try:
            while not (self.frames and self.frames[-1].terminal):
                await self.next(timeout_s)
        finally:
            self._world.hub.close(self._reader)
        return await self.record()

    async def record(self) -> JobRecord:
        return await jobs.read(self._world.store, self.job_id)

    async def until_state(self, *states: State, timeout_s: float = BOUND_S) -> JobRecord:
        """Waits for the job to be in one of these states."""

        async def check() -> JobRecord | None:
            record = await self.record()
            return record if record.state in states else None

        return await eventually(check, what=f"job {self.job_id} is {states}", timeout_s=timeout_s)

    @property
    def said(self) -> dict[str, Any]:
        """What the terminal frame says."""
        assert self.frames[-1].terminal
        told: dict[str, Any] = json.loads(self.frames[-1].data)
        return told

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The answer as its client would parse it."""
        text = b"".join(frame.data for frame in self.frames if not frame.terminal).decode()
        return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]

    @property
    def models(self) -> set[str]:
        """The models that the answer names."""
        return {chunk["model"] for chunk in self.chunks}

    @property
    def text(self) -> str:
        """The words of the answer."""
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


def words(count: int) -> str:
    """What a simulated model answers with so many tokens."""
    return "".join(f" {n}" if n else "simulated" for n in range(count))


class Runtime:
    """The simulated server that a worker of this world started for a model."""

    def __init__(self, state_dir: Path, model: str) -> None:
        self._state_dir = state_dir
        self._model = model

    @property
    def pid(self) -> int:
        return int(json.loads((self._state_dir / f"{self._model}.pid").read_text())["pid"])

    async def break_with(self, **faults: Any) -> None:
        """Changes its faults: `times=1` breaks the next generation only."""
        await self._ask("POST", "/simulated/faults", json=faults)

    async def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self._ask("GET", "/simulated/stats")).json()
        return found

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        port = re.findall(r"on port (\d+)", (self._state_dir / f"{self._model}.log").read_text())[-1]
        url = f"http://127.0.0.1:{port}"
        async with client_for(url) as client:
            response = await client.request(method, url + path, **more)
        return response.raise_for_status()


class Process:
    """A worker or a scheduler as a process of its own."""

    def __init__(self, module: str, environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            self._popen = subprocess.Popen([sys.executable, "-P", "-m", module], env=environment, stderr=out)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        """SIGKILL, and its end is waited for."""
        self._popen.kill()
        self._popen.wait(BOUND_S)

    async def exit(self, timeout_s: float = BOUND_S) -> int:
        """Waits for it to end by itself; gives its exit code."""
        await until(lambda: self._popen.poll() is not None, what=f"the end of {self._log.name}", timeout_s=timeout_s)
        return self._popen.returncode


class World:
    """What a test holds in its hands."""

    def __init__(self, url: str, namespace: str, store: Store, directory: Path) -> None:
        self.url = url
        self.namespace = namespace
        self.store = store
        self.directory = directory
        self.book = PolicyBook(store)
        self.fleet = Fleet(store, self.book)
        self.hub = Hub(store, name="test")
        self.hosts: dict[str, Host] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._stores: list[Store] = []
        self._schedulers: dict[Scheduler, asyncio.Task[None]] = {}
        self._processes: list[Process] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def apply(self, models: dict[str, dict[str, Any]], **more: Any) -> None:
        await self.book.apply(policy(models, **more), by="test")
        await self.fleet.look()

    def settings(self, name: str = "gpu1", *, memory_mb: int | None = None) -> WorkerSettings:
        return WorkerSettings(
            redis_url=self.url,
            namespace=self.namespace,
            host_name=name,
            state_dir=self.state_dir(name),
            memory_mb=memory_mb,
        )

    def state_dir(self, name: str = "gpu1") -> Path:
        return self.directory / name

    async def host(self, name: str = "gpu1", *, memory_mb: int | None = None) -> Host:
        """Runs a worker in this process."""
        store = await self._open(f"worker-{name}")
        host = self.hosts[name] = Host(store, self.settings(name, memory_mb=memory_mb))
        self._running[name] = asyncio.create_task(host.run(), name=f"host {name}")
        await self.until_host(name)
        return host

    async def warm_host(self) -> Host:
        """Runs a worker in this process, and waits until every model that the policy keeps warm is."""
        host = await self.host()
        for name, model in self.book.active.models().items():
            if model.keep_warm:
                await self.until_model(name, "warm")
        return host

    async def until_host(self, name: str = "gpu1") -> None:
        """Waits until a worker has said what its models are."""

        async def check() -> bool:
            await self.fleet.look()
            running = self._running.get(name)
            if running is not None and running.done():
                running.result()
            return name in self.fleet.picture.hosts and all(
                name in self.fleet.picture.on_host.get(model, {})
                for model, m in self.book.active.models().items()
                if m.hosts is None or name in m.hosts
            )

        await eventually(check, what=f"{name} tells its models")

    async def leave(self, name: str = "gpu1") -> None:
        """Stops a worker of this process at once."""
        host = self.hosts.pop(name)
        host.draining = True
        host.dispatcher.stopped = True
        await host.drain()
        await self._running.pop(name)

    async def ended(self, name: str = "gpu1") -> None:
        """Waits for a worker of this process that drains."""
        self.hosts.pop(name)
        await asyncio.wait_for(self._running.pop(name), BOUND_S)

    async def scheduler(self) -> Scheduler:
        """Runs a scheduler in this process, one that has been there for long: it may judge leases at once."""
        store = await self._open("scheduler")
        assert store._wire is not None
        store._wire.opened_at -= 60
        scheduler = Scheduler(store)
        self._schedulers[scheduler] = asyncio.create_task(scheduler.run(), name="scheduler")
        return scheduler

    async def stop_scheduler(self, scheduler: Scheduler) -> None:
        scheduler.stop()
        await self._schedulers.pop(scheduler)

    def process(self, module: str, name: str = "gpu1", **environment: str) -> "Process":
        """Runs `workers.host` or `workers.scheduler` as a process of its own."""
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GATEWAY_REDIS_URL": self.url,
            "GATEWAY_NAMESPACE": self.namespace,
            "GATEWAY_HOST_NAME": name,
            "GATEWAY_STATE_DIR": str(self.state_dir(name)),
            **environment,
        }
        process = Process(module, env, self.directory / f"{module}-{len(self._processes)}.log")
        self._processes.append(process)
        return process

    async def submit(
        self, model: str, *, tokens: int = 3, content: str = "hi", promote_within_ms: int | None = None, **fields: Any
    ) -> Ask:
        """Asks for an answer of so many tokens; the job does not depend on its readers unless `grace_ms` says so."""
        ask = Ask(self, str(ULID()))
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": model, "messages": messages, "max_tokens": tokens, "stream": True}).encode()
        known: dict[str, Any] = {"id": ask.job_id, "asked": model, "stream": True}
        record = JobRecord(**known | fields)
        try:
            admitted = await admission.admit(
                self.store,
                self.book,
                self.fleet,
                record,
                body,
                reader=f"test/{ask.job_id}",
                promote_within_ms=promote_within_ms,
            )
        except BaseException:
            self.hub.close(ask._reader)
            raise
        ask.lane = admitted.lane
        return ask

    async def seen_and_unseen(self, model: str) -> tuple[Ask, Ask]:
        """Two answers of nine words that stop after two: one client has seen these, one waits for the whole."""
        await self.runtime(model).break_with(stall_after_tokens=2)
        seen = await self.submit(model, tokens=9)
        unseen = await self.submit(model, tokens=9, stream=False)
        for ask in (seen, unseen):
            await ask.until_state(State.STREAMING)
        return seen, unseen

    async def model(self, model: str, host: str = "gpu1") -> ModelOnHost:
        """What a host says of a model now."""
        raw = await self.store.hash(self.store.keys.model_on_host(model, host))
        return ModelOnHost.from_hash(raw) if raw else ModelOnHost(state="absent")

    async def until_model(
        self, model: str, *states: str, host: str = "gpu1", timeout_s: float = BOUND_S
    ) -> ModelOnHost:
        """Waits until a host says that a model is in one of these states, and everybody here knows."""

        async def check() -> ModelOnHost | None:
            told = await self.model(model, host)
            return told if told.state in states else None

        try:
            told = await eventually(check, what="", timeout_s=timeout_s)
        except AssertionError:
            raise AssertionError(f"{model}@{host} is {await self.model(model, host)}, not {states}") from None
        for fleet in (self.fleet, *(scheduler._fleet for scheduler in self._schedulers)):
            await fleet.look()
        return told

    async def waiting(self, lane: str) -> int:
        length, held = (await hosts.lane_counts(self.store, [lane]))[lane]
        return length - held

    def runtime(self, model: str, host: str = "gpu1") -> Runtime:
        return Runtime(self.state_dir(host), model)

    async def _open(self, name: str) -> Store:
        store = await Store.open(self.url, namespace=self.namespace, name=name)
        self._stores.append(store)
        return store

    async def _start(self) -> None:
        async def follow() -> None:
            await self.fleet.follow()

        self._tasks = [
            asyncio.create_task(self.hub.run(), name="world hub"),
            asyncio.create_task(follow(), name="world fleet"),
            asyncio.create_task(self.book.follow(), name="world policy"),
        ]
        await asyncio.wait_for(self.hub.listening.wait(), BOUND_S)

    async def _close(self) -> None:
        for process in self._processes:
            process.kill()
        for scheduler in list(self._schedulers):
            await self.stop_scheduler(scheduler)
        for name in list(self.hosts):
            with contextlib.suppress(asyncio.CancelledError):
                await self.leave(name)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for store in self._stores:
            await store.close()
        await self.store.close()


@asynccontextmanager
async def worker_world(url: str, directory: Path) -> AsyncIterator[World]:
    """A namespace of its own on a real server, with a client and no process yet."""
    namespace = new_namespace()
    world = World(url, namespace, await Store.open(url, namespace=namespace, name="test"), directory)
    try:
        await world._start()
        yield world
    finally:
        await world._close()


__all__ = ["Ask", "Process", "Runtime", "World", "eventually", "policy", "simulated", "until", "words", "worker_world"]
