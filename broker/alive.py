"""Whether a part of this machine still works: a file in its state directory that its main loop writes.

A file and nothing in Redis: a health check that fails while Redis is away would have a worker killed that waits for it
with its models loaded. The clock is the machine's, which runs on while people set the time of day.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("warmlane.alive")

BEAT_EVERY_S = 1.0
"""A loop that turns more often writes no more often."""

SILENT_S_MAX = 15.0
"""A part that has been silent for longer is stuck; its slowest step, a heartbeat to a Redis that hangs, takes 10 s."""


def file_of(state_dir: Path, part: str) -> Path:
    """Where a part says that it works."""
    return state_dir / f"{part}.alive"


class Pulse:
    """What a part's main loop writes each time around; at a clean end the file goes. systemd hears it too, where it
    has started the part and asked for that (`supervisor` is its socket)."""

    def __init__(
        self, state_dir: Path, part: str, *, clock: Callable[[], float] = time.monotonic, supervisor: str | None = None
    ) -> None:
        self._file = file_of(state_dir, part)
        self._clock = clock
        self._supervisor = os.environ.get("NOTIFY_SOCKET", "") if supervisor is None else supervisor
        self._next = 0.0
        self._failed = False

    def beat(self) -> None:
        """Says that the loop has come round. A directory that cannot be written to stops nobody."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + BEAT_EVERY_S
        self._tell(b"READY=1\nWATCHDOG=1")
        fresh = self._file.with_suffix(".new")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.write_text(f"{now:.3f} {os.getpid()}\n")
            fresh.replace(self._file)
        except OSError as problem:
            if not self._failed:
                log.warning("event=alive_unwritten file=%s reason=%s", self._file, problem.strerror)
            self._failed = True

    def end(self) -> None:
        """Takes the file away."""
        self._tell(b"STOPPING=1")
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _tell(self, words: bytes) -> None:
        """Says it as sd_notify does; `@` stands for the first byte of a name that is no file's."""
        if not self._supervisor:
            return
        name = "\0" + self._supervisor[1:] if self._supervisor.startswith("@") else self._supervisor
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
            there.setblocking(False)
            there.sendto(words, name)


def why_not(state_dir: Path, part: str, *, now_s: float) -> str:
    """Why a part is not alive, in one sentence; "" where it is."""
    file = file_of(state_dir, part)
    try:
        beat_s = float(file.read_text().split()[0])
    except FileNotFoundError:
        return f"no {part} runs on {state_dir}"
    except (OSError, ValueError, IndexError):
        return f"{file} can't be read"
    silent_s = now_s - beat_s
    if silent_s < 0:
        return f"no {part} has run on {state_dir} since this machine was started"
    return "" if silent_s <= SILENT_S_MAX else f"the {part} has been silent for {silent_s:.0f} s"
