"""How long processes were ready to run and no core was free: time that the machine took, and not what is tested.

A limit in seconds is a promise of the gateway on a machine that lets it run. Where the machine does other things, a
test adds what it took. Linux counts it for each thread (`/proc/<pid>/schedstat`); elsewhere it is 0.
"""

import asyncio
import bisect
import time
from pathlib import Path

EVERY_S = 0.1


class Starvation:
    """Counts it for some processes, from when it was made."""

    def __init__(self, *pids: int) -> None:
        self._files = [Path(f"/proc/{pid}/schedstat") for pid in pids]
        self._before = self._counted_s()

    @property
    def seconds(self) -> float:
        """What all of them together have waited for a core since then."""
        return max(0.0, self._counted_s() - self._before)

    def _counted_s(self) -> float:
        return sum(_waited_ns(file) for file in self._files) / 1e9


def _waited_ns(file: Path) -> int:
    try:
        return int(file.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0


class StarvationLog:
    """The same over a whole run, so that one can ask afterwards about any part of it."""

    def __init__(self, *pids: int) -> None:
        self._starvation = Starvation(*pids)
        self._at_s = [time.time()]
        self._seconds = [0.0]

    async def keep(self) -> None:
        """Notes it again and again, until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            self._at_s.append(time.time())
            self._seconds.append(self._starvation.seconds)

    def between(self, begin_s: float, end_s: float) -> float:
        """What was waited for cores from one instant to another (seconds since 1970), or a little more."""
        begin = max(0, bisect.bisect_right(self._at_s, begin_s) - 1)
        end = min(len(self._at_s) - 1, bisect.bisect_left(self._at_s, end_s))
        return max(0.0, self._seconds[end] - self._seconds[begin])
