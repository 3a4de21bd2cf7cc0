"""Runs a runtime's server as a child of ours: started without a shell, watched while it loads, never left behind.

Three nets keep a server from outliving its worker. `close` stops it. If the worker is killed, the kernel does
(PR_SET_PDEATHSIG, Linux). What still slips through, say the child of a wrapper script, is found by its pidfile when
the next worker starts, or before the model's next start.

The death signal is set by a tiny launcher that then becomes the server (exec keeps it), 10 ms per start, and not by
`preexec_fn`: that runs Python between fork and exec, where another thread's lock can hang it, and it gives up vfork,
which a worker with gigabytes mapped wants. The kernel sends the signal when the *thread* that forked ends, so `start`
must run in the event loop's own thread, never in an executor.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from workers.runtimes.base import LoadFailed, looks_like_oom
from workers.runtimes.families import TABLE

log = logging.getLogger("warmlane.process")

TERM_GRACE_S = 5.0
POLL_S = 0.05
LOG_BYTES_MAX = 8 << 20
LOG_TAIL_BYTES = 8 << 10
MARK = "WARMLANE_CHILD"

_LAUNCHER = """
import os, sys
parent, argv = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(125)
try:
    os.execv(argv[0], argv)
except OSError as error:
    sys.exit(f"cannot run {argv[0]}: {error.strerror}")
"""


def free_port() -> int:
    """Finds a loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fill_command(command: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """Fills the {names} of a command template in, word by word; other braces (JSON in an argument) stay as they are."""
    known = re.compile("|".join(re.escape("{" + name + "}") for name in values))
    return [known.sub(lambda found: str(values[found[0][1:-1]]), word) for word in command]


class ChildServer:
    """One server process and everything it starts, with its log and its pidfile in the state directory."""

    def __init__(self, name: str, *, state_dir: Path) -> None:
        self._name = name
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        self._log = state_dir / f"{stem}.log"
        self._pidfile = state_dir / f"{stem}.pid"
        self._process: asyncio.subprocess.Process | None = None
        self._mark = ""
        self._stopping = False

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.running else None

    async def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """Starts the server, after stopping what an earlier life of this worker left behind."""
        await self.stop()
        await self.stop_orphan()
        program = _program(argv[0])
        if program is None:
            raise LoadFailed(self.lacking_program(argv[0]))
        self._mark = secrets.token_hex(8)
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), program, *argv[1:]]
        with self._fresh_log() as log:
            self._process = await asyncio.create_subprocess_exec(
                *launch,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_child_environment(self._mark, env),
            )
        self._stopping = False
        self._write_pidfile(self._process.pid)

    def lacking_program(self, word: str) -> str:
        """Says that a program is not there, and the remedy; "" = it is."""
        if _program(word) is not None:
            return ""
        words = f"model '{self._name}': the program '{word}' was not found; install it, put it on the PATH, or name"
        return f"{words} another command or a url in the policy"

    async def until_ready(self, ready: Callable[[], Awaitable[bool]], *, timeout_s: float) -> None:
        """Waits until the server says that it is ready; an exit is reported at once, with its last log line."""
        process = self._process
        if process is None:
            raise LoadFailed(f"model '{self._name}': its server was stopped")
        exited = asyncio.create_task(process.wait(), name=f"exit of {self._name}")
        try:
            async with asyncio.timeout(timeout_s):
                while not (await ready() and self.running):
                    await asyncio.wait({exited}, timeout=POLL_S)
                    if process.returncode is not None:
                        raise self._load_failed(process.returncode)
        except TimeoutError:
            raise LoadFailed(f"model '{self._name}' did not load within {timeout_s:g} s{self._last_words()}") from None
        finally:
            exited.cancel()

    async def stop(self) -> None:
        """Ends the server and all that it started: SIGTERM, 5 s, SIGKILL."""
        process, self._stopping = self._process, True
        if process is None:
            return
        try:
            if process.returncode is None:
                _signal_group(process.pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TERM_GRACE_S):
                        await process.wait()
        finally:  # Also when a second Ctrl-C cancels the grace.
            if process.returncode is None:
                _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
        await asyncio.to_thread(_kill_session, process.pid, self._mark, None)
        self._pidfile.unlink(missing_ok=True)
        self._process = None

    async def stop_orphan(self) -> None:
        """Stops the server that a killed worker left running; refuses to touch one whose worker lives."""
        left = await asyncio.to_thread(_read, self._pidfile)
        if left is None:
            return
        owner = _process_of(left["owner"], left["owner_created"])
        if owner is not None and owner.pid != os.getpid():
            raise LoadFailed(
                f"model '{self._name}' is run by another worker (pid {owner.pid}) that uses the same state directory "
                f"{self._pidfile.parent}"
            )
        await asyncio.to_thread(_kill_session, left["pid"], left["mark"], left["created"])
        self._pidfile.unlink(missing_ok=True)

    def memory_bytes(self) -> int | None:
        """Adds up what the server and its children occupy; shared pages count once (PSS) where the system can tell.

        Reads page tables, which takes a while on a large model: call it in a thread.
        """
        self.trim_log()
        return sum(map(occupied, self.process_ids())) or None

    def process_ids(self) -> list[int]:
        """Lists the server's processes, so that GPU memory can be told apart by pid."""
        return TABLE.family(self.pid) if self.pid is not None else []

    def exit_problem(self) -> str | None:
        """Says how the server ended, if it ended without being asked."""
        if self._process is None or self._process.returncode is None or self._stopping:
            return None
        return f"its server {_ended(self._process.returncode)}{self._last_words()}"

    def trim_log(self) -> None:
        """Empties a log that grew too long, keeping the full one beside it (the server appends, so it writes on)."""
        with contextlib.suppress(FileNotFoundError):
            if self._log.stat().st_size > LOG_BYTES_MAX:
                shutil.copyfile(self._log, self._log.with_suffix(".log.1"))
                os.truncate(self._log, 0)

    def last_lines(self, count: int = 1) -> list[str]:
        """Reads the last lines that the server logged."""
        try:
            with self._log.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - LOG_TAIL_BYTES))
                lines = log.read().decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []
        return [line.strip() for line in lines if line.strip()][-count:]

    def _load_failed(self, code: int) -> LoadFailed:
        # SIGKILL that we did not send is nearly always the kernel short of memory.
        oom = looks_like_oom("\n".join(self.last_lines(40))) or code == -signal.SIGKILL
        return LoadFailed(f"model '{self._name}' did not load: its server {_ended(code)}{self._last_words()}", oom)

    def _last_words(self) -> str:
        lines = self.last_lines()
        return f"; its last log line: {lines[0][:300]}" if lines else "; it logged nothing"

    def _fresh_log(self) -> IO[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._log.replace(self._log.with_suffix(".log.1"))
        return self._log.open("ab")

    def _write_pidfile(self, pid: int) -> None:
        record = {
            "pid": pid,
            "created": _created(pid) or 0.0,
            "mark": self._mark,
            "owner": os.getpid(),
            "owner_created": _created(os.getpid()),
        }
        draft = self._pidfile.with_suffix(".pid.new")
        draft.write_text(json.dumps(record))
        draft.replace(self._pidfile)


def stop_orphans(state_dir: Path) -> None:
    """Stops every server that killed workers left running, with its pidfile: its model may never be loaded again. Those
    of a living worker stay, and so does a file that is none of ours. May take seconds: call it in a thread."""
    for pidfile in state_dir.glob("*.pid"):
        left = _read(pidfile)
        if left is None or _process_of(left["owner"], left["owner_created"]) is not None:
            continue
        log.info("event=left_behind pidfile=%s pid=%d", pidfile, left["pid"])
        _kill_session(left["pid"], left["mark"], left["created"])
        pidfile.unlink(missing_ok=True)


def _read(pidfile: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(pidfile.read_text())
        int(record["pid"]), float(record["created"]), str(record["mark"])
        int(record["owner"]), float(record["owner_created"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(record)


def _program(word: str) -> str | None:
    found = shutil.which(word)
    return os.path.abspath(found) if found else None


def _child_environment(mark: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    """Gives the child our environment without our own settings: a runtime has no business with keys or Redis."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    return {**ours, **(extra or {}), MARK: mark}


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _kill_session(leader_pid: int, mark: str, leader_created: float | None) -> None:
    """Stops every process of a session that carries our mark; a reused pid does not, so a stranger is never hit."""
    members = [process for process in psutil.process_iter() if _is_member(process, leader_pid, mark, leader_created)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        give_up_at = time.monotonic() + TERM_GRACE_S
        for process in members:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        while (members := [process for process in members if _is_alive(process)]) and time.monotonic() < give_up_at:
            time.sleep(POLL_S)


def _is_alive(process: psutil.Process) -> bool:
    """Tells a living process from a dead one whose new parent takes its time to notice: that one holds no memory."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_member(process: psutil.Process, leader_pid: int, mark: str, leader_created: float | None) -> bool:
    try:
        if os.getsid(process.pid) != leader_pid:
            return False
        return process.environ().get(MARK) == mark
    except psutil.AccessDenied:  # A program with file capabilities hides its environment; its birthday still tells.
        return leader_created is not None and _process_of(leader_pid, leader_created) == process
    except (psutil.Error, OSError):
        return False


def _process_of(pid: int, created: float) -> psutil.Process | None:
    """Finds the process that a pidfile meant; a later one with the same number is another."""
    found = _created(pid)
    return psutil.Process(pid) if found is not None and abs(found - created) < 2.0 else None


def _created(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def occupied(pid: int) -> int:
    """Tells a process's host memory in bytes, shared pages by share (PSS) where the system can tell."""
    try:
        process = psutil.Process(pid)
        try:
            full = process.memory_full_info()
        except psutil.AccessDenied:
            return int(process.memory_info().rss)
        return int(getattr(full, "pss", 0) or full.rss)
    except psutil.NoSuchProcess:
        return 0


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
