"""Who reads a runtime's answer, and who reads the rest of one that an earlier attempt began."""

from typing import Any, Protocol

from broker.dialects import going_on
from broker.dialects.openai_stream import RuntimeComplaint
from broker.dialects.partial import Partial
from broker.dialects.responses_stream import ResponsesReader


class AnswerReader(Protocol):
    """Takes a runtime's bytes in and gives the client's out."""

    @property
    def has_content(self) -> bool:
        """Whether a first token has come."""

    @property
    def succeeded(self) -> bool:
        """Whether the answer is whole."""

    @property
    def error(self) -> str | None:
        """What went wrong, or None."""

    @property
    def complaint(self) -> RuntimeComplaint | None:
        """The same, as the runtime said it."""

    @property
    def usage(self) -> dict[str, int] | None:
        """The tokens that the runtime counted."""

    @property
    def timings(self) -> dict[str, Any] | None:
        """The runtime's own timings, where it tells them."""

    @property
    def prompt_read(self) -> tuple[int, int] | None:
        """Prompt tokens read so far, and of how many, where it tells them."""

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""

    def end(self) -> None:
        """Tells that the runtime closed the answer."""

    def take(self) -> bytes:
        """Gives the client's bytes that are ready."""


class ContinuedReader:
    """Brings the reader of the answer's dialect to where the answer broke off, and feeds it the rest."""

    timings: dict[str, Any] | None = None  # the runtime tells those of the last part only

    def __init__(self, reader: AnswerReader, partial: Partial, *, model: str, echoes: bool, completion: bool) -> None:
        self._reader = reader
        self._rest = going_on.Rest(partial, echoes=echoes, completion=completion)
        if partial.text:
            reader.feed(going_on.first_chunk(partial, model, completion=completion))
            reader.take()  # its client has it
        if isinstance(reader, ResponsesReader):
            reader.count_from(partial.next_number)

    @property
    def has_content(self) -> bool:
        """Whether anything new has come."""
        return self._rest.begun

    @property
    def succeeded(self) -> bool:
        """Whether the answer is whole."""
        return self._rest.complaint is None and self._reader.succeeded

    @property
    def complaint(self) -> RuntimeComplaint | None:
        """What the runtime said went wrong."""
        return self._rest.complaint or self._reader.complaint

    @property
    def error(self) -> str | None:
        """The same in words, or None."""
        return self.complaint.message if self.complaint else None

    @property
    def usage(self) -> dict[str, int] | None:
        """The tokens of the whole answer."""
        return self._reader.usage

    @property
    def prompt_read(self) -> tuple[int, int] | None:
        """Prompt tokens read so far, and of how many."""
        return self._rest.prompt_read

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""
        self._reader.feed(self._rest.feed(data))

    def end(self) -> None:
        """Tells that the runtime closed the answer."""
        self._reader.feed(self._rest.rest())
        self._reader.end()

    def take(self) -> bytes:
        """Gives the client's bytes that are ready."""
        return self._reader.take()
