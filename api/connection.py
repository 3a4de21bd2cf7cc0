"""One client's TCP connection: how long, how large and how many its requests may be before any of our code sees them.

uvicorn bounds none of that. What a head costs is measured where it is read; what takes too long is found by a look at
all connections once a second, so that a request pays for no timer.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.cork import CorkedProtocol
from api.errors import BUSY, INVALID, Wrong, dialect_of
from api.limits import Limits

IDLE, HEAD, BODY, REFUSED = "idle", "head", "body", "refused"
EVICTED_AT_ONCE = 64
"""Under a flood each look for idle connections costs, so one look makes room for some more."""

Refusals = Callable[[str], None]
"""Counts a connection that was refused or cut, by its reason."""

BAD_HTTP = Wrong("bad_http", "this is no HTTP request that the gateway understands", 400, INVALID)
NO_PROXY = Wrong("bad_http", "the request's target must be a path: the gateway is no proxy", 400, INVALID)
TOO_MANY = Wrong("too_many_connections", "the gateway has too many connections; try again", 503, BUSY, retry_after_s=1)
TOO_SLOW = Wrong("request_timeout", "the request came too slowly; send it again", 408, INVALID)


class _Refuse(Exception):
    """Raised inside the parser: it stops there and then."""


class Connection(CorkedProtocol):
    """uvicorn's protocol with limits."""

    def __init__(self, *args: Any, limits: Limits, refused: Refusals, **more: Any) -> None:
        super().__init__(*args, **more)
        self.phase = IDLE
        self.since = 0.0
        self._limits = limits
        self._count = refused
        self._chunk = self._fed = self._body = 0
        self._why: Wrong | None = None

    # --- what the transport tells ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Takes the connection, if need be in the place of one that does nothing."""
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) > self._limits.connections:
            others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
            if not make_room(others, self._count):
                self._turn_away(crowd=len(others))

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, as long as the head may grow."""
        if self.phase == REFUSED:
            return
        self._chunk = len(data)
        if self.phase == HEAD:
            self._fed += self._chunk
        super().data_received(data)
        if self.phase == HEAD and self._fed > self._limits.head_bytes:
            self._why = self._head_too_large()
            self.send_400_response("")

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets the parts of an unfinished message go."""
        self.phase = REFUSED
        super().connection_lost(exc)

    # --- what the parser tells ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self.phase, self.since = HEAD, self.loop.time()
        self._fed = self._chunk  # at most: an earlier message may have had its part of it
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Refuses a head that is too large, and a request too many, before they become one of the application's."""
        self._why = self._wrong_with_head()
        if self._why is not None:
            raise _Refuse
        super().on_headers_complete()
        self.phase, self.since, self._body = BODY, self.loop.time(), 0

    def on_body(self, body: bytes) -> None:
        """Counts what comes, also where nobody reads it any more."""
        self._body += len(body)
        if self.cycle.response_complete and self._body > self._limits.body_bytes:
            raise _Refuse
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self.phase = IDLE
        if not self._answering:  # nobody read it, and its answer is out
            self.since = self.loop.time()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is whole: from here on the client has its time for the next request."""
        if self.phase != BODY:
            self.since = self.loop.time()
        super().on_response_complete()

    # --- refusals -------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Tells what is wrong with a request, unless another's answer is under way: that is cut off."""
        why, self._why = self._why or BAD_HTTP, None
        self._count(why.code)
        self._refuse_or_cut(why)

    def handle_websocket_upgrade(self) -> None:
        """There are none here."""

    def _unsupported_upgrade_warning(self) -> None:
        """The request is answered as the HTTP request that it is; a log of each would be a way to fill our disk."""

    @property
    def _answering(self) -> bool:
        """Whether a request of this connection still waits for its answer, or for the rest of it."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wrong_with_head(self) -> Wrong | None:
        limits = self._limits
        if len(self.headers) > limits.head_lines:
            return Wrong("head_too_large", f"a request may have {limits.head_lines} headers at most", 431, INVALID)
        if len(self.url) > limits.url_bytes:
            return Wrong("url_too_long", f"a URL may have {limits.url_bytes} bytes at most", 414, INVALID)
        if self._fed > limits.head_bytes:  # its body may have come along
            if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > limits.head_bytes:
                return self._head_too_large()
        if not self.url.startswith(b"/") and self.url != b"*":
            return NO_PROXY
        if len(self.pipeline) >= limits.pipelined:
            return BAD_HTTP
        return None

    def _head_too_large(self) -> Wrong:
        most = self._limits.head_bytes
        return Wrong("head_too_large", f"a request's headers may have {most} bytes at most", 431, INVALID)

    def _turn_away(self, *, crowd: int) -> None:
        self._count(TOO_MANY.code)
        if crowd >= self._limits.connections + EVICTED_AT_ONCE:  # even these few words would keep a descriptor
            self.phase = REFUSED
            self.transport.abort()
        else:
            self._refuse(TOO_MANY)

    def _refuse_or_cut(self, wrong: Wrong) -> None:
        """Answers, unless the request has its answer, or another's is under way: ours would be taken for a part of it,
        or for that of the next request."""
        begun = self.pipeline or self.cycle.response_started if self.phase == BODY else self._answering
        if not begun:
            self._refuse(wrong)
        else:
            self.phase = REFUSED
            self.transport.abort()

    def _refuse(self, wrong: Wrong) -> None:
        """Answers by itself, and drops what still comes for a moment: a reset would take our answer with it."""
        self.phase, self.since = REFUSED, self.loop.time()
        self._unset_keepalive_if_required()
        path = self.scope["path"] if self.cycle is not None and self._answering else ""
        body = dialect_of(path).body(wrong)
        headers = [
            *self.server_state.default_headers,
            *wrong.headers(),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (wrong.status, _PHRASES[wrong.status], head, body))
        if self.cycle is not None:  # whoever serves it hears that the client went away
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    # --- the look at all of them ----------------------------------------------------------------------------------

    @property
    def idle_since(self) -> float | None:
        """Since when nothing is under way here, None while something is."""
        return self.since if self.phase == IDLE and not self._answering and not self.transport.is_closing() else None

    def look(self, now: float) -> None:
        """Ends what takes too long."""
        limits, took_s = self._limits, now - self.since
        if self.transport.is_closing() or self.phase == REFUSED:
            self._look_at_end(now)
        elif self.phase == BODY:
            if self.flow.read_paused:  # by us: its sender can do nothing about it
                self.since = now
            elif took_s > limits.body_s + self._body / limits.body_bytes_per_s:
                self._too_slow()
        elif self._answering:
            pass
        elif self.phase == HEAD:
            if took_s > limits.head_s:
                self._too_slow()
        elif took_s > (limits.head_s if self.cycle is None else limits.keep_alive_s):
            self.transport.close()

    def _look_at_end(self, now: float) -> None:
        if self.phase != REFUSED:
            self.phase, self.since = REFUSED, now
        elif now - self.since > (self._limits.closing_s if self.transport.is_closing() else self._limits.linger_s):
            self.transport.abort()

    def _too_slow(self) -> None:
        self._count(TOO_SLOW.code)
        self._refuse_or_cut(TOO_SLOW)


def look_at_all(connections: Iterable[HttpToolsProtocol], now: float) -> None:
    """Ends whatever takes too long on any of them."""
    for connection in list(connections):
        if isinstance(connection, Connection):
            connection.look(now)


def make_room(connections: Iterable[Connection], count: Refusals) -> bool:
    """Ends the connections on which nothing has been under way for longest; False if all are at work."""
    idle = sorted((c for c in connections if c.idle_since is not None), key=lambda c: c.since)
    for connection in idle[:EVICTED_AT_ONCE]:
        count("evicted")
        connection.transport.abort()
    return bool(idle)


_PHRASES = {
    400: b"Bad Request",
    408: b"Request Timeout",
    414: b"URI Too Long",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}
