"""The parts of a gateway, each started alone by its own command against one Redis, as on several machines."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from broker.policies import PolicyBook
from broker.store import Store
from tests.support.gateway_process import GatewayProcess, tells_no_traceback
from tests.support.redis_server import RedisServer, start_server
from tests.support.worker_world import Runtime

START_S_MAX = 60.0


class Parts:
    """A Redis, and by name any number of apis, workers and schedulers: `api1`, `worker2`, `scheduler1`."""

    def __init__(self, directory: Path, redis: RedisServer) -> None:
        self.directory = directory
        self.redis = redis
        self.running: dict[str, GatewayProcess] = {}
        self.ports: dict[str, int] = {}
        self.said: list[str] = []

    @property
    def url(self) -> str:
        return self.api("api1")

    def api(self, name: str) -> str:
        """Where an api listens."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def start(self, name: str) -> None:
        """Starts a part, or starts it again; an api keeps its port, a worker its host name and its directory."""
        kind = name.rstrip("0123456789")
        settings = {"GATEWAY_REDIS_URL": self.redis.url, "GATEWAY_STATE_DIR": str(self.directory / name)}
        if kind == "api":
            self.ports.setdefault(name, _free_port())
            settings["GATEWAY_BIND"] = f"127.0.0.1:{self.ports[name]}"
        if kind == "worker":
            settings["GATEWAY_HOST_NAME"] = name
        self.running[name] = GatewayProcess(kind, **settings)

    def kill(self, name: str) -> None:
        """SIGKILL, and nothing starts it again by itself."""
        if name == "redis":
            self.redis.kill()
            return
        part = self.running.pop(name)
        part.kill()
        self.said.append(f"--- {name}, killed\n{part.output}")

    def runtime(self, worker: str, model: str) -> Runtime:
        """The simulated server that a worker started for a model."""
        return Runtime(self.directory / worker, model)

    async def until_ready(self, name: str = "api1") -> None:
        """Waits until an api says that somebody can serve."""
        end = time.monotonic() + START_S_MAX
        async with httpx.AsyncClient(timeout=2.0) as http:
            while True:
                try:
                    if (await http.get(f"{self.api(name)}/readyz")).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                assert time.monotonic() < end, f"{name} is not ready: {self.outputs()}"
                await asyncio.sleep(0.05)

    async def until_warm(self, *models: str, workers: tuple[str, ...] = ("worker1",)) -> None:
        """Waits until these workers have these models warm, and the apis have had time to see it."""
        store = await Store.open(self.redis.url, name="waits")
        try:
            end = time.monotonic() + START_S_MAX
            for worker in workers:
                for model in models:
                    key = store.keys.model_on_host(model, worker)
                    while await store.command("HGET", key, "state") != b"warm":
                        assert time.monotonic() < end, f"{model}@{worker} is not warm: {self.outputs()}"
                        await asyncio.sleep(0.05)
        finally:
            await store.close()
        for name in self.ports:
            await self.until_ready(name)

    def outputs(self) -> str:
        """What every part has said."""
        return "\n".join([*self.said, *(f"--- {name}\n{part.output}" for name, part in self.running.items())])

    def close(self) -> None:
        for part in self.running.values():
            part.end()
        self.redis.close()


@asynccontextmanager
async def parts(directory: Path, policy: str, *names: str) -> AsyncIterator[Parts]:
    """A Redis with a policy, and these parts."""
    found = Parts(directory, start_server())
    try:
        store = await Store.open(found.redis.url, name="test")
        try:
            await PolicyBook(store).apply(policy, by="test")
        finally:
            await store.close()
        for name in names:
            found.start(name)
        yield found
    finally:
        found.close()
    tells_no_traceback(found.outputs())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
