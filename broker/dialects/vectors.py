"""What readers of vectors have in common in every dialect: an answer is gathered whole, and goes out in pieces."""

from typing import Any

from broker.dialects.openai_stream import RuntimeComplaint

ANSWER_BYTES_MAX = 64 << 20
PIECE_BYTES = 256 << 10
"""The answer goes out in pieces of this size: Redis hangs up on a subscriber that is behind by some megabytes."""


class WholeAnswer:
    """Takes a runtime's bytes in; what they prove to be, a reader says at their end by `_answer` or `_fail`."""

    def __init__(self) -> None:
        self.has_content = False
        self.usage: dict[str, int] | None = None
        self.timings: dict[str, Any] | None = None  # no runtime tells any of vectors
        self.prompt_read: tuple[int, int] | None = None
        self.complaint: RuntimeComplaint | None = None
        self._body = bytearray()
        self._answer = b""
        self._given = 0
        self._ended = False

    @property
    def error(self) -> str | None:
        """What went wrong, in the runtime's words or ours, or None."""
        return self.complaint.message if self.complaint else None

    @property
    def succeeded(self) -> bool:
        """Whether the whole answer is there and holds vectors."""
        return self.has_content

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""
        if self.complaint is not None or self._ended:
            return
        self._body += data
        if len(self._body) > ANSWER_BYTES_MAX:
            self._body.clear()
            self._fail(f"the runtime's answer is longer than {ANSWER_BYTES_MAX >> 20} MiB; send fewer inputs at once")

    def take(self) -> bytes:
        """Gives the next PIECE_BYTES at most of the client's bytes; nothing before the end, or where all is taken."""
        piece = self._answer[self._given : self._given + PIECE_BYTES]
        self._given += len(piece)
        return piece

    def _fail(self, sentence: str) -> None:
        self.complaint = RuntimeComplaint(sentence, "", None)
