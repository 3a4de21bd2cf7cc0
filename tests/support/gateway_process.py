"""`gateway` as people run it: the installed command as a process of its own, what it says, and who belongs to it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil

from broker.model_life import ARROWS
from tests.support.waiting import block_until
from tests.support.worker_world import Runtime

START_S_MAX = 60.0
STOP_S_MAX = 20.0
COMMAND_S_MAX = 40.0

_WORDS = {"api": "api.app", "scheduler": "workers.scheduler", "worker": "workers.host", "redis": "-server"}
_NOWHERE = "http://127.0.0.1:1"


def gateway_program() -> str:
    """The command that the package installs beside this Python."""
    return str(Path(sys.executable).with_name("gateway"))


def environment(**settings: str) -> dict[str, str]:
    """The environment of a person who has set nothing: no settings of this shell, no runtime of this machine."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PYTHONPATH"))}
    found = {"GATEWAY_OLLAMA_URL": _NOWHERE, "GATEWAY_LLAMA_SERVER_URL": _NOWHERE, "GATEWAY_VLLM_URL": _NOWHERE}
    return {**ours, **found, **settings}


def gateway(*words: str, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end; stdout and stderr are apart."""
    command = [gateway_program(), *words]
    return subprocess.run(
        command, cwd=cwd, env=environment(**settings), capture_output=True, text=True, timeout=COMMAND_S_MAX
    )


class GatewayProcess:
    """A `gateway up`, or a part of it alone, whose output is read along."""

    def __init__(self, *words: str, cwd: Path | None = None, **settings: str) -> None:
        self.lines: list[str] = []
        self._popen = subprocess.Popen(
            [gateway_program(), *words],
            cwd=cwd,
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._ears = threading.Thread(target=self._listen, name="ears of the gateway", daemon=True)
        self._ears.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def output(self) -> str:
        """Everything that it has said so far."""
        return "\n".join(self.lines)

    def says(self, *words: str) -> bool:
        """Whether some line holds all these words."""
        return any(all(word in line for word in words) for line in list(self.lines))

    def until_said(self, *words: str, timeout_s: float = START_S_MAX) -> str:
        """Waits for a line that holds all these words, and gives it."""
        block_until(lambda: self.says(*words) or not self.running, what=f"{words} said", timeout_s=timeout_s)
        assert self.says(*words), f"never said {words}:\n{self.output}"
        return next(line for line in self.lines if all(word in line for word in words))

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def exit(self, timeout_s: float = STOP_S_MAX) -> int:
        """Waits for its end and hears it out; gives the exit code."""
        code = self._popen.wait(timeout_s)
        self._ears.join(5)
        return code

    def stop(self) -> int:
        """Ctrl-C, as typed once; gives the exit code."""
        self.signal(signal.SIGINT)
        return self.exit()

    def kill(self) -> None:
        """SIGKILL, and its last words are heard."""
        self._popen.kill()
        self._popen.wait(STOP_S_MAX)
        self._hear_out()

    def end(self) -> None:
        """Ends it for good with all that it started, whatever state it is in."""
        family = self.family() if self.running else []
        if self.running:
            self.signal(signal.SIGINT)
            try:
                self._popen.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        for process in family:
            if is_alive(process):
                process.kill()
        self._hear_out()

    def family(self) -> list[psutil.Process]:
        """The process and everything below it, now."""
        try:
            me = psutil.Process(self.pid)
            return [me, *me.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _hear_out(self) -> None:
        """Reads what is left; its end of the pipe is the last one, since runtimes log into files."""
        self._ears.join(5)
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def _listen(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.lines.append(line.rstrip("\n"))


class House(GatewayProcess):
    """A `gateway up` with a data directory of its own."""

    def __init__(self, data: Path, *, policy: str | None = None, cwd: Path | None = None, **settings: str) -> None:
        self.data = data
        words = ["up", "--data", str(data), "--port", "0"]
        if policy is not None:
            file = data.with_suffix(".yaml")
            file.write_text(policy)
            words += ["--policy", str(file)]
        super().__init__(*words, cwd=cwd, **settings)

    @property
    def url(self) -> str:
        """Where it listens, once it has said so."""
        found = re.search(r"listens on (http://\S+),", self.output)
        assert found is not None, self.output
        return found[1]

    @property
    def redis_url(self) -> str:
        return (self.data / "redis" / "url").read_text().strip()

    def ready(self) -> "House":
        """Waits until the api answers."""
        self.until_said("ready ")
        return self

    def until_state(self, model: str, state: str, *, timeout_s: float = START_S_MAX) -> None:
        """Waits until its worker calls a model so, as its log says."""
        self.until_said(f"event=model_state model={model} ", f"to={state}", timeout_s=timeout_s)

    def part(self, name: str) -> psutil.Process | None:
        """The process of a part: api, scheduler, worker or redis; None while it is away."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return None
        for child in children:
            try:
                # Between fork and exec a child's words are those of the small program that ties it to its parent.
                words = child.cmdline()
                if "-I" not in words[:2] and any(_WORDS[name] in word for word in words) and is_alive(child):
                    return child
            except psutil.Error:
                continue
        return None

    def kill_part(self, name: str) -> int:
        """SIGKILLs a part; gives the pid that it had."""
        found: list[psutil.Process] = []

        def seen() -> bool:
            part = self.part(name)
            found[:] = [part] if part is not None else []
            return bool(found)

        block_until(seen, what=f"{name} runs", timeout_s=START_S_MAX)
        found[0].kill()
        return found[0].pid

    def runtime(self, model: str) -> Runtime:
        """The simulated server that its worker started for a model."""
        return Runtime(self.data, model)

    def command(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Runs a client command against it."""
        return gateway(*words, GATEWAY_URL=self.url, **settings)

    def status(self) -> dict[str, Any]:
        """What `gateway status --json` prints."""
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that waits to be buried does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def house(data: Path, *, policy: str | None = None, cwd: Path | None = None, **settings: str) -> Iterator[House]:
    """A whole gateway that answers, for the length of the block. Whatever it says, it never says a traceback."""
    up = House(data, policy=policy, cwd=cwd, **settings)
    try:
        yield up.ready()
        assert up.running, f"ended by itself:\n{up.output}"
    finally:
        up.end()
    tells_no_traceback(up.output)
    moves_by_the_table(up.output)


@asynccontextmanager
async def started(data: Path, text: str) -> AsyncIterator[House]:
    """A gateway; the loop goes on while it starts and ends, since its runtimes are served there."""
    opened = house(data, policy=text)
    up = await asyncio.to_thread(opened.__enter__)
    try:
        yield up
    finally:
        await asyncio.to_thread(opened.__exit__, None, None, None)


@contextmanager
def process(*words: str, cwd: Path | None = None, **settings: str) -> Iterator[GatewayProcess]:
    """One command that runs for the length of the block at most."""
    started = GatewayProcess(*words, cwd=cwd, **settings)
    try:
        yield started
    finally:
        started.end()


def tells_no_traceback(text: str) -> None:
    """Fails where somebody is shown the inside of a program."""
    assert "Traceback (most recent call last)" not in text, text
    places = re.findall(r"^.*\.py:\d+ in \w+$", text, re.MULTILINE)  # as `broker/logs` writes one
    assert not places, text


def moves_by_the_table(text: str) -> None:
    """Fails where a log tells that a model moved as no arrow of its life leads."""
    for line, before, after in re.findall(r"(event=model_state \S+ from=(\w+) to=(\w+).*)", text):
        assert after in ARROWS[before], line


__all__ = [
    "GatewayProcess", "House", "environment", "gateway", "gateway_program", "house", "is_alive",
    "moves_by_the_table", "process", "started", "tells_no_traceback",
]  # fmt: skip
