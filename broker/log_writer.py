"""Where lines go: written a few ms after they were said, many in one write.

Whoever logs a transition is on its way to somebody's first token, and formatting and writing a line takes four times
as long as noting it. Trouble is written at once, and so is what is said outside of the loop.
"""

import asyncio
import logging
import threading
from typing import TextIO

LATER_S = 0.005
"""How long a line may wait. A process that is killed takes those of its last few ms along."""

WAITING_MAX = 1_000
"""Lines that may wait; one more, and all are written."""


class Writer(logging.StreamHandler[TextIO]):
    """A handler that gathers lines while a loop runs."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: list[logging.LogRecord] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_of = 0  # the thread whose loop has it

    def emit(self, record: logging.LogRecord) -> None:
        """Notes a line; the handler's lock is held, as `logging` does."""
        self._waiting.append(record)
        if record.levelno >= logging.WARNING or len(self._waiting) > WAITING_MAX:
            return self._write()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # before the loop, after it, or in a thread beside it
            return self._write()
        if self._timer is None or self._timer.cancelled():
            self._timer, self._timer_of = loop.call_later(LATER_S, self.flush), threading.get_ident()

    def flush(self) -> None:
        """Writes what waits; also at the end of the process."""
        self.acquire()
        try:
            self._write()
        finally:
            self.release()

    def _write(self) -> None:
        if self._timer is not None and self._timer_of == threading.get_ident():  # else it finds nothing to write
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        lines = []
        for record in waiting:
            try:
                lines.append(self.format(record))
            except Exception:  # noqa: BLE001  # as every handler does: a line that cannot be told ends nobody
                self.handleError(record)
        try:
            if lines:
                self.stream.write("\n".join(lines) + "\n")
            self.stream.flush()
        except (OSError, ValueError):  # nobody listens any more
            pass
