"""The Dockerfile without a container engine: read by a parser, its lines run as far as a process of ours can."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from tests.support.compose import services
from tests.support.gateway_process import environment

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NUMBERLESS = ("Dockerfile", "compose.yaml", "docs/deploy")
"""Whoever releases changes pyproject.toml; a number that stood here too would be forgotten."""


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, with their words."""
    found: list[list[tuple[str, str]]] = []
    with (ROOT / "Dockerfile").open("rb") as file:
        for line in DockerfileParser(fileobj=file).structure:
            if line["instruction"] == "FROM":
                found.append([])
            if line["instruction"] != "COMMENT":
                found[-1].append((line["instruction"], line["value"]))
    return found


BUILD, FINAL = stages()


def of(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in stage if name == instruction]


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    sources = [source for value in of(BUILD, "COPY") for source in value.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert set(sources) == sent, "what is sent is copied, and what is copied is sent"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*wheel, "constraints.txt", project["project"]["readme"]} <= set(sources)


def test_it_installs_what_the_tests_pass_with_and_leaves_no_tools() -> None:
    [install] = [value for value in of(BUILD, "RUN") if "install" in value]
    assert "-c constraints.txt '.[gpu]'" in install and "--no-cache-dir" in install and "--without-pip" in install
    assert of(FINAL, "FROM") == [of(BUILD, "FROM")[0].removesuffix(" AS build")]
    [run] = of(FINAL, "RUN")
    assert "pip uninstall" in run and "install " not in run.replace("uninstall ", "") and "apt" not in run
    assert of(FINAL, "COPY") == ["--from=build /opt/warmlane /opt/warmlane"]


def test_it_runs_as_nobody_in_particular() -> None:
    [user] = of(FINAL, "USER")
    number, group = map(int, user.split(":"))
    assert number > 0 and group > 0
    [made] = of(FINAL, "RUN")
    assert f"--uid {number}" in made and f"--home-dir {of(FINAL, 'WORKDIR')[0]}" in made
    order = [name for name, _ in FINAL]
    assert order.index("USER") > max(place for place, name in enumerate(order) if name in ("RUN", "COPY"))


def test_the_version_stands_in_one_place() -> None:
    files = [file for place in NUMBERLESS for file in [ROOT / place, *(ROOT / place).rglob("*")] if file.is_file()]
    assert len(files) > 2
    assert [str(file) for file in files if VERSION in file.read_text()] == []
    assert any(value.endswith("org.opencontainers.image.version=$VERSION") for value in of(FINAL, "LABEL"))
    assert of(BUILD, "ARG") == of(FINAL, "ARG") == ['VERSION=""']
    api = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["api"]
    assert api["build"]["args"] == {"VERSION": "${WARMLANE_VERSION:-}"}
    assert api["image"] == "warmlane:${WARMLANE_VERSION:-local}"


def test_its_command_and_its_check_are_those_of_the_api_in_compose() -> None:
    """`test_compose` runs both; here the image alone must listen where compose.yaml has the api listen."""
    api = services(ROOT / "compose.yaml", {"GATEWAY_KEYS": "me:secret"})["api"]
    told = dict(part.split("=", 1) for value in of(FINAL, "ENV") for part in shlex.split(value))
    options, _, words = of(FINAL, "HEALTHCHECK")[0].partition("CMD ")
    assert json.loads(of(FINAL, "CMD")[0]) == api.command and json.loads(words) == api.check
    check = api.said["healthcheck"]
    assert dict(option.removeprefix("--").split("=") for option in options.split()) == {
        "interval": check["interval"],
        "timeout": check["timeout"],
        "start-period": check["start_period"],
        "retries": str(check["retries"]),
    }
    assert told["GATEWAY_BIND"] == api.environment["GATEWAY_BIND"]
    assert of(FINAL, "EXPOSE") == [told["GATEWAY_BIND"].rpartition(":")[2]]
    assert told["GATEWAY_STATE_DIR"] == of(FINAL, "WORKDIR")[0], "where its user may write"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_its_installation_gives_a_gateway_of_that_version(tmp_path: Path) -> None:
    """The line that installs, in a folder that holds what is copied and nothing else."""
    for source in (source for value in of(BUILD, "COPY") for source in value.split()[:-1]):
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, tmp_path / source)
    [line] = of(BUILD, "RUN")
    there = tmp_path / "warmlane"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in {"python": "", "pip": "-m pip"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 {words} "$@"\n')
        (programs / name).chmod(0o755)

    def run(command: str, version: str) -> int:
        env = {**environment(VERSION=version), "PATH": f"{programs}:{os.environ['PATH']}"}
        words = command.replace("/opt/warmlane", str(there))
        return subprocess.run(["sh", "-c", words], cwd=tmp_path, env=env, timeout=800).returncode

    assert run(line, VERSION) == 0
    judge = line.rpartition("&&")[2]
    assert run(judge, "") == run(judge, VERSION) == 0 and run(judge, "0.0.0") == 1, "a label must not lie"
    done = subprocess.run([there / "bin" / "gateway", "version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == VERSION
    assert not list(there.rglob("pip")), "nothing that installs is left"
