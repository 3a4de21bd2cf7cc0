"""One HTTP exchange on the hot route, in plain ASGI: the request's bytes, its client's presence, the answer.

At most one task beside the request's own watches for the client to hang up. Nothing here looks into a job.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from api.asgi import Receive, Scope, Send
from api.errors import VERSION, Wrong, dialect_of
from api.limits import House
from broker import errors
from broker.frames import FrameReader, Restarted
from broker.records import Frame, JobRecord

LINGER_S = 2.0
"""How long the rest of a body that is refused is read and dropped, so that its sender gets to read our answer."""
_VERSION = VERSION.encode()
_BODY_UNREAD = (errors.BodyTooLarge.code, errors.BodiesTooMany.code)

Headers = Sequence[tuple[bytes, bytes]]


class Interrupted(Exception):
    """Why an exchange cannot go on."""


class ClientGone(Interrupted):
    """The client hung up."""


class Stalled(Interrupted):
    """The client takes no more bytes."""


class Stopping(Interrupted):
    """This process is about to end."""


class CutConnection(Exception):
    """Raised out of the application: the server then closes the connection in the middle of the answer.

    A client must not take what it got for the whole; after a 200 there is no other way to say so outside a stream.
    """


class Exchange:
    """A request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.raw_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.headers: dict[bytes, bytes] = dict(self.raw_headers)
        self.caller = ""  # whose request it is, once that is known
        self.job: JobRecord | None = None  # what it asks for, once that has been read
        self.started = False
        self.dialect = dialect_of(self.path, version=self.header(_VERSION))
        self.event_of: Callable[[Wrong], bytes] = self.dialect.event
        self.in_band = False
        self.why: type[Interrupted] | None = None
        self.sending_since = 0.0
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._until = 0.0
        self._waiting = False
        self._woken = False
        self._house: House | None = None
        self._held = 0

    def header(self, name: bytes) -> str:
        """Gives a header's text, "" if it was not sent."""
        return self.headers.get(name, b"").decode("latin-1").strip()

    async def read_body(self, house: House) -> bytes:
        """Reads the request's body; raises BodyTooLarge, before reading where the client says its size. One that takes
        too long is the connection's business."""
        bytes_max = house.limits.body_bytes
        length = self.headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > bytes_max:
            raise errors.BodyTooLarge(bytes_max)
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            body: bytes = message.get("body", b"")
            if len(body) > bytes_max:
                raise errors.BodyTooLarge(bytes_max)
            return body
        return await self._read_parts(message, house)

    async def parts(self) -> AsyncIterator[bytes]:
        """Gives a body as it comes; raises ClientGone where it breaks off."""
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            yield message.get("body", b"")
            if not message.get("more_body"):
                return

    def watch(self) -> None:
        """Begins to watch for the client to hang up; from here on nobody else may read."""
        self._watcher = self._loop.create_task(self._watch(), name="watch for a hang-up")

    def close(self) -> None:
        """Ends the watch."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        if self._house is not None:
            self._house.give_back(self._held)
            self._house = None

    def interrupt(self, why: type[Interrupted]) -> None:
        """Makes whoever waits in `next` raise `why`, now or as soon as it waits again."""
        if self.why is None:
            self.why = why
        if self._waiting:
            self._wake()
        elif self.sending_since and why is Stalled and self._task is not None:
            self._task.cancel()  # it waits in `send`, and the client will not let it out

    async def next(self, reader: FrameReader, *, until: float) -> Frame | Restarted | None:
        """Gives the next frame, None at `until` (loop time); raises Interrupted."""
        if self.why is not None:
            raise self.why
        frame = reader.ready()
        if frame is not None:
            return frame
        self._expect(until)
        self._waiting = True
        try:
            return await reader.next()
        except asyncio.CancelledError:
            self._heed()
            reader.look()  # it may have been in the middle of a look into the log
            return None
        finally:
            self._waiting = self._woken = False

    async def pause(self, *, until: float) -> None:
        """Waits until then (loop time); raises Interrupted."""
        if self.why is not None:
            raise self.why
        self._expect(until)
        self._waiting = True
        try:
            await self._loop.create_future()
        except asyncio.CancelledError:
            self._heed()
        finally:
            self._waiting = self._woken = False

    async def start(self, status: int, headers: Headers, *, in_band: bool = False) -> None:
        """Sends status and headers; `in_band` says that errors can still be told inside the body."""
        self.started, self.in_band = True, in_band
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Sends a piece of the body, and waits while the client is behind."""
        self.sending_since = self._loop.time()
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        except asyncio.CancelledError:
            if self.why is not Stalled or self._task is None:
                raise
            self._task.uncancel()
            raise Stalled from None
        finally:
            self.sending_since = 0.0

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends a whole answer."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.write(body, last=True)

    async def refuse(self, wrong: Wrong, headers: Headers = (), *, unread: bool = False) -> None:
        """Tells what went wrong in the way that is still open: a status, an event in the stream, a cut connection.
        `unread`: there may be more of the request's body."""
        if not self.started:
            if unread or wrong.code in _BODY_UNREAD:
                await self._refuse_body(wrong)
            else:
                await self.answer(self.dialect.status(wrong), [*wrong.headers(), *headers], self.dialect.body(wrong))
        elif self.in_band:
            await self.write(self.event_of(wrong), last=True)
        else:
            raise CutConnection(wrong.code)

    def _expect(self, until: float) -> None:
        """Sees to it that `next` ends in time. One timer lives on over all frames: a timeout for each would cost more
        than the frame."""
        self._until = until
        if self._alarm is None:
            self._alarm = self._loop.call_at(until, self._ring)
        elif self._alarm.when() > until:
            self._alarm.cancel()
            self._alarm = self._loop.call_at(until, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if not self._waiting:
            return
        if self._loop.time() < self._until:
            self._alarm = self._loop.call_at(self._until, self._ring)
        else:
            self._wake()

    def _heed(self) -> None:
        """Takes back the cancellation that is our own; raises Interrupted where it has a reason, and anybody else's."""
        if not self._woken or self._task is None or self._task.uncancel() > 0:
            raise  # called while one is handled
        if self.why is not None:
            raise self.why from None

    def _wake(self) -> None:
        if not self._woken and self._task is not None:
            self._woken = True
            self._task.cancel()

    async def _read_parts(self, message: object, house: House) -> bytes:
        parts: list[bytes] = []
        size = 0
        self._house = house
        while True:
            if not isinstance(message, dict) or message["type"] != "http.request":
                raise ClientGone
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > house.limits.body_bytes:
                raise errors.BodyTooLarge(house.limits.body_bytes)
            house.take(len(part))
            self._held += len(part)
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)
            message = await self._receive()

    async def _refuse_body(self, wrong: Wrong) -> None:
        """Answers before the body is read, and drops what comes for a moment: a reset would take our answer with it."""
        body = self.dialect.body(wrong)
        size = (b"content-length", str(len(body)).encode())
        await self.start(self.dialect.status(wrong), [*wrong.headers(), size, (b"connection", b"close")])
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                while (await self._receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        await self.write(b"", last=True)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.interrupt(ClientGone)
