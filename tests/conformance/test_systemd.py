"""The systemd units without a running systemd: read as it reads them, each ExecStart as a process."""

import contextlib
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from broker.policy import Policy
from tests.support.compose import free_port, seconds
from tests.support.gateway_process import GatewayProcess, gateway_program
from tests.support.redis_server import RedisServer
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "deploy" / "systemd"
UNITS = ("warmlane", "warmlane-api", "warmlane-scheduler", "warmlane-worker")
PROGRAM = "/opt/warmlane/bin/gateway"
EXPOSURE_MAX = 25
"""Tenths, as `systemd-analyze security` counts what a unit could reach; one without any hardening has 96."""

KNOWN = {
    "Unit": "Description Wants After StartLimitIntervalSec",
    "Service": "Type WatchdogSec EnvironmentFile Environment ExecStart Restart RestartSec RestartPreventExitStatus "
    "KillMode TimeoutStopSec User Group UMask StateDirectory StateDirectoryMode NoNewPrivileges CapabilityBoundingSet "
    "AmbientCapabilities ProtectSystem ProtectHome PrivateTmp PrivateDevices ProtectClock ProtectControlGroups "
    "ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables RestrictAddressFamilies "
    "RestrictNamespaces RestrictRealtime RestrictSUIDSGID RemoveIPC LockPersonality SystemCallArchitectures "
    "SystemCallFilter",
    "Install": "WantedBy",
}
"""Directives of systemd.unit(5), systemd.service(5), systemd.exec(5) and systemd.kill(5) of systemd 252."""


def read(unit: str) -> dict[str, list[tuple[str, str]]]:
    """The sections of a unit."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (FOLDER / f"{unit}.service").read_text().splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            assert equals, line
            found[list(found)[-1]].append((name, value))
    return found


def one(unit: str, name: str) -> str:
    [value] = [value for key, value in read(unit)["Service"] if key == name]
    return value


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_says_nothing_that_systemd_does_not_know(unit: str, tmp_path: Path) -> None:
    """systemd passes over a misspelt line, and what it should have forbidden stays allowed."""
    for section, lines in read(unit).items():
        assert {name for name, _ in lines} <= set(KNOWN[section].split())
    if analyze := shutil.which("systemd-analyze"):
        copy = tmp_path / f"{unit}.service"
        copy.write_text((FOLDER / copy.name).read_text().replace(PROGRAM, gateway_program()))
        said = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, timeout=30)
        assert [line for line in said.stderr.splitlines() if unit in line] == [] and said.returncode == 0
        limit = ["security", "--offline=yes", f"--threshold={EXPOSURE_MAX}"]
        judged = subprocess.run([analyze, *limit, copy], capture_output=True, text=True, timeout=30)
        assert judged.returncode == 0, judged.stdout


def test_there_is_one_for_each_part_and_one_for_all() -> None:
    assert {file.stem for file in FOLDER.glob("*.service")} == set(UNITS)
    words = {unit: one(unit, "ExecStart").split() for unit in UNITS}
    assert all(command[0] == PROGRAM for command in words.values())
    assert [command[1:] for command in words.values()] == [["up"], ["api"], ["scheduler"], ["worker"]]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_comes_back_and_reads_its_secrets_from_a_file(unit: str) -> None:
    assert one(unit, "Restart") == "always"
    assert one(unit, "EnvironmentFile") == "/etc/warmlane/warmlane.env"
    assert not [value for name, value in read(unit)["Service"] if name == "Environment" and "KEY" in value]
    assert one(unit, "KillMode") == "mixed", "a runtime that is told to stop too would cut what runs"


def test_a_worker_has_time_to_drain() -> None:
    drain_s = Policy.parse(policy({"m": simulated()})).drain_timeout_ms / 1000
    assert int(one("warmlane-worker", "TimeoutStopSec")) >= drain_s + 10
    assert int(one("warmlane", "TimeoutStopSec")) >= drain_s + 15 + 2 * 5 + 10, "and Redis, and both others"


@pytest.mark.parametrize("unit", [unit for unit in UNITS if one(unit, "ExecStart").split()[1] in ("up", "worker")])
def test_a_unit_that_runs_a_worker_hides_no_device(unit: str) -> None:
    """Any list of allowed devices hides the GPUs; before systemd 255 `ProtectClock` brings one."""
    hiding = {"ProtectClock", "PrivateDevices", "DeviceAllow", "DevicePolicy"}
    assert {name for name, _ in read(unit)["Service"]} & hiding == set()


def test_the_environment_file_names_settings_and_holds_no_secret() -> None:
    lines = [line.lstrip("#") for line in (FOLDER / "warmlane.env").read_text().splitlines() if "=" in line]
    readme = (FOLDER.parents[2] / "README.md").read_text()
    assert len(lines) > 3 and all(f"`{line.split('=')[0]}`" in readme for line in lines)
    assert "GATEWAY_KEYS=me:SECRET" in lines


class Started:
    """A unit's ExecStart as a process, with its environment and a socket on which it tells that it is ready."""

    def __init__(self, unit: str, directory: Path, *, words: str = "", **settings: str) -> None:
        self.unit = unit
        self.state = directory / "state" / "warmlane"
        paths = {"%S": str(directory / "state"), "%E": str(directory)}
        told = [value for name, value in read(unit)["Service"] if name == "Environment"]
        for place, path in paths.items():
            told = [value.replace(place, path) for value in told]
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(directory / f"{unit}.notify"))
        self.notified.settimeout(20)
        settings |= dict(value.split("=", 1) for value in told)
        settings["NOTIFY_SOCKET"] = str(directory / f"{unit}.notify")
        self.process = GatewayProcess(*one(unit, "ExecStart").split()[1:], *shlex.split(words), **settings)

    def until_ready(self) -> None:
        assert self.notified.recv(100).startswith(b"READY=1"), self.process.output

    def stop(self) -> int:
        """As KillMode=mixed does; gives the exit code, or fails past TimeoutStopSec."""
        self.process.signal(signal.SIGTERM)
        return self.process.exit(seconds(one(self.unit, "TimeoutStopSec") + "s"))


@pytest.fixture
def units(tmp_path: Path) -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.long
@pytest.mark.real
def test_the_parts_start_serve_and_stop(units: contextlib.ExitStack, redis_server: RedisServer, tmp_path: Path) -> None:
    port = free_port()
    settings = {
        "GATEWAY_REDIS_URL": redis_server.url,
        "GATEWAY_NAMESPACE": "units",
        "GATEWAY_BIND": f"127.0.0.1:{port}",
        "GATEWAY_HOST_NAME": "units",
    }
    parts = [Started(unit, tmp_path, **settings) for unit in UNITS if unit != "warmlane"]
    for part in parts:
        units.callback(part.process.end)
        units.callback(part.notified.close)
    for part in parts:
        if one(part.unit, "Type") == "notify":
            part.until_ready()
    block_until(lambda: _answers(f"http://127.0.0.1:{port}/healthz"), what="the api answers", timeout_s=20)
    for part in parts:
        assert part.stop() == 0, part.process.output


@pytest.mark.real
@pytest.mark.long
def test_everything_on_one_machine_starts_serves_and_stops(units: contextlib.ExitStack, tmp_path: Path) -> None:
    (tmp_path / "warmlane").mkdir()
    (tmp_path / "warmlane" / "policy.yaml").write_text(policy({"m": simulated(memoryMb=1)}))
    port = free_port()
    everything = Started("warmlane", tmp_path, GATEWAY_BIND=f"127.0.0.1:{port}")
    units.callback(everything.process.end)
    units.callback(everything.notified.close)
    everything.process.until_said("ready ")
    assert everything.process.says("policy", "policy.yaml") and (everything.state / "redis").is_dir()
    assert _answers(f"http://127.0.0.1:{port}/readyz")
    assert everything.stop() == 0, everything.process.output


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.HTTPError:
        return False
