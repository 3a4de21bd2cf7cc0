"""What memory models may use on this machine, for commands that judge a policy before any worker has told."""

import importlib

import psutil
from pydantic import Field

from broker.settings import BrokerSettings, read_settings


class MachineSettings(BrokerSettings):
    """The one setting that a worker of this machine would go by."""

    memory_mb: int | None = Field(None, ge=1)


def machine_memory() -> tuple[int, str]:
    """Gives the bytes that models may use here, and what they are of."""
    if (limit := read_settings(MachineSettings).memory_mb) is not None:
        return limit << 20, "memory for models"
    if gpu := _gpu_bytes():
        return gpu, "GPU memory"
    return psutil.virtual_memory().total, "memory"


def machine_memory_mb() -> int:
    """The same in MB, as the policy counts."""
    return machine_memory()[0] >> 20


def _gpu_bytes() -> int:
    """Adds up the memory of the GPUs, 0 where there are none, or where they share the machine's."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:  # the extra `gpu` is not installed
        return 0
    try:
        nvml.nvmlInit()
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            return sum(int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return 0
