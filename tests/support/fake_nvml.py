"""An NVML double: the functions of `pynvml` that we call, over GPUs that a test makes up, with each way they fail."""

from dataclasses import dataclass, field


class NVMLError(Exception):
    """What every failure of NVML is."""


class NVMLError_NotSupported(NVMLError):
    """The device has no such figure (GB10, Jetson)."""


class NVMLError_LibraryNotFound(NVMLError):
    """The machine has no driver."""


class NVMLError_DriverNotLoaded(NVMLError):
    """The driver is installed and does not run."""


class NVMLError_GpuIsLost(NVMLError):
    """The device fell off the bus."""


@dataclass
class Process:
    pid: int
    usedGpuMemory: int | None  # NVML's own word


@dataclass
class Device:
    """One GPU: its figures in bytes, or the failure that asking for them ends in."""

    total: int = 0
    used: int = 0
    compute: list[Process] = field(default_factory=list)
    graphics: list[Process] = field(default_factory=list)
    memory_fails: NVMLError | None = None
    processes_fail: NVMLError | None = None


class FakeNvml:
    """Stands where `import pynvml` would."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    NVMLError_LibraryNotFound = NVMLError_LibraryNotFound

    def __init__(self, *devices: Device, init_fails: NVMLError | None = None) -> None:
        self.devices = list(devices)
        self.init_fails = init_fails
        self.count_fails: NVMLError | None = None

    def nvmlInit(self) -> None:
        if self.init_fails is not None:
            raise self.init_fails

    def nvmlDeviceGetCount(self) -> int:
        if self.count_fails is not None:
            raise self.count_fails
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        return self.devices[index]

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> Device:
        if device.memory_fails is not None:
            raise device.memory_fails
        return device

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device) -> list[Process]:
        if device.processes_fail is not None:
            raise device.processes_fail
        return device.compute

    def nvmlDeviceGetGraphicsRunningProcesses(self, device: Device) -> list[Process]:
        if device.processes_fail is not None:
            raise device.processes_fail
        return device.graphics
