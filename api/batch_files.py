"""The three files of a batch run: the requests, which are only read, and the two that grow line by line. What counts no
more of those is left out at a run's end, all at once.

A line is known by an id that is made of what it says: so a second run of the same file finds what the first one wrote
and the jobs that it handed in, whatever happened in between.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, KeysView
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from api.exit_codes import UNWRITTEN, USAGE, Failed

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
    """A file of outputs: whole lines are added, and what an earlier run left torn is taken away. Of lines with the same
    id the last counts."""

    def __init__(self, path: Path, *, temporary: bool = False) -> None:
        self.path = path
        self._temporary = temporary  # whether it goes again where nothing is to be said
        self._stale = False  # whether lines stand in it that count no more
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as problem:
            raise Failed(f"{path} can't be written: {problem.strerror}.", USAGE) from None
        try:
            _regular(self._fd, path)
            self._lock()
            self._begins = self._found()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._fd)
            if self._temporary and not self.ids:
                self.path.unlink(missing_ok=True)
            elif self._stale:
                self._tidy()
        except OSError as problem:
            raise self._unwritten(problem) from None
        finally:
            os.close(self._fd)

    @property
    def ids(self) -> KeysView[str]:
        """Those of the lines that count."""
        return self._begins.keys()

    def add(self, line_id: str, told: dict[str, Any]) -> None:
        """Writes one line, whole; one of the same id that stood there before counts no more."""
        left = memoryview(_encoded({"id": line_id} | told))
        begin = os.fstat(self._fd).st_size
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as problem:
            os.ftruncate(self._fd, begin)  # else the next line would go on from what came of this one
            raise self._unwritten(problem) from None
        self._stale |= line_id in self._begins
        self._begins[line_id] = begin

    def take_away(self, line_ids: Iterable[str]) -> None:
        """Has lines count no more. They stand in the file until its end, so that a kill loses nothing."""
        for line_id in line_ids:
            self._stale |= self._begins.pop(line_id, None) is not None

    def jobs(self) -> dict[str, str]:
        """The jobs that the lines tell of, by their ids, "" where there was none."""
        told = map(json.loads, self._counting())
        return {one["id"]: (one.get("response") or {}).get("request_id") or "" for one in told}

    def _counting(self) -> Iterator[bytes]:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            for begin in sorted(self._begins.values()):
                file.seek(begin)
                yield file.readline()

    def _tidy(self) -> None:
        """Leaves the lines that count, in a file that takes this one's name: a kill leaves either of them, whole."""
        path = self.path.resolve()
        tidy = path.with_name(f".{path.name}.new")
        try:
            with tidy.open("wb") as file:
                os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(self._fd).st_mode))
                file.writelines(self._counting())
                file.flush()
                os.fsync(file.fileno())
            os.replace(tidy, path)
        except BaseException:
            tidy.unlink(missing_ok=True)
            raise

    def _unwritten(self, problem: OSError) -> Failed:
        return Failed(f"{self.path} can't be written: {problem.strerror}.", UNWRITTEN)

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

    def _found(self) -> dict[str, int]:
        """Reads where the whole lines that count begin, by their ids, and cuts a torn one off; raises Failed for a file
        of anything else."""
        begins: dict[str, int] = {}
        end = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for line in file:
                if line.endswith(b"\n") and line.startswith(_BEGINS):
                    line_id = line[len(_BEGINS) - len(ID_PREFIX) :].split(b'"', 1)[0].decode("ascii", "replace")
                    self._stale |= line_id in begins
                    begins[line_id] = end
                    end += len(line)
                elif line.endswith(b"\n") or not (line.startswith(_BEGINS) or _BEGINS.startswith(line)):
                    raise Failed(f"{self.path} holds something else than the outputs of a batch run.", USAGE)
        os.ftruncate(self._fd, end)
        return begins


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
