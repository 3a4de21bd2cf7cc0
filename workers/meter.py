"""Where this host's memory is read: the operator's limit, else the GPUs (NVML), else the system (psutil)."""

import logging
from collections.abc import Iterable
from pathlib import Path

import psutil

from workers.memory import HostMemory
from workers.nvml import GpuReading, Gpus

log = logging.getLogger("warmlane.meter")

PROC = Path("/proc")


class Meter:
    """Reads memory. Its reads take milliseconds to seconds (page tables, drivers): call them in a thread."""

    def __init__(self, limit_mb: int | None, *, gpus: Gpus | None = None) -> None:
        self.limit_mb = limit_mb
        self._gpus = gpus or Gpus()
        self._said = ""

    def limited(self, occupied: int) -> HostMemory | None:
        """The operator's limit, of which what our models occupy is used; None where there is none."""
        return None if self.limit_mb is None else HostMemory(self.limit_mb << 20, occupied, source="limit")

    def gpus(self) -> GpuReading:
        """Asks the GPUs; says once in the log why they do not tell."""
        reading = self._gpus.read()
        if reading.problem and reading.problem != self._said:
            log.warning("event=gpu_memory_unknown reason=%s", reading.problem)
        self._said = reading.problem or self._said
        return reading

    def host(self, gpus: GpuReading, *, occupied: int, ours: Iterable[int]) -> HostMemory:
        """Tells the host's memory. `occupied` = what our models occupy (bytes), `ours` = the processes that hold them.

        The system calls mapped file pages available, because it can drop them; those of a model that is in use it
        would have to read again at once, so they count as used.
        """
        limited = self.limited(occupied)
        if limited is not None:
            return limited
        if gpus.total:
            return HostMemory(gpus.total, gpus.used, source="gpu", note=gpus.problem)
        system = psutil.virtual_memory()
        used = system.total - system.available + sum(_page_sum(pid, "Pss_File:") for pid in ours)
        note = f"{gpus.problem}: the system's memory counts" if gpus.problem else ""
        return HostMemory(system.total, min(used, system.total), source="system", note=note)

    def held_by(self, pids: Iterable[int], gpus: GpuReading) -> int:
        """What these processes hold of the memory that counts, in bytes."""
        ids = list(pids)
        if gpus.total:
            return gpus.held_by(ids)
        return sum(_page_sum(pid, "Pss:") for pid in ids) + gpus.held_by(ids)


def occupied_bytes(told: int, on_gpu: int, *, gpus_tell: bool) -> int:
    """What a model takes of the memory that counts here: `told` by its processes or its runtime, `on_gpu` by NVML.

    Where the GPUs' own memory counts, what lies beside it in the system's does not. Where GPUs share the system's
    memory, what they hold is missing from the processes' own figures.
    """
    if gpus_tell:
        return on_gpu or told
    return told + on_gpu


def _page_sum(pid: int, what: str) -> int:
    """One sum over the pages of a process in bytes, shared ones in proportion; 0 where the system does not tell."""
    try:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        return 0
    return 0
