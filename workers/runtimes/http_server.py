"""A small HTTP/1.1 server whose handlers are cancelled the moment the client hangs up.

The simulated runtime is built on it. A framework would do, but start slower and notice a closed connection later,
and noticing it is what the simulated runtime is judged by.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

BODY_BYTES_MAX = 64 << 20
PIPELINED_MAX = 8
# A connection is accepted in one pass of the loop, has its transport in the next, its protocol in the third.
PASSES_TO_ACCEPT = 3

Handler = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request and the answer to it."""

    def __init__(
        self, connection: "_Connection", method: str, target: str, headers: dict[str, str], body: bytes
    ) -> None:
        parts = urlsplit(target)
        self.method = method
        self.path = parts.path
        self.query = parts.query
        self.headers = headers
        self.body = body
        self.hung_up = False
        self.started = False
        self.keep_alive = True
        self._connection = connection

    def json(self) -> Any:
        """Reads the body; raises ValueError when it is not JSON."""
        return json.loads(self.body)

    async def answer(self, value: object, *, status: int = 200) -> None:
        """Sends one JSON value as the whole answer."""
        body = json.dumps(value).encode()
        self.started = True
        await self._connection.send(self._head(status, "application/json", f"Content-Length: {len(body)}") + body)

    async def begin(self, content_type: str, *, status: int = 200) -> None:
        """Sends the headers of a streamed answer."""
        self.started = True
        await self._connection.send(self._head(status, content_type, "Transfer-Encoding: chunked"))

    async def write(self, piece: bytes) -> None:
        """Sends one piece of a streamed answer; waits while the client reads too slowly."""
        await self._connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))

    async def end(self) -> None:
        """Ends a streamed answer."""
        await self._connection.send(b"0\r\n\r\n")

    def _head(self, status: int, content_type: str, length: str) -> bytes:
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = "Unknown"
        connection = "keep-alive" if self.keep_alive else "close"
        lines = (f"HTTP/1.1 {status} {phrase}", f"Content-Type: {content_type}", length, f"Connection: {connection}")
        return "\r\n".join((*lines, "", "")).encode()


class HttpServer:
    """Listens on loopback and runs one handler per request, each a task of one group."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections: set[_Connection] = set()
        self.tasks: asyncio.TaskGroup

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[int]:
        """Serves while the block runs and gives the port; leaving it cuts every connection."""
        async with asyncio.TaskGroup() as self.tasks:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port)
            try:
                yield server.sockets[0].getsockname()[1]
            finally:
                # Closed at once, asyncio would forget a client it has just accepted, and leave its connection open.
                loop.remove_reader(server.sockets[0])
                for _ in range(PASSES_TO_ACCEPT):
                    await asyncio.sleep(0)
                server.close()
                for connection in list(self.connections):
                    connection.abort()


class _Connection(asyncio.Protocol):
    """One client connection: requests are answered in turn, a lost one cancels the handler at once."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Exchange] = deque()
        self._active: tuple[Exchange, asyncio.Task[None]] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport
        self.on_message_begin()

    async def send(self, data: bytes) -> None:
        await self._writable.wait()
        self._transport.write(data)

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._waiting.clear()
        if self._active is not None:
            exchange, task = self._active
            exchange.hung_up = True
            task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserCallbackError, httptools.HttpParserUpgrade):
            self._refuse(400)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, piece: bytes) -> None:
        self._body_bytes += len(piece)
        if self._body_bytes > BODY_BYTES_MAX:
            self._refuse(413)
        else:
            self._body.append(piece)

    def on_message_complete(self) -> None:
        if self._transport.is_closing():
            return
        method = self._parser.get_method().decode()
        exchange = Exchange(self, method, self._target.decode("latin-1"), self._headers, b"".join(self._body))
        exchange.keep_alive = self._parser.should_keep_alive()
        if len(self._waiting) >= PIPELINED_MAX:
            self._refuse(400)
            return
        self._waiting.append(exchange)
        self._next()

    def _next(self) -> None:
        if self._active is None and self._waiting and not self._transport.is_closing():
            exchange = self._waiting.popleft()
            self._active = exchange, self._server.tasks.create_task(self._run(exchange), name=f"answer {exchange.path}")

    async def _run(self, exchange: Exchange) -> None:
        await self._server.handler(exchange)
        self._active = None
        if not exchange.started or not exchange.keep_alive:
            self._transport.close()
        self._next()

    def _refuse(self, status: int) -> None:
        self._transport.write(b"HTTP/1.1 %d Refused\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
        self._transport.close()
