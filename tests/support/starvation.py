"""How long processes were ready to run and no core was free: time that the machine took, and not what is tested.

A limit in seconds is a promise of the gateway on a machine that lets it run. Where the machine does other things, a
test adds what it took. Linux counts it for each thread (`/proc/<pid>/schedstat`); elsewhere it is 0.
"""

from pathlib import Path


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
