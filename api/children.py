"""Child processes of `gateway up`: started, listened to, started again when they die, stopped in peace.

A child leads a process group of its own, so that Ctrl-C in the terminal reaches `up` alone, which then stops its
children in order, and so that what a killed child left running goes with it.
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from api.state_dir import CannotStart
from broker import logs

FIRST_PAUSE_S = 0.2
PAUSE_S_MAX = 5.0
STEADY_S = 30.0
"""A child that lived this long before it died is started again after the first pause."""
LAST_WORDS_S = 1.0
"""How long a child that was asked twice may take before it is killed."""
BAD_SETTING_EXIT = 2
"""What a part ends with when it cannot run as it is set up."""
BAD_SETTING_TRIES = 3
"""So often in a row a part may say so before it is believed: a port may have been taken for a moment."""
LINE_BYTES_MAX = 16_384
"""A longer line of output is passed on in pieces."""

Say = Callable[[str], None]

_TIE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


class Part(Protocol):
    """Something that `up` keeps alive."""

    @property
    def name(self) -> str: ...

    async def start(self) -> None:
        """Returns once it runs; raises CannotStart."""

    async def ended(self) -> str:
        """Waits until it has ended by itself, and says how, as in "was killed by SIGKILL"; raises CannotStart when it
        has ended because of how it is set up, which no other start would change."""

    async def stop(self, *, grace_s: float, hurry: asyncio.Event) -> bool:
        """Ends it and says whether it went by itself; kills it past `grace_s`, or soon after `hurry` is set."""


async def start_process(
    command: Sequence[str], *, env: Mapping[str, str], output: int, keep_open: Sequence[int] = ()
) -> Process:
    """Starts a program that gets SIGTERM when this process dies, be it by SIGKILL (on Linux; elsewhere it lives on)."""
    if sys.platform == "linux":
        # Set by a small program between us and the child: `preexec_fn` isn't safe beside threads.
        command = (sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command)
    try:
        return await asyncio.create_subprocess_exec(
            *command, env=env, stdin=DEVNULL, stdout=output, stderr=STDOUT, process_group=0, pass_fds=keep_open
        )
    except OSError as error:
        raise CannotStart(f"{command[0]} can't be started: {error.strerror or error}.") from error


async def stop_process(process: Process, *, grace_s: float, hurry: asyncio.Event) -> bool:
    """SIGTERM, a second one past the grace, SIGKILL for the whole group at last; True where that wasn't needed."""
    for patience_s, bell in ((grace_s, hurry), (LAST_WORDS_S, None)):
        _signal(process, signal.SIGTERM)
        await _end_or_bell(process, bell, patience_s)
        if process.returncode is not None:
            break
    went_by_itself = process.returncode is not None
    kill_group(process)
    # A program that handles SIGTERM may raise it again at the end, as uvicorn does: that is a clean end too.
    return await process.wait() in (0, -signal.SIGTERM) and went_by_itself


def kill_group(process: Process) -> None:
    """Kills what is left of a child's process group: its own children have nobody to work for any more."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody there; macOS says EPERM for a group of zombies
        pass


def how_it_ended(code: int) -> str:
    """Words for an exit code, as the event loop gives it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _keep_nothing(_line: str) -> None:
    pass


class Child:
    """One program under supervision; each line that it writes is passed on under its name, and kept by `keep`."""

    def __init__(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str], say: Say, keep: Say = _keep_nothing
    ) -> None:
        self._name = name
        self._command = command
        self._env = env
        self._say = say
        self._keep = keep
        self._process: Process | None = None
        self._output: tuple[asyncio.StreamReader, asyncio.ReadTransport] | None = None
        self._half_line = b""
        self._bad_settings = 0  # times in a row

    @property
    def name(self) -> str:
        return self._name

    async def start(self) -> None:
        # A pipe of our own: with asyncio's, `wait` doesn't return while a child of the dead child holds the other end.
        reading, writing = os.pipe()
        try:
            self._process = await start_process(self._command, env=self._env, output=writing)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
        )
        self._output = (reader, transport)

    async def ended(self) -> str:
        assert self._process is not None
        await self._listen(self._process)
        code = await self._process.wait()
        self._bad_settings = self._bad_settings + 1 if code == BAD_SETTING_EXIT else 0
        if self._bad_settings >= BAD_SETTING_TRIES:
            raise CannotStart(f"{self._name} can't run as it is set up; what it says is above.")
        how = how_it_ended(code)
        self._keep(logs.line("WARNING", "up", f"event=part_ended part={self._name} reason={how}"))
        return how

    async def stop(self, *, grace_s: float, hurry: asyncio.Event) -> bool:
        if self._process is None:
            return True
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(self._process), name=f"last words of {self._name}")
            if self._process.returncode is not None:
                return True
            return await stop_process(self._process, grace_s=grace_s, hurry=hurry)

    async def _listen(self, process: Process) -> None:
        """Passes the output on until the child is dead and has been heard out."""
        if self._output is None:
            return
        reader, transport = self._output
        async with asyncio.TaskGroup() as tasks:
            lines = tasks.create_task(self._pass_on_lines(reader), name=f"lines of {self._name}")
            await process.wait()
            kill_group(process)
            # Whoever left the group may hold the pipe for ever.
            await asyncio.wait([lines], timeout=LAST_WORDS_S)
            lines.cancel()
        transport.close()
        self._output = None

    async def _pass_on_lines(self, output: asyncio.StreamReader) -> None:
        while piece := await output.read(LINE_BYTES_MAX):
            *lines, self._half_line = (self._half_line + piece).split(b"\n")
            if len(self._half_line) >= LINE_BYTES_MAX:
                lines, self._half_line = [*lines, self._half_line], b""
            for line in lines:
                self._pass_on(line)
        last, self._half_line = self._half_line, b""
        self._pass_on(last)

    def _pass_on(self, line: bytes) -> None:
        if text := line.decode(errors="replace").rstrip():
            self._say(f"{self._name:<9} | {text}")
            self._keep(text)


def pauses() -> Iterator[float]:
    """How long to wait before the next start: 0.2 s, doubled each time, at most 5 s."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(pause_s * 2, PAUSE_S_MAX)


async def keep_alive(part: Part, *, say: Say) -> None:
    """Starts a part again whenever it dies, with growing pauses, until it is cancelled; raises CannotStart when the
    part itself says that another start would be in vain."""
    clock = asyncio.get_running_loop().time
    waits = pauses()
    while True:
        started = clock()
        how = await part.ended()
        if clock() - started >= STEADY_S:
            waits = pauses()
        for pause_s in waits:
            say(f"{part.name} {how}; starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            try:
                await part.start()
                break
            except CannotStart as problem:
                how = f"did not start ({problem})"


def _signal(process: Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        pass


async def _end_or_bell(process: Process, bell: asyncio.Event | None, patience_s: float) -> None:
    """Waits until the process ends, the bell rings or the patience is over."""
    waiting = [asyncio.ensure_future(process.wait())]
    if bell is not None:
        waiting.append(asyncio.ensure_future(bell.wait()))
    try:
        await asyncio.wait(waiting, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
