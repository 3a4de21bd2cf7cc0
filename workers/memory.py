"""Memory of one host, as pure decisions: what a model will need, which idle models must go to make room for it, and
whether it can ever fit."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from broker.policy.warm_together import FILE_SHARE

SAFETY = 1.05
"""A load needs a little more than its footprint while it goes on."""

FITS_AGAIN = 1.05
"""One that cannot fit fits again only with this much to spare, so that the answer does not flap."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes."""

    total: int
    used: int
    source: Literal["limit", "gpu", "system"] = "system"
    note: str = ""  # why it is not the GPUs' memory, where one would expect that

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


def predicted_bytes(*, learned_here: int, memory_mb: int | None, learned_elsewhere: int, file_bytes: int) -> int:
    """Predicts a model's footprint: learned on this host, else `memoryMb`, else learned on another host, else from the
    size of its file; 0 = nothing is known."""
    if learned_here:
        return learned_here
    if memory_mb is not None:
        return memory_mb << 20
    return learned_elsewhere or int(file_bytes * FILE_SHARE)


def fits(need: int, free: float) -> bool:
    """Whether a load of `need` bytes may start where so many are free."""
    return need * SAFETY <= free


def cannot_fit(need: int, *, headroom: int, idle_could_leave: int, returning: int, before: bool) -> bool:
    """Whether a model cannot fit on the host whatever our other models leave (`idle_could_leave`: all that may ever go,
    busy ones too, for they will be idle).

    Memory that is on its way back (`returning`) keeps a model from being called unfit, but does not make one that was
    (`before`) fit: it may never come.
    """
    if before:
        return need * SAFETY * FITS_AGAIN > headroom + idle_could_leave
    return need * SAFETY > headroom + idle_could_leave + returning


def may_go(residents: Iterable[Resident]) -> list[Resident]:
    """Those that may be unloaded now, the one whose loss costs least first."""
    able = [r for r in residents if r.evictable and r.idle_ms > 0 and r.stayed_ms >= r.min_stay_ms]
    return sorted(able, key=lambda r: r.idle_ms / (max(r.load_ms, 1.0) * r.weight), reverse=True)


def evictions(need: int, headroom: float, residents: Iterable[Resident]) -> list[str] | None:
    """Chooses what to unload so that `need` bytes fit; None if even that would not do.

    The model that was idle longest for what a reload of it costs goes first: `idle_ms / (load_ms * weight)`; of those
    chosen, whoever turns out not to be needed stays. Never a busy one, never one inside its minimum stay.
    """
    if fits(need, headroom):
        return []
    going: list[Resident] = []
    for r in may_go(residents):
        going.append(r)
        headroom += r.footprint
        if fits(need, headroom):
            break
    else:
        return None
    for r in reversed(going[:-1]):
        if fits(need, headroom - r.footprint):
            headroom -= r.footprint
            going.remove(r)
    return [r.name for r in going]
