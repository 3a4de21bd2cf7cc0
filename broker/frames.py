"""How an answer reaches its readers: one listening connection per process, many readers, and the log behind them.

Pub/sub carries, the log decides. A reader that misses a message, reads too slowly or comes late refills from the log,
so it gets every frame once and in order, or is told that the answer started again (`Restarted`). An attempt that goes
on from an earlier one counts on behind its last frame: `1-17`, then `2-18`. Whether that is so, the log says.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from broker import errors
from broker.records import Frame
from broker.store import Store

log = logging.getLogger("warmlane.frames")

QUEUE_FRAMES = 256
QUEUE_BYTES = 1 << 20
REFILL_PAGE = 256
REFILL_PAUSE_S = 0.1
CHECK_EVERY_S = 2.0
"""A reader that hears nothing for this long looks into the log itself."""


@dataclass(frozen=True)
class Restarted:
    """The answer began again: everything that was read of earlier attempts is void."""

    attempt: int


class Hub:
    """Hands the frames that one process hears to its readers."""

    def __init__(self, store: Store, *, name: str) -> None:
        self._store = store
        self.name = name
        self._readers: dict[str, set[FrameReader]] = {}
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Listens until cancelled; reconnects by itself and tells every reader to look into the log."""
        await self._store.listen([self._store.keys.frames_channel(self.name)], self._heard, self._opened)

    def open(self, job_id: str, *, after: tuple[int, int] = (0, 0)) -> "FrameReader":
        """Starts to collect a job's frames. Open before submit, and nothing can be missed. Close it when done."""
        reader = FrameReader(self._store, job_id, after=after)
        self._readers.setdefault(job_id, set()).add(reader)
        return reader

    def close(self, reader: "FrameReader") -> None:
        """Forgets a reader."""
        readers = self._readers.get(reader.job_id)
        if readers is not None:
            readers.discard(reader)
            if not readers:
                del self._readers[reader.job_id]

    def _heard(self, _channel: str, message: bytes) -> None:
        job_id, frame = Frame.from_message(message)
        for reader in self._readers.get(job_id, ()):
            reader.push(frame)

    def _opened(self) -> None:
        self.listening.set()
        for readers in self._readers.values():
            for reader in readers:
                reader.look()


class FrameReader:
    """Follows one job. Frames come from `push`; whatever is missing, from the log."""

    def __init__(self, store: Store, job_id: str, *, after: tuple[int, int] = (0, 0)) -> None:
        self.job_id = job_id
        self._store = store
        self._queue: deque[Frame] = deque()
        self._bytes = 0
        self._after = after  # (attempt, seq) of the last frame given
        self._look = after != (0, 0)
        self._more = False  # the last page of the log was full: there is more behind it
        self._open_ended = False  # what was given last is a part of an answer: its end is still to come
        self._news = asyncio.Event()

    def push(self, frame: Frame) -> None:
        """Takes a frame from the hub; never waits. Past its bound the queue is dropped: the log has it all."""
        if self._look:
            self._news.set()
            return
        if len(self._queue) >= QUEUE_FRAMES or self._bytes + len(frame.data) > QUEUE_BYTES:
            self._queue.clear()
            self._bytes = 0
            self._look = True
        else:
            self._queue.append(frame)
            self._bytes += len(frame.data)
        self._news.set()

    def look(self) -> None:
        """Says that messages may have been missed."""
        self._look = True
        self._news.set()

    def ready(self) -> Frame | None:
        """Gives the next frame if it is already here and in order, without waiting."""
        if self._look or not self._queue:
            return None
        attempt, seq = self._after
        frame = self._queue[0]
        if frame.attempt != attempt or frame.seq != seq + 1:
            return None
        return self._pop()

    async def next(self, *, timeout_s: float | None = None) -> Frame | Restarted | None:
        """Waits for the next frame; None after `timeout_s` without one.

        Raises NoSuchJob when job and log are gone.
        """
        loop = asyncio.get_running_loop()
        limit = None if timeout_s is None else loop.time() + timeout_s
        while True:
            if not self._look and self._queue:
                found = self._from_queue()
                if found is not None:
                    return found
            if self._look or (self._more and not self._queue):
                found = await self._from_log()
                if found is not None:
                    return found
            self._news.clear()
            if self._queue or self._look:
                if limit is not None and loop.time() >= limit:  # Redis is away: the caller still gets its turn
                    return None
                continue
            wait = CHECK_EVERY_S if limit is None else min(CHECK_EVERY_S, limit - loop.time())
            if wait <= 0:
                return None
            alarm = loop.call_later(wait, self._news.set)  # a timeout block for each frame would cost more than it
            try:
                await self._news.wait()
            finally:
                alarm.cancel()
            if not self._queue and not self._look:  # it was the alarm
                if limit is not None and loop.time() >= limit:
                    return None
                self._look = True

    def _pop(self) -> Frame:
        frame = self._queue.popleft()
        self._bytes -= len(frame.data)
        self._after = (frame.attempt, frame.seq)
        self._open_ended = not frame.terminal
        return frame

    def _from_queue(self) -> Frame | Restarted | None:
        while self._queue:
            frame, (attempt, seq) = self._queue[0], self._after
            if self._open_ended and frame.terminal and frame.attempt == attempt and frame.seq <= seq:
                return self._pop()  # Redis lost frames that were given already: the end is numbered from before them
            if (frame.attempt, frame.seq) <= (attempt, seq):
                self._bytes -= len(self._queue.popleft().data)
            elif frame.attempt == attempt and frame.seq == seq + 1:
                return self._pop()
            elif frame.attempt > attempt and frame.seq == 1:
                self._after = (frame.attempt, 0)
                if seq > 0:
                    return Restarted(frame.attempt)
                return self._pop()
            else:
                self._look = True
                return None
        return None

    async def _from_log(self) -> Frame | Restarted | None:
        """Puts what the log has after the last frame given in front of what was pushed meanwhile."""
        store = self._store
        attempt, seq = self._after
        self._queue.clear()
        self._bytes = 0
        self._more = False
        self._look = False  # from here on pushes count: one may arrive before the reply that lacks it
        try:
            entries = await store.command(
                "XRANGE",
                store.keys.frames(self.job_id),
                f"({attempt}-{seq}" if seq or attempt else "-",
                "+",
                "COUNT",
                REFILL_PAGE,
            )
            if not entries and self._open_ended:
                entries = await self._end_before(attempt, seq)
            if not entries and not await store.command("EXISTS", store.keys.job(self.job_id)):
                raise errors.NoSuchJob(self.job_id)
        except errors.BrokerUnavailable as e:
            log.debug("event=refill_retry job=%s reason=%s", self.job_id, e)
            self._look = True
            await asyncio.sleep(REFILL_PAUSE_S)
            return None
        frames = [Frame.from_entry(entry, values) for entry, values in entries or []]
        if not frames:
            return None
        self._more = len(frames) == REFILL_PAGE
        last = (frames[-1].attempt, frames[-1].seq)
        pushed = [f for f in self._queue if (f.attempt, f.seq) > last]
        self._queue = deque(frames + pushed)
        self._bytes = sum(len(f.data) for f in self._queue)
        first = frames[0]
        if first.attempt > attempt and seq > 0 and first.seq != seq + 1:
            self._after = (first.attempt, 0)
            return Restarted(first.attempt)
        self._after = (first.attempt, first.seq - 1)
        return self._pop()

    async def _end_before(self, attempt: int, seq: int) -> list[Any]:
        """The end of this attempt, if the log has it numbered from before what was given: Redis lost frames.

        An end with a later number came after the look that found nothing; frames before it may have come with it.
        """
        newest = await self._store.command("XREVRANGE", self._store.keys.frames(self.job_id), "+", "-", "COUNT", 1)
        return [entry for entry in newest or [] if _is_end(Frame.from_entry(*entry), attempt, seq)]


def _is_end(frame: Frame, attempt: int, seq: int) -> bool:
    return frame.terminal and frame.attempt == attempt and frame.seq <= seq


async def replay(store: Store, job_id: str, *, after: tuple[int, int] = (0, 0)) -> AsyncIterator[Frame]:
    """Reads what the log holds now, without following."""
    at = f"({after[0]}-{after[1]}" if after != (0, 0) else "-"
    while True:
        entries = await store.command("XRANGE", store.keys.frames(job_id), at, "+", "COUNT", REFILL_PAGE)
        for entry, values in entries or []:
            yield Frame.from_entry(entry, values)
            at = f"({entry.decode()}"
        if len(entries or []) < REFILL_PAGE:
            return
