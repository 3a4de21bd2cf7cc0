"""What the parts of `gateway up` have said: a file for each in its data directory, of bounded size, the oldest dropped.

They hold what the terminal has shown, and nothing that a log may not hold. `gateway logs` reads them.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

FOLDER = "logs"
BYTES_MAX = 5_000_000
"""A file that has grown to this is put aside."""

KEPT = 3
"""So many that were put aside are kept beside the one that grows."""

LINE_CHARACTERS_MAX = 16_384


def folder(directory: Path) -> Path:
    """Where they lie under the data directory of a `gateway up`."""
    return directory / FOLDER


class PartLog:
    """The file of one part. A disk that is full or gone takes lines, never the gateway."""

    def __init__(self, directory: Path, part: str, *, bytes_max: int = BYTES_MAX) -> None:
        self._path = folder(directory) / f"{part}.log"
        self._bytes_max = bytes_max
        self._file: TextIO | None = None
        self._size = 0

    def write(self, text: str) -> None:
        """Adds a line."""
        line = text[:LINE_CHARACTERS_MAX] + "\n"
        try:
            if self._file is None:
                self._open()
            if self._size > self._bytes_max:
                self._put_aside()
            assert self._file is not None
            self._file.write(line)
            self._file.flush()
            self._size += len(line.encode())
        except OSError:
            self.close()

    def close(self) -> None:
        """Closes the file; the next line opens it again."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # a last flush on a full disk
                pass

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "a", encoding="utf-8", errors="replace")
        self._size = self._path.stat().st_size

    def _put_aside(self) -> None:
        self.close()
        for number in range(KEPT - 1, 0, -1):
            older = _aside(self._path, number)
            if older.exists():
                older.replace(_aside(self._path, number + 1))
        self._path.replace(_aside(self._path, 1))
        self._open()


def files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Gives part and path of every file that is there, the older of a part first."""
    for path in sorted(folder(directory).glob("*.log")):
        for number in range(KEPT, 0, -1):
            if _aside(path, number).exists():
                yield path.stem, _aside(path, number)
        yield path.stem, path


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
