"""Newline-delimited JSON as bytes: cuts whole lines out of a stream."""

from broker.dialects.sse import MAX_EVENT_BYTES


class LineCutter:
    """Gives back whole lines, however the network split the bytes; blank ones are dropped."""

    def __init__(self, *, max_line_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_line_bytes = max_line_bytes
        self._tail = bytearray()
        self.overflowed = False  # the unfinished line is over the limit; its bytes are dropped

    def cut(self, data: bytes) -> list[bytes]:
        """Takes bytes in and gives out the lines that are complete now, without their ends."""
        end = data.rfind(b"\n")
        if end < 0:
            self._keep(data)
            return []
        whole = bytes(self._tail) + data[:end] if self._tail else data[:end]
        self._tail.clear()
        self._keep(data[end + 1 :])
        return [line for line in whole.split(b"\n") if line.strip()]

    def rest(self) -> bytes:
        """Gives the bytes of the line that is not complete, and forgets them."""
        rest = bytes(self._tail)
        self._tail.clear()
        return rest

    def _keep(self, data: bytes) -> None:
        self._tail += data
        if len(self._tail) > self._max_line_bytes:
            self._tail.clear()
            self.overflowed = True
