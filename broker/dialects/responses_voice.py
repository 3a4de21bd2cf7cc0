"""What the api says around a worker's events: that a client still waits, and what went wrong, in one count.

Codex's patience ends after 300 s without an event, and comments are none. So a heartbeat is an event,
`response.in_progress`, and the first thing said is `response.created`, by whoever speaks first. The worker counts its
own events from 0; what passes here is counted on from what was said before.
"""

import itertools
from typing import Any, Final

from broker.dialects.responses_object import (
    CREATED,
    FAILED,
    IN_PROGRESS,
    NUMBER,
    ResponseObject,
    created_s,
    event,
)

_OPENINGS: Final = tuple(f"event: {kind}\n".encode() for kind in (CREATED, IN_PROGRESS))


class ResponsesVoice:
    """One client's stream. `model` is what it asked for: while it waits nobody knows who will serve it."""

    def __init__(self, body: bytes, *, job_id: str, model: str) -> None:
        self._object = ResponseObject(body, job_id=job_id, model=model)
        self._next = 0
        self._other: tuple[bytes, bytes] | None = None  # how a job that took over names the response

    def taken_over(self, job_id: str) -> None:
        """Tells that another job makes the answer; its client goes on hearing of the response that it knows."""
        self._other = _name(f"resp_{job_id}", created_s(job_id))

    def heartbeat(self, note: str) -> bytes:
        """Says that the client still waits, and in a comment how the wait goes."""
        return f": warmlane {' '.join(note.split())}\n".encode() + (self._opening() or self._say(IN_PROGRESS))

    def passing(self, data: bytes) -> bytes:
        """Counts a worker's events, whole ones as it wrote them, and leaves out an opening that was said before."""
        if self._other is not None:
            for other, ours in zip(self._other, _name(self._object.id, self._object.created_at), strict=True):
                data = data.replace(other, ours)
        if self._next:
            while data.startswith(_OPENINGS):
                data = data[data.index(b"\n\n") + 2 :]
        first = NUMBER.search(data)
        if first is None:
            return data
        if int(first[2]) == self._next:
            last = data.rfind(b"\ndata: {") + 1
            found = NUMBER.match(data, last)
            self._next = int(found[2]) + 1 if found else self._next
            return data
        numbers = itertools.count(self._next)
        data, count = NUMBER.subn(lambda found: b"%s%d" % (found[1], next(numbers)), data)
        self._next += count
        return data

    def failed(self, code: str, message: str, *, status: int, retry_after_s: int | None = None) -> bytes:
        """Says inside the stream that the answer failed; nothing follows it."""
        error = failure(code, message, status=status, retry_after_s=retry_after_s)
        opening = self._opening()
        return opening + event(FAILED, self._count(), response=self._object.state("failed", error=error))

    def _opening(self) -> bytes:
        if self._next:
            return b""
        return event(CREATED, self._count(), response=self._object.state("in_progress")) + self._say(IN_PROGRESS)

    def _say(self, kind: str) -> bytes:
        return event(kind, self._count(), response=self._object.slim())

    def _count(self) -> int:
        number, self._next = self._next, self._next + 1
        return number


def _name(response_id: str, created_at: int) -> tuple[bytes, bytes]:
    """How an event writes id and time; inside of a text the quotes would be escaped."""
    return b'"id":"%s"' % response_id.encode(), b'"created_at":%d,' % created_at


def failure(code: str, message: str, *, status: int, retry_after_s: int | None = None) -> dict[str, Any]:
    """Says what went wrong as a response's `error` does; our own code is its reason."""
    if retry_after_s is not None and "try again in" not in message.lower():
        message = f"{message} (try again in {retry_after_s}s)"  # Codex reads its delay there
    return {"code": failure_code(code, status, retry_after_s), "message": message, "reason": code}


def failure_code(code: str, status: int, retry_after_s: int | None) -> str:
    """Gives the dialect's own code: Codex repeats `rate_limit_exceeded` and `server_error`, and nothing else."""
    if code == "context_length_exceeded":
        return code
    if retry_after_s is not None:
        return "rate_limit_exceeded"
    return "invalid_prompt" if status < 500 else "server_error"
