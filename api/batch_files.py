"""The three files of a batch run: the requests, which are only read, and the two that grow line by line.

A line is known by an id that is made of what it says: so a second run of the same file finds what the first one wrote
and the jobs that it handed in, whatever happened in between.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from api.exit_codes import USAGE, Failed

ID_PREFIX: Final = "batch_req_"
_BEGINS: Final = b'{"id":"' + ID_PREFIX.encode()
LINE_BYTES_MAX: Final = 20_000_000
"""As long as a request may be."""


class BadLine(Exception):
    """A line that is no request: the sentence says why."""


@dataclass(frozen=True, slots=True)
class Line:
    """Where a request stands in its file; the file may be larger than memory."""

    id: str
    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What a line asks for."""

    custom_id: str
    url: str
    body: dict[str, Any]


class Requests:
    """A file of requests, one a line, as OpenAI's batches have them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as problem:
            raise Failed(f"{path} can't be read: {problem.strerror}.", USAGE) from None
        try:
            _regular(self._file.fileno(), path)
            self.lines = list(_index(self._file))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, line: Line) -> Asked:
        """Reads what a line asks for; raises BadLine."""
        if line.length > LINE_BYTES_MAX:
            raise BadLine(f"line {line.number} is longer than {LINE_BYTES_MAX:,} bytes")
        told = _object(os.pread(self._file.fileno(), line.length, line.offset), line.number)
        custom_id, method, url, body = (told.get(key) for key in ("custom_id", "method", "url", "body"))
        if not isinstance(custom_id, str) or not custom_id:
            raise BadLine(f"line {line.number} has no custom_id")
        if method not in (None, "POST"):
            raise BadLine(f"line {line.number} has a method other than POST")
        if not isinstance(url, str) or not url.startswith("/"):
            raise BadLine(f"line {line.number} has no url, such as /v1/chat/completions")
        if not isinstance(body, dict):
            raise BadLine(f"line {line.number} has no body")
        return Asked(custom_id, url, body)


class Written:
    """A file of outputs: whole lines are added, and what an earlier run left torn is taken away."""

    def __init__(self, path: Path, *, temporary: bool = False) -> None:
        self.path = path
        self._temporary = temporary  # whether it goes again where nothing is to be said
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as problem:
            raise Failed(f"{path} can't be written: {problem.strerror}.", USAGE) from None
        try:
            _regular(self._fd, path)
            self._lock()
            self.ids = self._found()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._fd)
        if self._temporary and not self.ids:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def add(self, line_id: str, told: dict[str, Any]) -> None:
        """Writes one line, whole, and notes its id."""
        left = memoryview(_encoded({"id": line_id} | told))
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as problem:
            raise Failed(f"{self.path} can't be written: {problem.strerror}.") from None
        self.ids.add(line_id)

    def forget(self) -> dict[str, str]:
        """Takes all lines away; gives the jobs that they tell of, by their ids."""
        jobs: dict[str, str] = {}
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for line in file:
                told = json.loads(line)
                if job := (told.get("response") or {}).get("request_id"):
                    jobs[told["id"]] = job
        os.ftruncate(self._fd, 0)
        self.ids = set()
        return jobs

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(self._fd).st_nlink > 0  # else it was another run's, which has just taken it away
        except BlockingIOError:
            free = False
        except OSError:
            free = True  # some network file systems have no locks
        if not free:
            raise Failed(f"Another `gateway batch run` writes {self.path} now.", USAGE)

    def _found(self) -> set[str]:
        """Reads the ids of whole lines and cuts a torn one off; raises Failed for a file of anything else."""
        ids, end = set(), 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for line in file:
                if line.endswith(b"\n") and line.startswith(_BEGINS):
                    ids.add(line[len(_BEGINS) - len(ID_PREFIX) :].split(b'"', 1)[0].decode("ascii", "replace"))
                    end += len(line)
                elif line.endswith(b"\n") or not (line.startswith(_BEGINS) or _BEGINS.startswith(line)):
                    raise Failed(f"{self.path} holds something else than the outputs of a batch run.", USAGE)
        os.ftruncate(self._fd, end)
        return ids


def _regular(fd: int, path: Path) -> None:
    """A pipe or a terminal can't be come back to."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise Failed(f"{path} is no file on a disk.", USAGE)


def _encoded(told: dict[str, Any]) -> bytes:
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON may hold and UTF-8 may not
        return json.dumps(told, separators=(",", ":")).encode() + b"\n"


def _index(file: Any) -> Iterator[Line]:
    seen: Counter[bytes] = Counter()
    offset = 0
    for number, said in enumerate(file, start=1):
        if said.strip():
            digest = hashlib.sha256(said.strip()).digest()
            seen[digest] += 1
            made_of = hashlib.sha256(digest + f" {seen[digest]}".encode())
            yield Line(ID_PREFIX + made_of.hexdigest()[:32], number, offset, len(said))
        offset += len(said)


def _object(said: bytes, number: int) -> dict[str, Any]:
    try:
        told = json.loads(said)
    except (ValueError, RecursionError):
        raise BadLine(f"line {number} is no JSON") from None
    if not isinstance(told, dict):
        raise BadLine(f"line {number} is no object")
    return told
