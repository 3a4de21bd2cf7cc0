"""Server-sent events as bytes: cuts whole events out of a stream and reads the fields of one."""

from typing import NamedTuple

MAX_EVENT_BYTES = 8 << 20


class EventCutter:
    """Gives back whole events, however the network split the bytes; every line end becomes a plain newline."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._tail = bytearray()
        self._carriage = False
        self.overflowed = False  # the unfinished event is over the limit; its bytes are dropped

    def cut(self, data: bytes) -> bytes:
        """Takes bytes in and gives out all events that are complete now, each with its blank line, or nothing."""
        if self._carriage or b"\r" in data:
            data = self._plain_newlines(data)
        tail = self._tail
        if not tail and data.endswith(b"\n\n"):  # most reads end with an event: no copy
            return data
        # Only the new bytes can complete an event: a huge one in small pieces is not searched again and again.
        search_from = max(0, len(tail) - 1)
        tail += data
        end = tail.rfind(b"\n\n", search_from)
        if end >= 0:
            whole = bytes(tail[: end + 2])
            del tail[: end + 2]
        else:
            whole = b""
        if len(tail) > self._max_event_bytes + 1:  # one more for the newline that may end it already
            tail.clear()
            self.overflowed = True
        return whole

    def rest(self) -> bytes:
        """Gives the bytes of the event that is not complete, and forgets them."""
        rest = bytes(self._tail)
        self._tail.clear()
        return rest

    def _plain_newlines(self, data: bytes) -> bytes:
        """A carriage return at the very end waits for the next bytes: a newline may belong to it."""
        if self._carriage:
            data = b"\r" + data
        self._carriage = data.endswith(b"\r")
        if self._carriage:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


class Event(NamedTuple):
    """What one event says; `stray` is text that is no field of the format, as a proxy writes when it gives up."""

    name: bytes
    data: bytes | None
    stray: bytes


def read_event(event: bytes) -> Event:
    """Reads the lines of one event; comments, ids and retry times are dropped."""
    name = b""
    data: list[bytes] = []
    stray: list[bytes] = []
    for line in event.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.strip()
        elif field not in (b"", b"id", b"retry"):
            stray.append(line)
    return Event(name, b"\n".join(data) if data else None, b"\n".join(stray))
