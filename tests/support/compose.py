"""compose.yaml as a compose engine reads it, as far as it is needed to run a service as a process of this machine."""

import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from api.embedded_redis import find_program
from tests.support.gateway_process import environment
from tests.support.waiting import block_until

_VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")
_LENGTH = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")

CHECK_EVERY_S = 0.25

VALKEY_CLI = f"""#!{sys.executable}
# Stands in for valkey-cli, which is in the image and on few other machines: `-e` makes an error its exit code.
import os, socket, sys
words = [word for word in sys.argv[1:] if word != "-e"]
with socket.create_connection(("127.0.0.1", int(os.environ["REDIS_PORT"])), timeout=2) as server:
    server.sendall((" ".join(words) + "\\r\\n").encode())
    said = server.recv(100).decode()
print(said[1:].strip())
sys.exit(said.startswith("-"))
"""


def interpolated(value: Any, environ: Mapping[str, str]) -> Any:
    """Fills in `${NAME}`, `${NAME:-default}` and `${NAME:?why it must be set}`; raises ValueError with the why."""
    if isinstance(value, dict):
        return {key: interpolated(part, environ) for key, part in value.items()}
    if isinstance(value, list):
        return [interpolated(part, environ) for part in value]
    if not isinstance(value, str):
        return value

    def fill(found: re.Match[str]) -> str:
        name, rule, rest = found.groups()
        there = environ.get(name)
        if there or (there is not None and rule in ("-", "?")):
            return there
        if rule in (":?", "?"):
            raise ValueError(f"{name}: {rest}")
        return rest or ""

    return _VARIABLE.sub(fill, value)


def seconds(length: str) -> float:
    """Reads a duration such as `1m30s`."""
    found = _LENGTH.fullmatch(length)
    assert found is not None and found[0], f"{length!r} is no duration"
    hours, minutes, rest = (float(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + rest


@dataclass(frozen=True)
class Service:
    """One service of the file."""

    name: str
    said: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        command = self.said.get("command", [])
        return shlex.split(command) if isinstance(command, str) else list(command)

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.said.get("environment", {}).items()}

    @property
    def check(self) -> list[str]:
        """The words of its health check."""
        kind, *words = self.said["healthcheck"]["test"]
        assert kind == "CMD"
        return words

    @property
    def needs(self) -> list[str]:
        """Services that must be healthy before it starts."""
        told = self.said.get("depends_on", {})
        assert all(how["condition"] == "service_healthy" for how in told.values())
        return list(told)

    @property
    def profiles(self) -> list[str]:
        return list(self.said.get("profiles", []))

    @property
    def stop_grace_s(self) -> float:
        return seconds(self.said["stop_grace_period"])


def services(path: Path, environ: Mapping[str, str]) -> dict[str, Service]:
    """Reads a file with this environment; raises ValueError where a variable that must be set is not."""
    told = interpolated(yaml.safe_load(path.read_text()), environ)
    return {name: Service(name, said) for name, said in told["services"].items()}


def in_order(there: Mapping[str, Service]) -> Iterator[list[Service]]:
    """Gives the services that may start together, after those that they need."""
    given: set[str] = set()
    while len(given) < len(there):
        ready = [s for s in there.values() if s.name not in given and given.issuperset(s.needs)]
        assert ready, f"in a circle: {there.keys() - given}"
        yield ready
        given.update(service.name for service in ready)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has just now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Here:
    """Services as processes of this machine: their hosts are 127.0.0.1, their ports free ones."""

    directory: Path
    ports: Mapping[str, int]
    """`host:port` as the file says it -> the port here."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.directory / "bin"
        programs.mkdir()
        (programs / "valkey-server").symlink_to(find_program(os.environ).path)
        cli = programs / "valkey-cli"
        cli.write_text(VALKEY_CLI)
        cli.chmod(cli.stat().st_mode | stat.S_IXUSR)
        self._path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def settings(self, service: Service) -> dict[str, str]:
        """The environment of a service here, with what its image sets."""
        home = self.directory / service.name
        home.mkdir(exist_ok=True)
        ours = {name: self._here(value) for name, value in service.environment.items()}
        port = str(self.ports["redis:6379"])
        return environment(**ours, PATH=self._path, GATEWAY_STATE_DIR=str(home), REDIS_PORT=port)

    def start(self, service: Service) -> None:
        words = service.command
        if service.name == "redis":
            words = [*words, "--bind", "127.0.0.1", "--port", str(self.ports["redis:6379"])]
        home, settings = self.directory / service.name, self.settings(service)
        with (home / "log").open("wb") as log:
            self.processes[service.name] = subprocess.Popen(
                words, cwd=home, env=settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def check(self, service: Service) -> subprocess.CompletedProcess[str]:
        """Runs its health check once."""
        limit_s = seconds(service.said["healthcheck"]["timeout"])
        return subprocess.run(
            service.check, env=self.settings(service), capture_output=True, text=True, timeout=max(10.0, limit_s)
        )

    def until_healthy(self, service: Service) -> None:
        """Waits for its first good check, as long as the file gives it."""
        check = service.said["healthcheck"]
        limit_s = seconds(check.get("start_period", "0s")) + seconds(check["interval"]) * check["retries"]
        process = self.processes[service.name]

        def healthy() -> bool:
            assert process.poll() is None, self.log(service)
            time.sleep(CHECK_EVERY_S)  # a check is a process, and would take the CPU that the service starts with
            return self.check(service).returncode == 0

        block_until(healthy, what=f"{service.name} is healthy: {self.log(service)}", timeout_s=limit_s)

    def stop(self, *together: Service) -> dict[str, int]:
        """SIGTERM to all of them; gives their exit codes. Fails past the grace that the file gives each."""
        for service in together:
            self.processes[service.name].send_signal(signal.SIGTERM)
        return {s.name: self.processes.pop(s.name).wait(s.stop_grace_s) for s in together}

    def log(self, service: Service) -> str:
        return (self.directory / service.name / "log").read_text(errors="replace")

    def end(self) -> None:
        """Kills what a failed test has left."""
        for process in self.processes.values():
            process.kill()
            process.wait(10)

    def _here(self, value: str) -> str:
        for place, port in self.ports.items():
            value = value.replace(place, f"127.0.0.1:{port}")
        return value
