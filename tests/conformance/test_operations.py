"""The blocks of docs/operations.md, run as they stand: paths lead into a folder, and engines are stand-ins.

A stand-in writes down how it was called; what it is told to run in a container, or to stop and start, it does here. A
container knows the program `gateway` and no key; this machine has both only by what a block does.
"""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.policy import Policy
from tests.support.compose import free_port, services
from tests.support.gateway_process import GatewayProcess, House, environment, gateway, gateway_program, house
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = dict(re.findall(r"<!-- block: ([\w-]+) -->\n```bash\n(.*?)```", PAGE, re.DOTALL))
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
BLOCK_S_MAX = 120
PIP = ["pip", "install", "-q", "-c", "constraints.txt", ".[gpu]"]
"""Without the extra a worker would take the machine's memory for the models'."""

STAND_IN = f"""#!{sys.executable}
import json, os, socket, subprocess, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["CALLED"], "a") as log:
    log.write(json.dumps([name, *words]) + "\\n")
if name == "docker" and ("exec" in words or "run" in words):
    place = words.index("exec" if "exec" in words else "run") + 1
    options, rest = [], words[place:]
    inside = {{**os.environ, "PATH": os.environ["PATH_INSIDE"]}}
    inside.pop("GATEWAY_KEY", None)
    while rest[0].startswith("-"):
        options.append(rest.pop(0))
        if options[-1] in ("--entrypoint", "-e"):
            options.append(rest.pop(0))
        if options[-2:-1] == ["-e"]:
            inside.update([options[-1].split("=", 1)])
    service, command = rest[0], rest[1:]
    if "--entrypoint" in options:
        command.insert(0, options[options.index("--entrypoint") + 1])
    home = os.path.join(os.environ["CONTAINERS"], service)
    os.makedirs(home, exist_ok=True)
    command = [word.replace("/data", home) for word in command]
    sys.exit(subprocess.run(command, cwd=home, env=inside).returncode)
if name == "systemctl" and words[0] in ("stop", "start") and "UNIT" in os.environ:
    with socket.create_connection(("127.0.0.1", int(os.environ["UNIT"])), timeout=60) as unit:
        unit.sendall(words[0].encode())
        sys.exit(unit.recv(10) != b"done")
"""


class Bash:
    """Runs blocks with a PATH of stand-ins, in a folder of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings: dict[str, str] = {}
        programs = directory / "bin"
        programs.mkdir()
        for name in ("docker", "kubectl", "systemctl", "useradd", "pip", "python3"):
            program = programs / name
            program.write_text(STAND_IN)
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        beside = [place for place in os.environ["PATH"].split(":") if not (Path(place) / "gateway").exists()]
        self._path = ":".join([str(directory / "usr/local/bin"), str(programs), *beside])
        self._path_inside = f"{Path(gateway_program()).parent}:{self._path}"
        for name in ("docs", "pyproject.toml", "constraints.txt", "compose.yaml"):
            (directory / name).symlink_to(ROOT / name)

    def run(self, name: str, *, code: int = 0) -> str:
        """Runs a block to its end, which is to come with this exit code; gives what it printed."""
        text = BLOCKS[name]
        for place in ("/var/lib", "/etc/", "/opt/", "/usr/local/"):
            text = re.sub(rf"(?<=[ ]){place}|^{place}", f"{self.directory}{place}", text, flags=re.MULTILINE)
        env = environment(**self.settings) | {
            "PATH": self._path,
            "PATH_INSIDE": self._path_inside,
            "CALLED": str(self.directory / "called"),
            "CONTAINERS": str(self.directory / "containers"),
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.directory,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BLOCK_S_MAX,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    @property
    def called(self) -> list[list[str]]:
        """How stand-ins were called."""
        file = self.directory / "called"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


@pytest.fixture(scope="module")
def locked_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A gateway that nobody may call without a key. The weights of one of its models are not there."""
    missing = {"backend": "llama.cpp", "model": "/missing.gguf", "keepWarm": True, "memoryMb": 1}
    text = policy({"m": simulated(memoryMb=1), "gone": missing})
    with house(tmp_path_factory.mktemp("locked") / "data", policy=text, GATEWAY_KEYS="me:SECRET") as up:
        yield up


@pytest.fixture
def at_a_gateway(bash: Bash, locked_house: House) -> Bash:
    """Blocks reach a running gateway, and its containers its Redis."""
    bash.settings |= {"GATEWAY_URL": locked_house.url, "GATEWAY_REDIS_URL": locked_house.redis_url}
    (bash.directory / "policy.yaml").write_text(locked_house.data.with_suffix(".yaml").read_text())
    return bash


@pytest.fixture
def with_units(at_a_gateway: Bash, locked_house: House) -> Bash:
    """The same, installed as the page says; the gateway's data is where its unit keeps it."""
    install(at_a_gateway)
    (at_a_gateway.directory / "var/lib").mkdir(parents=True)
    (at_a_gateway.directory / "var/lib/warmlane").symlink_to(locked_house.data)
    return at_a_gateway


def install(bash: Bash) -> None:
    """Runs the block that installs; its pip leaves the program where a real one would."""
    programs = bash.directory / "opt/warmlane/bin"
    programs.mkdir(parents=True)
    (programs / "pip").symlink_to(bash.directory / "bin" / "pip")
    (programs / "gateway").symlink_to(gateway_program())
    for folder in ("etc/systemd/system", "usr/local/bin"):
        (bash.directory / folder).mkdir(parents=True)
    bash.run("systemd")


def test_every_block_of_the_page_has_a_test() -> None:
    assert BLOCKS.keys() == {
        "systemd", "compose", "monitoring", "kubernetes", "capacity", "upgrade-compose", "upgrade-systemd", "backup",
        "restore", "backup-compose", "restore-compose", "policy",
    }  # fmt: skip
    assert PAGE.count("\n```") == 2 * len(BLOCKS)


def test_the_units_are_installed_where_they_look_for_their_files(bash: Bash) -> None:
    (bash.directory / "policy.yaml").write_text("models: {m: {backend: simulated, model: x}}")
    install(bash)
    unit = (bash.directory / "etc/systemd/system/warmlane.service").read_text()
    assert "EnvironmentFile=/etc/warmlane/warmlane.env" in unit and "GATEWAY_POLICY=%E/warmlane/policy.yaml" in unit
    secrets = bash.directory / "etc/warmlane/warmlane.env"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    assert (bash.directory / "etc/warmlane/policy.yaml").exists()
    assert [words for words in bash.called if words[0] == "systemctl"] == [
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", "--now", "warmlane"],
    ]
    made = next(words for words in bash.called if words[0] == "useradd")
    assert f"User={made[-1]}" in unit.splitlines()
    assert PIP in bash.called


def test_compose_is_brought_up_and_given_a_policy(at_a_gateway: Bash) -> None:
    said = at_a_gateway.run("compose")
    assert "stays active" in said and "MODEL" in said
    assert at_a_gateway.called[0] == ["docker", "compose", "up", "-d", "--build", "--wait"]
    assert "GATEWAY_KEYS" in BLOCKS["compose"]


def test_the_example_is_applied_to_a_cluster(bash: Bash) -> None:
    bash.run("kubernetes")
    [create, secret, apply, rollout] = [words[1:] for words in bash.called]
    assert create == ["create", "namespace", "warmlane"] and secret[:5] == [
        "-n",
        "warmlane",
        "create",
        "secret",
        "generic",
    ]
    assert (bash.directory / apply[-1] / "kustomization.yaml").exists()
    named = [f"{m['kind'].lower()}/{m['metadata']['name']}" for m in _manifests()]
    assert rollout[-1] in named
    api = next(m for m in _manifests() if (m["kind"], m["metadata"]["name"]) == ("Deployment", "api"))
    env = api["spec"]["template"]["spec"]["containers"][0]["env"]
    reference = next(e["valueFrom"]["secretKeyRef"] for e in env if e["name"] == "GATEWAY_KEYS")
    assert secret[5:] == [reference["name"], f"--from-literal={reference['key']}=me:SECRET"]


def test_capacity_is_looked_at_and_the_proposal_is_yaml(with_units: Bash) -> None:
    said = with_units.run("capacity")
    assert "LANE" in said and "LAST LOAD" in said
    proposal = (with_units.directory / "proposal.yaml").read_text()
    assert proposal.startswith("# From ")
    yaml.safe_load(proposal)


def test_compose_is_upgraded_part_by_part(at_a_gateway: Bash) -> None:
    settings = at_a_gateway.directory / ".env"
    settings.write_text("WARMLANE_VERSION=0.0.1\nGATEWAY_KEYS=me:SECRET")  # and no end of line
    said = at_a_gateway.run("upgrade-compose")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert said.strip() == version
    assert settings.read_text() == f"GATEWAY_KEYS=me:SECRET\nWARMLANE_VERSION={version}\n"
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    read = dict(line.split("=") for line in settings.read_text().splitlines())
    images = {services(ROOT / "compose.yaml", read)[name].said["image"] for name in ("api", "scheduler", "worker")}
    assert images == {f"warmlane:{version}"}, "also for the next `up`, in another shell"
    brought_up = [words[-1] for words in at_a_gateway.called if "up" in words]
    assert brought_up == ["scheduler", "api", "worker"] and set(brought_up) < SERVICES.keys()


def test_a_first_upgrade_needs_no_file_of_settings(at_a_gateway: Bash) -> None:
    at_a_gateway.run("upgrade-compose")
    assert (at_a_gateway.directory / ".env").read_text().startswith("WARMLANE_VERSION=")


def test_a_backup_of_the_volume_comes_back(bash: Bash) -> None:
    data = bash.directory / "containers" / "redis"
    (data / "appendonlydir").mkdir(parents=True)
    (data / "appendonlydir" / "file").write_text("kept")
    bash.run("backup-compose")
    (data / "appendonlydir" / "file").write_text("spoilt")
    (data / "later").write_text("")
    bash.run("restore-compose")
    assert (data / "appendonlydir" / "file").read_text() == "kept" and not (data / "later").exists()
    assert [words[2] for words in bash.called] == ["stop", "run", "start"] * 2
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_a_backup_is_made_while_nothing_writes(bash: Bash) -> None:
    there = bash.directory / "var/lib/warmlane"
    there.mkdir(parents=True)
    (there / "file").write_text("kept")
    bash.run("backup")
    (there / "file").write_text("spoilt")
    (there / "later").write_text("")
    bash.run("restore")
    assert (there / "file").read_text() == "kept" and not (there / "later").exists()
    assert [words[1] for words in bash.called] == ["stop", "start"] * 2


def test_an_upgrade_restarts_the_workers_last(with_units: Bash) -> None:
    said = with_units.run("upgrade-systemd", code=1)
    assert "gone" in said, "doctor tells of the model without weights"
    restarted = [words[-1] for words in with_units.called if words[:2] == ["systemctl", "restart"]]
    assert PIP in with_units.called[-4:], "again, the same way"
    assert restarted == ["warmlane-scheduler", "warmlane-api", "warmlane-worker"]
    assert set(restarted) < {file.stem for file in (ROOT / "docs" / "deploy" / "systemd").glob("*.service")}


def test_an_upgrade_tells_what_is_wrong_also_while_the_api_is_away(with_units: Bash, locked_house: House) -> None:
    """Then `gateway doctor` asks the Redis that `warmlane.env` names."""
    with_units.settings |= {"GATEWAY_URL": f"http://127.0.0.1:{free_port()}", "GATEWAY_REDIS_URL": ""}
    with (with_units.directory / "etc/warmlane/warmlane.env").open("a") as file:
        file.write(f"GATEWAY_REDIS_URL={locked_house.redis_url}\n")
    assert "gone" in with_units.run("upgrade-systemd", code=1)


def test_prometheus_gets_a_key_of_its_own(at_a_gateway: Bash) -> None:
    at_a_gateway.run("monitoring")
    assert "prometheus" in gateway("key", "list", GATEWAY_KEY="SECRET", **at_a_gateway.settings).stdout
    assert at_a_gateway.called[-1] == ["docker", "compose", "--profile", "monitoring", "up", "-d", "--wait"]


def test_monitoring_stops_where_no_key_can_be_made(at_a_gateway: Bash) -> None:
    at_a_gateway.settings["GATEWAY_URL"] = f"http://127.0.0.1:{free_port()}"
    at_a_gateway.run("monitoring", code=3)
    assert len(at_a_gateway.called) == 1


class Unit:
    """`warmlane.service`, for `systemctl stop` and `start`: a real `gateway up`."""

    def __init__(self, bash: Bash) -> None:
        self.settings = {
            "GATEWAY_STATE_DIR": str(bash.directory / "var/lib/warmlane"),
            "GATEWAY_BIND": f"127.0.0.1:{free_port()}",
            "GATEWAY_POLICY": str(bash.directory / "policy.yaml"),
        }
        self.url = f"http://{self.settings['GATEWAY_BIND']}"
        self.process: GatewayProcess | None = None

    def start(self) -> None:
        self.process = GatewayProcess("up", **self.settings)
        self.process.until_said("ready ")

    def stop(self) -> None:
        assert self.process is not None
        self.process.signal(signal.SIGTERM)
        assert self.process.exit() == 0, self.process.output
        self.process.end()

    def serve(self, listener: socket.socket) -> None:
        """Does what stand-ins ask for until the listener is closed."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    {b"start": self.start, b"stop": self.stop}[connection.recv(10)]()
                    connection.sendall(b"done")


@pytest.fixture
def unit(bash: Bash) -> Iterator[Unit]:
    (bash.directory / "policy.yaml").write_text(policy({"m": simulated(memoryMb=1)}))
    (bash.directory / "var/lib").mkdir(parents=True)
    running = Unit(bash)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.serve, args=[listener], name="unit")
        thread.start()
        bash.settings |= {"UNIT": str(listener.getsockname()[1]), "GATEWAY_URL": running.url}
        try:
            yield running
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(30)
            if running.process is not None:
                running.process.end()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_gateway_comes_back_from_its_backup(bash: Bash, unit: Unit) -> None:
    """What was there when it was made is there again, a key and a policy; what came later is not."""
    unit.start()
    key = gateway("key", "new", "boss", "--admin", GATEWAY_URL=unit.url).stdout.split()[-1]
    bash.run("backup")
    assert gateway("key", "new", "later", GATEWAY_URL=unit.url, GATEWAY_KEY=key).returncode == 0
    bash.run("restore")
    told = gateway("key", "list", "--json", GATEWAY_URL=unit.url, GATEWAY_KEY=key).stdout
    assert {name for name in ("boss", "later") if name in told} == {"boss"}, told
    assert gateway("status", GATEWAY_URL=unit.url, GATEWAY_KEY=key).returncode == 0


def test_the_policy_is_written_down(with_units: Bash) -> None:
    with_units.settings["GATEWAY_REDIS_URL"] = ""  # its Redis is the unit's own
    said = with_units.run("policy")
    assert "policy.yaml: fine" in said
    Policy.parse((with_units.directory / "policy.yaml").read_text())


def _manifests() -> list[dict[str, Any]]:
    files = (ROOT / "docs" / "deploy" / "kubernetes").glob("*.yaml")
    found = [manifest for file in files for manifest in yaml.safe_load_all(file.read_text())]
    return [manifest for manifest in found if manifest and "metadata" in manifest]
