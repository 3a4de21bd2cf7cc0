"""The lean HTTP client of the token path: one POST, its answer's bytes handed on as they come.

General clients cost five to fifty times as much per token (measured: docs of performance), and closing their stream is
not always closing the connection. Here the attempt owns the connection: `abort` closes it at once, which is how a
runtime learns that nobody wants the rest. Parsing is httptools'.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_TIMEOUT_S = 2.0
IDLE_KEPT = 64
IDLE_LIMIT_S = 30.0


class UpstreamLost(Exception):
    """The connection could not be made, or broke; `reused` = it was an old one that nothing was read from."""

    def __init__(self, message: str, *, reused: bool = False) -> None:
        super().__init__(message)
        self.reused = reused


class Exchange:
    """One request and its answer. `status` is 0 until the head has been read; `done` once the answer is whole."""

    def __init__(
        self, connection: "_Connection", on_data: Callable[[bytes], None], on_news: Callable[[], None]
    ) -> None:
        self.status = 0
        self.retry_after = ""  # the header's text, where the server sent one
        self.done = False
        self.lost: UpstreamLost | None = None
        self._connection: _Connection | None = connection
        self._on_data = on_data
        self._on_news = on_news

    def abort(self) -> None:
        """Closes the connection at once. Once the answer is over, the connection may serve another: it is let be."""
        if self._connection is not None:
            self._connection.abort()

    def pause(self) -> None:
        """Stops reading, so that the runtime feels that we cannot keep up."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Reads on."""
        if self._connection is not None:
            self._connection.resume()

    def head(self, status: int, retry_after: str = "") -> None:
        self.status, self.retry_after = status, retry_after

    def data(self, data: bytes) -> None:
        self._on_data(data)

    def finish(self, lost: UpstreamLost | None) -> None:
        if self.done or self.lost is not None:
            return
        self._connection = None
        if lost is None:
            self.done = True
        else:
            self.lost = lost

    def news(self) -> None:
        self._on_news()


class _Connection(asyncio.Protocol):
    """A connection to one runtime: at most one exchange at a time."""

    def __init__(self, idle: "deque[_Connection]") -> None:
        self._idle = idle
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._until_eof = False
        self._heard = self._paused = False
        self._retry_after = ""
        self._body: list[bytes] = []
        self.used = 0
        self.idle_since = 0.0
        self.open = False

    # asyncio's side
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclass of it
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._heard = True
        exchange = self._exchange
        if exchange is None:  # a server that talks without being asked is not one to keep
            self.abort()
            return
        try:
            self._parser.feed_data(data)
            self._hand_on(exchange)
        except httptools.HttpParserError as e:
            self._hand_on(exchange)
            exchange.finish(UpstreamLost(f"the runtime does not speak HTTP: {e}"))
            self.abort()
        exchange.news()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self in self._idle:
            self._idle.remove(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            if self._until_eof and exc is None:
                exchange.finish(None)
            else:
                reason = "closed the connection" if exc is None else f"broke the connection ({exc})"
                exchange.finish(UpstreamLost(f"the runtime {reason}", reused=self.used > 1 and not self._heard))
            exchange.news()

    # httptools' side
    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.head(self._parser.get_status_code(), self._retry_after)

    def on_header(self, name: bytes, value: bytes) -> None:
        low = name.lower()
        if low in (b"content-length", b"transfer-encoding"):
            self._until_eof = False
        elif low == b"retry-after":
            self._retry_after = value.decode("latin-1").strip()

    def on_message_begin(self) -> None:
        self._until_eof = True
        self._retry_after = ""

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._body.append(body)

    def on_message_complete(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._until_eof = False
        if exchange is None:
            return
        self._hand_on(exchange)
        exchange.finish(None)
        if self._parser.should_keep_alive() and self.open and len(self._idle) < IDLE_KEPT:
            self._parser = httptools.HttpResponseParser(self)
            self.resume()
            self.idle_since = asyncio.get_running_loop().time()
            self._idle.append(self)
        else:
            self.abort()

    def _hand_on(self, exchange: Exchange) -> None:
        """Passes on what one read brought, in one piece: a server that sends each token as a chunk of its own would
        else cost a call chain for each."""
        if self._body:
            body, self._body = self._body, []
            exchange.data(body[0] if len(body) == 1 else b"".join(body))

    # the client's side
    def send(self, exchange: Exchange, data: bytes) -> None:
        self._exchange = exchange
        self._heard = False
        self.used += 1
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if self._transport is not None and self.open and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self.open and self._paused:
            self._paused = False
            self._transport.resume_reading()


@dataclass(frozen=True)
class _Server:
    """What a base URL says: host, port and whether TLS; what goes before every path; the Host header."""

    place: tuple[str, int, bool]
    path: str
    name: str


@lru_cache(maxsize=256)
def _server_at(base_url: str) -> _Server:
    parts = urlsplit(base_url)
    tls = parts.scheme == "https"
    place = (parts.hostname or "127.0.0.1", parts.port or (443 if tls else 80), tls)
    return _Server(place, parts.path, parts.netloc)


class StreamClient:
    """Connections to the runtimes of one host."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, int, bool], deque[_Connection]] = {}

    async def post(
        self,
        base_url: str,
        path: str,
        body: bytes,
        *,
        headers: Mapping[str, str],
        on_data: Callable[[bytes], None],
        on_news: Callable[[], None],
        fresh: bool = False,
    ) -> Exchange:
        """Sends a request; raises UpstreamLost when nobody listens.

        `on_data` gets the body's bytes, `on_news` is called after anything happened: bytes, the end, a loss.
        """
        server = _server_at(base_url)
        place = server.place
        connection = None if fresh else self._take(place)
        if connection is None:
            connection = await self._connect(place)
        exchange = Exchange(connection, on_data, on_news)
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = (
            f"POST {server.path}{path} HTTP/1.1\r\nHost: {server.name}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream, application/json\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
        )
        connection.send(exchange, head.encode("latin-1") + body)
        return exchange

    def close(self) -> None:
        """Closes the idle connections."""
        for idle in self._idle.values():
            for connection in list(idle):
                connection.abort()

    def _take(self, place: tuple[str, int, bool]) -> _Connection | None:
        idle = self._idle.get(place)
        oldest = asyncio.get_running_loop().time() - IDLE_LIMIT_S
        while idle:
            connection = idle.pop()
            if connection.open and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self, place: tuple[str, int, bool]) -> _Connection:
        host, port, tls = place
        idle = self._idle.setdefault(place, deque())
        loop = asyncio.get_running_loop()
        context = _tls() if tls else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(lambda: _Connection(idle), host, port, ssl=context)
        except (OSError, TimeoutError) as e:
            raise UpstreamLost(f"nobody answers at {host}:{port} ({str(e) or 'timed out'})") from None
        return connection


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Reads the machine's certificates once: that takes tens of ms, in which no stream goes on."""
    return ssl.create_default_context()
