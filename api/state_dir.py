"""The directory that one `gateway up` owns: where it is, and the lock that keeps a second one out.

The lock is the kernel's (`flock`), so it goes with the process that held it, however that ended. The file's text only
says who holds it.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class CannotStart(Exception):
    """Why something of `gateway up` can't start, in one sentence for the person who typed it."""


def where(given: Path | None, environ: Mapping[str, str]) -> Path:
    """Says where the data directory is; looks at nothing and makes nothing."""
    if given is None:
        base = environ.get("XDG_STATE_HOME", "")
        # The XDG specification says that a relative path here is to be ignored.
        home = Path(base) if base.startswith("/") else Path.home() / ".local" / "state"
        given = home / "warmlane"
    return given.expanduser().absolute()


def state_dir(given: Path | None, environ: Mapping[str, str]) -> Path:
    """Gives the data directory, made if it wasn't there. What is ours in it is readable by its owner only; a directory
    that was there before keeps the rights that somebody gave it."""
    path = where(given, environ)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"The data directory {path} can't be used: {error.strerror or error}.") from error
    return path


@contextmanager
def only_one_up(directory: Path) -> Iterator[None]:
    """Holds the directory for this process; a second `gateway up` on it is told who has it."""
    path = directory / "up.lock"
    lock = try_lock(path)
    if lock is None:
        holder = path.read_text(errors="replace").strip()
        who = f"process {holder}" if holder.isdecimal() else "another process"
        raise CannotStart(f"`gateway up` already runs on {directory} ({who}); stop it, or choose another --data.")
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def try_lock(path: Path) -> int | None:
    """Locks the file and gives its descriptor, or None where somebody holds it. The lock lasts as long as any copy."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotStart(f"{path} can't be opened: {error.strerror or error}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:  # a file system without locks, as some network shares are
        os.close(descriptor)
        raise CannotStart(f"{path} can't be locked ({error.strerror}); give --data a local directory.") from error
    return descriptor
