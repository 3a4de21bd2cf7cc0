"""What every reader has in common that reads a chat stream and tells it in the words of another dialect."""

from typing import Any

from broker.dialects.openai_stream import ChatReader, RuntimeComplaint


class ThroughChat:
    """The facts of an answer are those of the chat stream below it. What chat passes on unread may turn out to be no
    JSON when it is translated: then the answer is broken."""

    def __init__(self, chat: ChatReader) -> None:
        self._chat = chat
        self._broken: RuntimeComplaint | None = None

    @property
    def has_content(self) -> bool:
        """Whether text, reasoning or a tool call has come."""
        return self._chat.has_content

    @property
    def succeeded(self) -> bool:
        """Whether there is a finish reason and nothing went wrong."""
        return self._broken is None and self._chat.succeeded

    @property
    def complaint(self) -> RuntimeComplaint | None:
        """What the runtime said went wrong."""
        return self._broken or self._chat.complaint

    @property
    def error(self) -> str | None:
        """What went wrong, in the runtime's words or ours, or None."""
        return self.complaint.message if self.complaint else None

    @property
    def usage(self) -> dict[str, int] | None:
        """The tokens that the runtime counted."""
        return self._chat.usage

    @property
    def timings(self) -> dict[str, Any] | None:
        """The runtime's own timings."""
        return self._chat.timings

    @property
    def prompt_read(self) -> tuple[int, int] | None:
        """Prompt tokens read so far, and of how many."""
        return self._chat.prompt_read

    def _breaks(self) -> None:
        self._broken = RuntimeComplaint("the runtime sent an event that cannot be read", "", None)
