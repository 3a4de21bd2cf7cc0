"""A llama.cpp server that somebody else runs at a `url`: it serves one model, or it is a router with many.

Which of the two only the server can tell, so it is asked once, when its state is first asked for; one that went away is
asked again when it is back.
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from workers.runtimes.base import STATE_TIMEOUT_S, Endpoint, State, client_for, is_local
from workers.runtimes.llama_router import LlamaRouter
from workers.runtimes.llama_server import LlamaServer

if TYPE_CHECKING:
    from broker.policy import Model


class LlamaAtUrl:
    """Hands every question on to what the server turned out to be."""

    def __init__(self, name: str, model: "Model", *, url: str, state_dir: Path) -> None:
        self._url = url
        self._single = LlamaServer(name, model, state_dir=state_dir)
        self._router = LlamaRouter(name, model, url=url)
        self._known = False  # what it is, since it was last away
        self._is_router = False
        self._client = client_for(url)

    @property
    def kind(self) -> str:
        return "llama.cpp"

    @property
    def local(self) -> bool:
        return is_local(self._url)

    @property
    def manageable(self) -> bool:
        return self._server.manageable

    async def lacks(self) -> str:
        return await self._server.lacks()

    def turn(self) -> AbstractAsyncContextManager[None]:
        return self._server.turn()

    async def state(self) -> State:
        await self._find_out()
        state = await self._server.state()
        if state == "unreachable":
            self._known = False  # what comes back may be another; until it says so, requests are sent as before
        return state

    async def load(self, *, timeout_s: float) -> None:
        """Loads the model of a router; waits for a server of one model, whose load nobody can ask for."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + timeout_s
        await self._find_out()
        if self._known and self._is_router:
            await self._router.load(timeout_s=timeout_s)
            return
        await self._single.load(timeout_s=timeout_s)
        await self._find_out()  # one that was still starting could not say
        if self._is_router:
            await self._router.load(timeout_s=max(1.0, give_up_at - loop.time()))

    async def progress(self) -> float | None:
        return await self._server.progress()

    async def unload(self) -> None:
        await self._server.unload()

    async def memory_bytes(self, *, of_gpus: bool = False) -> int | None:
        return await self._server.memory_bytes(of_gpus=of_gpus)

    async def file_bytes(self) -> int | None:
        return await self._server.file_bytes()

    def process_ids(self) -> list[int]:
        return self._server.process_ids()

    def endpoint(self) -> Endpoint:
        return self._server.endpoint()

    async def probe(self, *, timeout_s: float, slot: int | None = None) -> float:
        return await self._server.probe(timeout_s=timeout_s, slot=slot)

    async def busy_slots(self) -> int | None:
        return await self._server.busy_slots()

    async def close(self) -> None:
        await self._single.close()
        await self._router.close()
        await self._client.aclose()

    @property
    def _server(self) -> LlamaServer | LlamaRouter:
        return self._router if self._is_router else self._single

    async def _find_out(self) -> None:
        """Asks for the list of models, which loads none: a router's have a status, a single server's has not."""
        if self._known:
            return
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S / 2):
                answer = await self._client.get(f"{self._url}/models")
            entries = answer.json().get("data") if answer.status_code == 200 else None
        except (httpx.HTTPError, TimeoutError, ValueError, AttributeError):
            return
        if answer.status_code == 404:  # something like llama-server that lacks the list
            self._known, self._is_router = True, False
        elif isinstance(entries, list) and entries:
            self._known = True
            self._is_router = any(isinstance(entry, dict) and "status" in entry for entry in entries)
