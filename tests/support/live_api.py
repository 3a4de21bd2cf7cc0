"""The api under a real uvicorn on a free port, in the test's own loop: streaming and hang-ups are as they are."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Self

from api.app import Server
from api.gateway import Gateway
from broker.callers import Keys
from broker.store import Store
from tests.support.waiting import POLL_S, until


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
async def live_api(store: Store, *, keys: str = "", stop_after_s: float = 0.0) -> AsyncIterator[LiveApi]:
    """Runs it for the length of the block; raw clients hang up with it."""
    gateway = Gateway(store, Keys.parse(keys), version="1.2.3")
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
