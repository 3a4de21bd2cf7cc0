"""Where memory is read, and what is believed when a GPU does not tell."""

import logging
import os
from collections.abc import Callable

import psutil
import pytest

from tests.support import fake_nvml
from tests.support.fake_nvml import Device, FakeNvml, Process
from workers import nvml
from workers.meter import Meter, occupied_bytes
from workers.nvml import Gpus

GIB = 1 << 30


def gpus(*devices: Device, **fails: fake_nvml.NVMLError) -> Gpus:
    return Gpus(lambda: FakeNvml(*devices, **fails))


def absent() -> object:
    raise ImportError("no pynvml")


def test_all_gpus_count_together_and_each_process_once_per_gpu() -> None:
    """A process that draws and computes is in both of NVML's lists; one on two GPUs holds memory on both."""
    reading = gpus(
        Device(24 * GIB, 10 * GIB, compute=[Process(7, 8 * GIB)], graphics=[Process(7, 8 * GIB), Process(8, GIB)]),
        Device(24 * GIB, 3 * GIB, compute=[Process(7, 2 * GIB), Process(9, None)]),
    ).read()
    assert (reading.total, reading.used, reading.problem) == (48 * GIB, 13 * GIB, "")
    assert reading.by_pid == {7: 10 * GIB, 8: GIB, 9: 0}
    assert reading.held_by([7, 9, 1234]) == 10 * GIB


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gpus(Device(memory_fails=fake_nvml.NVMLError_NotSupported())), "GPU 0 does not tell its memory"),
        (lambda: gpus(Device(256 << 20, 0)), "GPU 0 tells a memory of 256 MB, which cannot be"),
        (lambda: gpus(Device(8 * GIB, 9 * GIB)), "which cannot be"),
        (lambda: gpus(Device(8 * GIB, GIB, compute=[Process(1, 20 * GIB)])), "which cannot be"),
        (lambda: gpus(init_fails=fake_nvml.NVMLError_DriverNotLoaded("Driver Not Loaded")), "NVML does not start"),
        (lambda: gpus(init_fails=fake_nvml.NVMLError_LibraryNotFound()), ""),
        (lambda: Gpus(absent), ""),
    ],
)
def test_where_gpus_do_not_tell_the_systems_memory_counts(
    make: Callable[[], Gpus],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: object,
) -> None:
    """Said in status and once in the log; a machine that has no NVIDIA GPU has nothing to hear about it."""
    monkeypatch.setattr(nvml, "DEVICE_FILE", nvml.Path("/nowhere/nvidiactl"))
    meter = Meter(None, gpus=make())
    with caplog.at_level(logging.WARNING, "warmlane.meter"):
        memory = [meter.host(meter.gpus(), occupied=0, ours=[]) for _ in range(3)][-1]
    assert (memory.source, memory.total) == ("system", psutil.virtual_memory().total)
    assert says in memory.note and bool(says) == bool(memory.note)
    assert len(caplog.records) == bool(says)


def test_a_gpu_without_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "DEVICE_FILE", nvml.Path(os.devnull))
    assert "install warmlane[gpu]" in Gpus(absent).read().problem


def test_unified_memory_still_tells_its_processes() -> None:
    """GB10: no total, but who holds how much. The system's memory counts, and what the GPU holds is added."""
    reading = gpus(Device(memory_fails=fake_nvml.NVMLError_NotSupported(), compute=[Process(7, 5 * GIB)])).read()
    assert (reading.total, reading.held_by([7])) == (0, 5 * GIB)
    assert occupied_bytes(2 * GIB, 5 * GIB, gpus_tell=False) == 7 * GIB


def test_beside_a_gpu_that_tells_one_that_does_not_is_left_out() -> None:
    reading = gpus(
        Device(24 * GIB, GIB),
        Device(memory_fails=fake_nvml.NVMLError_NotSupported(), processes_fail=fake_nvml.NVMLError_NotSupported()),
    ).read()
    assert (reading.total, reading.used) == (24 * GIB, GIB)
    assert reading.problem == "GPU 1 does not tell its memory (NVML_ERROR_NOT_SUPPORTED)"


def test_on_a_gpu_box_the_gpus_memory_counts_and_nothing_beside_it() -> None:
    meter = Meter(None, gpus=gpus(Device(24 * GIB, 5 * GIB)))
    memory = meter.host(meter.gpus(), occupied=99 * GIB, ours=[os.getpid()])
    assert (memory.source, memory.total, memory.used, memory.headroom) == ("gpu", 24 * GIB, 5 * GIB, 19 * GIB)
    assert occupied_bytes(2 * GIB, 5 * GIB, gpus_tell=True) == 5 * GIB
    assert occupied_bytes(2 * GIB, 0, gpus_tell=True) == 2 * GIB, "a runtime's own word where NVML has none"


def test_a_gpu_that_told_once_and_is_lost_counts_as_full() -> None:
    """Falling back to the system's memory would promise 128 GB that are not on the card."""
    fake = FakeNvml(Device(24 * GIB, 5 * GIB))
    meter = Meter(None, gpus=Gpus(lambda: fake))
    assert meter.host(meter.gpus(), occupied=0, ours=[]).headroom == 19 * GIB
    fake.count_fails = fake_nvml.NVMLError_GpuIsLost("GPU is lost")
    lost = meter.host(meter.gpus(), occupied=0, ours=[])
    assert (lost.source, lost.total, lost.headroom) == ("gpu", 24 * GIB, 0)
    assert "GPU is lost" in lost.note
    fake.count_fails = None
    assert meter.host(meter.gpus(), occupied=0, ours=[]).headroom == 19 * GIB


def test_the_operators_word_is_above_all() -> None:
    meter = Meter(1000, gpus=gpus(Device(24 * GIB, 5 * GIB)))
    memory = meter.host(meter.gpus(), occupied=500 << 20, ours=[])
    assert (memory.source, memory.total >> 20, memory.used >> 20, memory.headroom >> 20) == ("limit", 1000, 500, 500)
    assert Meter(100).limited(200 << 20).headroom == 0  # type: ignore[union-attr]
    assert Meter(None).limited(5) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the system does not tell file pages")
def test_file_pages_of_our_models_are_not_available() -> None:
    """The system would drop them for anybody, and the model that is in use would read them again at once."""
    meter = Meter(None, gpus=Gpus(absent))
    reading = meter.gpus()
    alone = meter.host(reading, occupied=0, ours=[])
    both = [meter.host(reading, occupied=0, ours=[os.getpid()] * 200) for _ in range(2)][-1]
    assert both.used > alone.used + (50 << 20), "two hundred times the file pages of a Python"
    assert meter.host(reading, occupied=0, ours=[2**22 + 1]).total == alone.total, "a process that is gone"
