"""A wire between a client and a gateway that notes what passes, and a loop of its own for servers beside a test."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

Server = TypeVar("Server")

_REQUEST = re.compile(rb"^(GET|HEAD|POST|DELETE) (\S+) HTTP/1\.1\r\n")
_STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) .*?\r\n\r\n", re.DOTALL)
_RETRY_AFTER = re.compile(rb"retry-after: (\S+)\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """A status as it passed; `retry_after` is empty where the header was not there."""

    status: int
    retry_after: str
    at_s: float


@dataclass
class Wire:
    """Passes bytes on both ways, and notes requests and statuses."""

    to: str
    url: str = ""
    asked: list[tuple[str, float]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    hung_up: list[tuple[str, float]] = field(default_factory=list)
    """What a client closed its connection on before the server did: the last path that it asked there, and when."""

    def requests(self, path: str) -> list[float]:
        """When each request for a path passed."""
        return [at for seen, at in self.asked if seen == path]

    def clear(self) -> None:
        self.asked.clear()
        self.replies.clear()
        self.hung_up.clear()

    async def cut(self) -> None:
        """Breaks the connections that are open now, as a network may."""
        for task in list(self._open):
            task.cancel()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Wire"]:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._open: set[asyncio.Task[None]] = set()
        try:
            yield self
        finally:
            server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        there = urlsplit(self.to)
        asked: list[str] = []

        def note_request(data: bytes) -> None:
            if found := _REQUEST.match(data):
                asked.append(found[2].decode().split("?")[0])
                self.asked.append((asked[-1], time.monotonic()))

        try:
            up_reader, up_writer = await asyncio.open_connection(there.hostname, there.port)
            try:
                ways = [
                    asyncio.create_task(self._pass(reader, up_writer, note_request)),
                    asyncio.create_task(self._pass(up_reader, writer, self._note_status)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)  # a hang-up is passed on at once
                    if asked and not (up_reader.at_eof() or up_reader.exception()):
                        self.hung_up.append((asked[-1], time.monotonic()))
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
            finally:
                up_writer.transport.abort()
        except asyncio.CancelledError:
            return  # the wire is taken away; asyncio would log this as an error of the connection's
        finally:
            writer.close()
            self._open.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Any) -> None:
        while data := await reader.read(65536):
            note(data)
            writer.write(data)
            await writer.drain()

    def _note_status(self, data: bytes) -> None:
        if found := _STATUS.match(data):
            wait = _RETRY_AFTER.search(found[0])
            self.replies.append(Reply(int(found[1]), wait[1].decode() if wait else "", time.monotonic()))


class Beside:
    """A loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers beside the test", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, Server]) -> Server:
        """Runs it there and waits for what it gives."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    @contextmanager
    def serving(self, server: AbstractAsyncContextManager[Server]) -> Iterator[Server]:
        """Holds an asynchronous server open while the block runs; one task enters and leaves it."""
        leave, entered = asyncio.Event(), threading.Event()
        found: list[Server] = []

        async def hold() -> None:
            async with server as it:
                found.append(it)
                entered.set()
                await leave.wait()

        held = asyncio.run_coroutine_threadsafe(hold(), self._loop)
        held.add_done_callback(lambda _: entered.set())
        entered.wait(30)
        try:
            yield found[0] if found else held.result(0)  # type: ignore[misc]  # the latter raises
        finally:
            self._loop.call_soon_threadsafe(leave.set)
            held.result(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
