"""Frames to bytes: how an answer reaches its client while it is made, and how a wait, a failure and an end sound.

`send_stream` serves clients that asked for a stream, `send_whole` those that wait for one object. Both hold the status
back for a while, so that what fails early keeps a real one.
"""

import asyncio

from api import errors as told
from api.exchange import CutConnection
from api.visit import Visit
from api.voices import CountedVoice, Voice
from broker import errors
from broker.frames import Restarted
from broker.kept import ANSWER_BYTES_MAX
from broker.records import Frame

HEARTBEAT_S = 10.0
WHOLE_HOLD_S = 50.0
"""Under the minute after which proxies in between lose their patience."""
FOLD_INLINE_BYTES = 256 << 10
"""A longer answer is folded beside the loop, so that the other streams go on."""

JSON = [(b"content-type", b"application/json")]


async def send_stream(visit: Visit) -> None:
    """Sends frames as they come; a failed answer ends with an error inside the stream, and never as a good one does."""
    exchange, voice = visit.exchange, visit.voice
    until = visit.entered_at + visit.hold_s
    while True:
        found = await exchange.next(visit.reader, until=until)
        if found is None:
            beat = voice.heartbeat(await visit.note())
            if not exchange.started:
                await exchange.start(200, [*voice.headers, *visit.waiting_headers()], in_band=True)
            await exchange.write(beat)
            until = visit.loop.time() + min(HEARTBEAT_S, visit.patience_s)
            continue
        if isinstance(found, Restarted):
            if visit.delivered:
                raise CutConnection("the answer began again after some of it had been sent")
            continue
        parts, last = _ready(visit, found)
        failed = last is not None and last.kind != "done"
        if not exchange.started and not failed:
            await exchange.start(200, [*voice.headers, *await visit.begun(parts[0] if parts else b"")], in_band=True)
        elif parts and not visit.delivered and not failed:
            await visit.begun(parts[0])
        if last is None:
            await exchange.write(_passed(voice, parts))
            visit.delivered = True
            until = visit.loop.time() + min(HEARTBEAT_S, visit.patience_s)
        elif not failed:
            await exchange.write(_passed(voice, [*parts, voice.done]), last=True)
            return visit.finished()
        else:
            if exchange.started and parts:
                await exchange.write(_passed(voice, parts))
            return await _fail(visit, last)


async def send_whole(visit: Visit) -> None:
    """Collects the answer and sends it as one object; a failure after the status was sent cuts the connection."""
    exchange = visit.exchange
    until = visit.entered_at + visit.hold_s
    whole: list[bytes] = []
    size = 0
    headers: list[tuple[bytes, bytes]] = []
    while True:
        found = await exchange.next(visit.reader, until=until)
        if found is None:
            await visit.note()  # raises once Redis has been away for too long
            if not exchange.started:
                await exchange.start(200, [*JSON, *visit.waiting_headers()])
            await exchange.write(b" ")
            until = visit.loop.time() + min(HEARTBEAT_S, visit.patience_s)
            continue
        if isinstance(found, Restarted):
            whole.clear()
            size = 0
            continue
        parts, last = _ready(visit, found)
        if parts and not headers:
            headers = await visit.begun(parts[0])
        whole += parts
        size += sum(map(len, parts))
        if size > ANSWER_BYTES_MAX:
            await visit.leave()
            raise errors.RuntimeFailed(f"the answer is larger than {ANSWER_BYTES_MAX} bytes")
        if last is None:
            continue
        if last.kind != "done":
            return await _fail(visit, last)
        body = await fold(visit.voice, whole, size)
        if exchange.started:
            await exchange.write(body, last=True)
        else:
            await exchange.answer(200, [*JSON, *(headers or visit.waiting_headers())], body)
        return visit.finished()


def _ready(visit: Visit, first: Frame) -> tuple[list[bytes], Frame | None]:
    """Takes along what is already there; gives the bytes and the terminal frame, if it is among them."""
    parts: list[bytes] = []
    frame: Frame | None = first
    while frame is not None:
        if frame.terminal:
            return parts, frame
        parts.append(frame.data)
        frame = visit.reader.ready()
    return parts, None


def _passed(voice: Voice, parts: list[bytes]) -> bytes:
    joined = parts[0] if len(parts) == 1 else b"".join(parts)
    return voice.passing(joined) if isinstance(voice, CountedVoice) else joined


async def _fail(visit: Visit, last: Frame) -> None:
    wrong = told.ended(last, retry_after_s=visit.retry_after_s())
    await visit.exchange.refuse(wrong, visit.waiting_headers())


async def fold(voice: Voice, whole: list[bytes], size: int) -> bytes:
    """Makes the one object of an answer's pieces, which have this size together; raises RuntimeFailed."""
    try:
        return voice.fold(whole) if size <= FOLD_INLINE_BYTES else await asyncio.to_thread(voice.fold, whole)
    except ValueError:
        raise errors.RuntimeFailed("the answer could not be put together from its stream") from None
