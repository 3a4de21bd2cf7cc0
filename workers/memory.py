"""Memory of one host: what there is, what a model will need, and which idle models must go to make room. The choice is
a pure function."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

SAFETY = 1.05
"""A load needs a little more than its footprint while it goes on."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes."""

    total: int
    used: int

    @property
    def headroom(self) -> int:
        """What is left for another model."""
        return max(0, self.total - self.used)


@dataclass(frozen=True)
class Resident:
    """A model that occupies memory now."""

    name: str
    footprint: int  # bytes
    load_ms: float
    weight: float
    idle_ms: float  # 0 = busy
    stayed_ms: float
    min_stay_ms: int
    evictable: bool  # warm, not pinned, and not wanted more than what is to be loaded


def host_memory(limit_mb: int | None, residents: Iterable[int]) -> HostMemory:
    """Reads the machine's memory; with a limit, the memory is the limit and what our models occupy counts as used."""
    if limit_mb is not None:
        return HostMemory(limit_mb << 20, sum(residents))
    memory = psutil.virtual_memory()
    return HostMemory(memory.total, memory.total - memory.available)


def predicted_bytes(*, learned: int, memory_mb: int | None, weights: str) -> int:
    """Predicts a model's footprint: learned from its own loads, else `memoryMb`, else the size of its file, else 0."""
    if learned:
        return learned
    if memory_mb is not None:
        return memory_mb << 20
    path = Path(weights)
    try:
        return int(path.stat().st_size * 1.2) if path.suffix == ".gguf" else 0
    except OSError:
        return 0


def evictions(need: int, headroom: int, residents: Iterable[Resident]) -> list[str] | None:
    """Chooses what to unload so that `need` bytes fit; None if even that would not do.

    The model that was idle longest for what a reload of it costs goes first: `idle_ms / (load_ms * weight)`. Never a
    busy one, never one inside its minimum stay.
    """
    if need * SAFETY <= headroom:
        return []
    going: list[str] = []
    able = [r for r in residents if r.evictable and r.idle_ms > 0 and r.stayed_ms >= r.min_stay_ms]
    for r in sorted(able, key=lambda r: r.idle_ms / (max(r.load_ms, 1.0) * r.weight), reverse=True):
        going.append(r.name)
        headroom += r.footprint
        if need * SAFETY <= headroom:
            return going
    return None
