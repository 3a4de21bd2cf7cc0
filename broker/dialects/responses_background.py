"""The events of a response that is made in the background, numbered alike for whoever follows it, whenever.

The gateway tells two events of its own, that the response was created and that it is queued, as if they stood before
the log; the worker's `response.created` is left out for them. All other numbers are those of the worker, one later.
Of a wait only comments tell, for they have no numbers.

Nobody who follows endangers a background response: where its worker is lost, the answer is made anew, and what was told
of it is void. The dialect has no word for that, so each attempt counts from a million on its own: a number says of
which attempt its client has heard, and one of an attempt that is void can be told from all others.
"""

from typing import Any, Final, Literal

from broker.dialects.responses_object import CREATED, FAILED, NUMBER, QUEUED, ResponseObject, event

OPENING: Final = 2
"""The events before the worker's."""
ATTEMPT: Final = 1_000_000
"""So many numbers each attempt has; an answer of as many events would be larger than the gateway tells."""


def stands(after: int, attempt: int, seq: int) -> bool:
    """Whether event number `after` is part of what the log holds, whose first frame this is."""
    return after < OPENING or (seq == 1 and _before(attempt) == _of(after))


class BackgroundEvents:
    """What one client hears: the events behind number `after` (-1 = all of them)."""

    def __init__(self, body: bytes, *, job_id: str, model: str, after: int = -1) -> None:
        self.last = after  # the number of the last event that the client has
        self._object = ResponseObject(body, job_id=job_id, model=model)
        self._counted = 0

    def opening(self) -> bytes:
        """Says that there is such a response, and that it waits."""
        queued = self._object.state("queued")
        slim = self._object.slim() | {"status": "queued"}
        return self._tell(0, event(CREATED, 0, response=queued)) + self._tell(1, event(QUEUED, 1, response=slim))

    def passing(self, attempt: int, data: bytes) -> bytes:
        """Counts the events of one frame, whole ones as a worker wrote them; gives those that the client has not."""
        before, told = _before(attempt), []
        for one in data.split(b"\n\n"):
            found = NUMBER.search(one)
            if found is None or found[2] == b"0":  # nothing, or the worker's `response.created`
                continue
            self._counted = before + int(found[2]) + 1
            told.append(
                self._tell(self._counted, b"%s%d%s\n\n" % (one[: found.start(2)], self._counted, one[found.end(2) :]))
            )
        return b"".join(told)

    def goes_on(self, attempt: int) -> bool:
        """Whether a frame of this attempt belongs to what the client has been told of the answer, if anything."""
        return self.last < OPENING or _before(attempt) == _of(self.last)

    def ended(self, attempt: int, status: Literal["failed", "cancelled"], error: dict[str, Any] | None) -> bytes:
        """Says that it came to no good end. There is no event of its own for a cancel; the response's status tells."""
        number = max(self._counted, _before(attempt) + OPENING - 1) + 1
        return self._tell(number, event(FAILED, number, response=self._object.state(status, error=error)))

    def broken(self, code: str, message: str) -> bytes:
        """Says that the stream ends and the response does not, in the words that make SDKs raise. It is no event of the
        response: its number is the last one's, so that whoever goes on from it misses nothing."""
        error = {"code": code, "message": message}
        return event("error", max(self.last, 0), **error, param=None, error=error)

    def _tell(self, number: int, said: bytes) -> bytes:
        if number <= self.last:
            return b""
        self.last = number
        return said


def _before(attempt: int) -> int:
    """The number before an attempt's first."""
    return max(attempt - 1, 0) * ATTEMPT


def _of(number: int) -> int:
    """The same, of the attempt that an event's number belongs to."""
    return (number - OPENING) // ATTEMPT * ATTEMPT
