"""How every process logs: one line for each event, and nothing in it that a client has said.

An exception's message may hold what it stumbled over: a key of a dictionary, a number that is none, a piece of a
prompt. So of an error that is not our own only the kind and the places in the code are told.
"""

import logging
import sys
import traceback
from typing import TextIO

from broker.errors import BrokerError

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, 0x85)} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029)
}
"""What ends a line for somebody, or moves a terminal's cursor."""


class Formatter(logging.Formatter):
    """One event, one line; a traceback without the words of its errors."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Keeps whatever a message repeats from looking like a line of ours."""
        return super().formatMessage(record).translate(_CONTROLS)

    def formatException(self, ei: object) -> str:
        """Tells kinds and places, and the words of our own errors only."""
        error = ei[1] if isinstance(ei, tuple) else None
        return "\n".join(_told(error)) if isinstance(error, BaseException) else ""


def begin(level: str, stream: TextIO | None = None) -> None:
    """Sets the process's logging up."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Formatter(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
    sys.excepthook = _last_words


def kind_of(error: BaseException) -> str:
    """Says what an error is, in the words of a line: with its message if it is ours, else by its kind alone."""
    return str(error) if isinstance(error, BrokerError) else type(error).__qualname__


def _last_words(_kind: type[BaseException], error: BaseException, _trace: object) -> None:
    """Tells of an error that ends the process, in the same words as of any other."""
    logging.getLogger("warmlane").critical("event=broke", exc_info=error)


def _told(error: BaseException) -> list[str]:
    lines: list[str] = []
    seen: set[int] = set()
    left: list[tuple[str, BaseException]] = [("", error)]
    while left:
        how, one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        lines.append(f"{how}{type(one).__module__}.{type(one).__qualname__}" + _words_of(one))
        lines += [
            f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(one.__traceback__)
        ]
        if isinstance(one, BaseExceptionGroup):
            left += [("one of them: ", inner) for inner in one.exceptions]
        before = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        if before is not None:
            left.append(("after: ", before))
    return lines


def _words_of(error: BaseException) -> str:
    if isinstance(error, BrokerError):
        return f": {str(error).translate(_CONTROLS)}"
    number = error.errno if isinstance(error, OSError) else None
    return f" ({number})" if number is not None else ""
