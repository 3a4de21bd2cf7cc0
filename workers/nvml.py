"""GPU memory by NVML: what this host's GPUs hold, and which process holds how much of it.

The library (`nvidia-ml-py`, extra `gpu`) is imported only where it is installed. Not every GPU tells: on unified memory
(GB10, Jetson) the device's total is NVML_ERROR_NOT_SUPPORTED while processes are still told, and some parts name totals
that cannot be. Whoever asks hears why, in one sentence for the operator.
"""

import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEAST_TOTAL = 1 << 30
"""A GPU that says it has less than this (bytes) is not believed: no model was ever served from one."""

DEVICE_FILE = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class GpuReading:
    """Bytes. `total` 0 = the GPUs do not tell; `problem` says why, "" where there is nothing to say."""

    total: int = 0
    used: int = 0
    by_pid: Mapping[int, int] = field(default_factory=dict)
    problem: str = ""

    def held_by(self, pids: Iterable[int]) -> int:
        """What these processes hold together."""
        return sum(self.by_pid.get(pid, 0) for pid in pids)


class Gpus:
    """The GPUs of this host. A read takes milliseconds, longer on a busy driver: call it in a thread."""

    def __init__(self, load: Callable[[], Any] = lambda: importlib.import_module("pynvml")) -> None:
        self._load = load
        self._nvml: Any = None
        self._opened = False
        self._missing = ""  # why there is no NVML here; looked for once, so that memory does not change its kind
        self._told = GpuReading()
        self._one = threading.Lock()

    def read(self) -> GpuReading:
        """Adds up all GPUs that tell.

        What told once and fails now is believed to be full: memory of another kind is no replacement for it.
        """
        with self._one:
            return self._ask()

    def _ask(self) -> GpuReading:
        if not self._opened:
            self._opened, self._missing = True, self._open()
        if self._nvml is None:
            return GpuReading(problem=self._missing)
        try:
            reading = self._read()
        except self._nvml.NVMLError as error:
            reading = GpuReading(problem=f"NVML does not answer ({error})")
        if reading.total:
            self._told = reading
        elif self._told.total:
            words = f"{reading.problem}: what it told before counts, and all of it as used"
            return GpuReading(self._told.total, self._told.total, reading.by_pid, words)
        return reading

    def _open(self) -> str:
        """Looks for the library and the driver; gives why there is nothing to ask, "" also where none is expected."""
        try:
            nvml = self._load()
        except ImportError:
            words = "there is an NVIDIA GPU but no nvidia-ml-py to ask it (install warmlane[gpu])"
            return words if DEVICE_FILE.exists() else ""
        try:
            nvml.nvmlInit()
        except nvml.NVMLError_LibraryNotFound:
            return ""  # the machine has no NVIDIA driver
        except nvml.NVMLError as error:
            return f"NVML does not start ({error}); restart the worker when it does"
        self._nvml = nvml
        return ""

    def _read(self) -> GpuReading:
        nvml = self._nvml
        total = used = 0
        by_pid: dict[int, int] = {}
        problems = []
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            held = self._processes(device)
            for pid, size in held.items():
                by_pid[pid] = by_pid.get(pid, 0) + size
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(device)
            except nvml.NVMLError_NotSupported:
                problems.append(f"GPU {index} does not tell its memory (NVML_ERROR_NOT_SUPPORTED)")
                continue
            if memory.total < LEAST_TOTAL or memory.used > memory.total or sum(held.values()) > memory.total:
                problems.append(f"GPU {index} tells a memory of {memory.total >> 20} MB, which cannot be")
                continue
            total, used = total + int(memory.total), used + int(memory.used)
        return GpuReading(total, used, by_pid, "; ".join(problems))

    def _processes(self, device: Any) -> dict[int, int]:
        """Bytes by process on one GPU; one that draws and computes is in both lists."""
        nvml, held = self._nvml, dict[int, int]()
        for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            try:
                running = ask(device)
            except nvml.NVMLError_NotSupported:
                continue
            for process in running:
                held[process.pid] = max(held.get(process.pid, 0), process.usedGpuMemory or 0)  # None = it is not told
        return held
