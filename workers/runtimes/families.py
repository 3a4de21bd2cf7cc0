"""Which processes belong to a server.

All who ask share one look at the machine's process table a second: a look reads a file for every process that there is,
and a host asks for each of its models, again and again.
"""

import os
import threading
import time
from pathlib import Path

import psutil

PROC = Path("/proc")
FRESH_S = 1.0


class ProcessTable:
    """Who is whose child, as it was a moment ago. May be asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: dict[int, list[int]] = {}
        self._known: frozenset[int] = frozenset()
        self._read_at = float("-inf")

    def family(self, pid: int) -> list[int]:
        """Lists a process and all below it; nothing where it does not run. One that is younger than the last look is
        looked for."""
        with self._lock:
            if time.monotonic() - self._read_at > FRESH_S or pid not in self._known:
                self._read()
            if pid not in self._known:
                return []
            found = [pid]
            for member in found:
                found += self._children.get(member, ())
            return found

    def _read(self) -> None:
        parents = _parents()
        children: dict[int, list[int]] = {}
        for child, parent in parents.items():
            children.setdefault(parent, []).append(child)
        self._children, self._known, self._read_at = children, frozenset(parents), time.monotonic()


def _parents() -> dict[int, int]:
    """Every process's parent."""
    if not (PROC / "self" / "stat").exists():
        return {process.pid: process.info["ppid"] or 0 for process in psutil.process_iter(["ppid"])}
    found: dict[int, int] = {}
    for name in os.listdir(PROC):
        if name.isdigit():
            try:
                stat = (PROC / name / "stat").read_bytes()
            except OSError:
                continue  # it has ended
            found[int(name)] = int(stat[stat.rindex(b")") + 2 :].split(None, 2)[1])
    return found


TABLE = ProcessTable()
