"""One worker of a name on a machine: the lock that says so, and that it leaves nothing behind."""

import fcntl
from pathlib import Path
from typing import Any

import pytest

from workers import host
from workers.host import NameLock
from workers.settings import WorkerSettings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    monkeypatch.setattr(host.tempfile, "gettempdir", lambda: str(tmp_path))
    return WorkerSettings(redis_url="redis://127.0.0.1:1/0", host_name="gpu1")


def take(settings: WorkerSettings) -> NameLock:
    lock = NameLock.take(settings)
    assert lock is not None
    return lock


def test_a_name_is_taken_once_and_leaves_no_file(settings: WorkerSettings, tmp_path: Path) -> None:
    held = take(settings)
    assert NameLock.take(settings) is None
    take(settings.model_copy(update={"host_name": "gpu2"})).close()
    assert len(list(tmp_path.iterdir())) == 1
    held.close()
    assert list(tmp_path.iterdir()) == []
    take(settings).close()


def test_a_lock_on_a_file_that_was_just_taken_away_is_none(
    settings: WorkerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder ends between our open and our lock: a third worker would lock the next file of that name."""
    first = take(settings)
    flock, calls = fcntl.flock, 0

    def late(handle: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            first.close()
        flock(handle, how)

    monkeypatch.setattr(host.fcntl, "flock", late)
    second: Any = take(settings)
    assert calls == 2
    assert NameLock.take(settings) is None
    second.close()
