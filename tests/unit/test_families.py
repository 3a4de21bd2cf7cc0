"""Which processes belong to a server, and how often the machine is asked for that."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.support.waiting import block_until
from workers.runtimes import families
from workers.runtimes.families import ProcessTable

NEST = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has a child, which waits for a line."""
    started = subprocess.Popen([sys.executable, "-c", NEST], stdin=subprocess.PIPE)
    block_until(lambda: psutil.Process(started.pid).children(), what="its child runs")
    yield started
    started.communicate(b"\n" if started.poll() is None else None)


def test_a_family_is_a_process_and_all_below_it(parent: subprocess.Popen[bytes]) -> None:
    [child] = psutil.Process(parent.pid).children()
    assert ProcessTable().family(parent.pid) == [parent.pid, child.pid]
    assert ProcessTable().family(child.pid) == [child.pid]


def test_a_process_that_is_not_there_has_no_family() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert ProcessTable().family(gone.pid) == []


def test_many_who_ask_share_a_look_and_a_new_process_is_looked_for(
    parent: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = [0], families._parents

    def counted() -> dict[int, int]:
        looks[0] += 1
        return look()

    monkeypatch.setattr(families, "_parents", counted)
    table = ProcessTable()
    for _ in range(50):
        table.family(parent.pid)
    assert looks == [1]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as younger:
        assert table.family(younger.pid) == [younger.pid]
        assert looks == [2]
        younger.communicate(b"\n")


def test_elsewhere_than_on_linux_the_library_is_asked(
    parent: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(families, "PROC", tmp_path_factory.mktemp("no-proc"))
    [child] = psutil.Process(parent.pid).children()
    assert ProcessTable().family(parent.pid) == [parent.pid, child.pid]
