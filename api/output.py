"""stdout and stderr of a command: a stdout whose failure is known from any other, and a stderr that never stands in the
way. Python itself passes a closed one over, and says of a full disk as it ends that something was ignored.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from api.exit_codes import UNWRITTEN, Failed


class Unwritten(Failed):
    """stdout took not all of it; `more` is what the person must hear all the same."""

    def __init__(self, why: str, more: str = "") -> None:
        super().__init__(f"The output can't be written: {why}.{more and ' '}{more}", UNWRITTEN)
        self.why = why


@contextmanager
def guarded() -> Iterator[None]:
    """The block prints to such streams; what is not written by its end goes nowhere, in silence."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, _Output(sys.stdout)), cast(TextIO, _Complaints(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _let_go(stream)


@contextmanager
def or_else(sentence: str) -> Iterator[None]:
    """Where what the block prints can't be written, the complaint says this too."""
    try:
        yield
        sys.stdout.flush()
    except Unwritten as failure:
        raise Unwritten(failure.why, sentence) from None


class _Stream:
    """Another stream, or one that was closed before we began."""

    def __init__(self, stream: TextIO | None) -> None:
        self._closed = stream is None
        self._stream = io.StringIO() if stream is None else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Output(_Stream):
    """Raises Unwritten, and BrokenPipeError where nobody listens any more."""

    def write(self, text: str) -> int:
        if self._closed and text:
            raise Unwritten("stdout is closed")
        with _known():
            return self._stream.write(text)

    def flush(self) -> None:
        with _known():
            self._stream.flush()


class _Complaints(_Stream):
    """Goes on without the words that nobody gets to see."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def _known() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise Unwritten(problem.strerror or str(problem)) from None


def _let_go(stream: TextIO | None) -> None:
    """Python flushes once more as it ends: by then there must be nothing that fails."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
