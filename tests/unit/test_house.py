"""What holds the house together outside its code: the commands, the versions, the names."""

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("api", "broker", "workers")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_ci_runs_the_very_line_that_readme_tells_people_to_run() -> None:
    """Else the first thing that a newcomer types is the one thing that nobody tests."""
    readme = (ROOT / "README.md").read_text()
    lines = [line.strip(" `$") for line in readme.splitlines() if "python3 -m venv" in line and "[test]" in line]
    assert lines, "README shows no test line"
    assert lines[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_version_is_pinned_within_its_range() -> None:
    pins = dict(
        (canonicalize_name(name), version)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
        for name, version in [line.split("==")]
    )
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt doesn't pin {requirement.name}"
        assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} doesn't allow {pin}"


def test_every_import_of_the_gateway_is_declared() -> None:
    """A package that only comes along with another goes when the other no longer needs it."""
    extras = [line for name in ("gpu", "otel", "top") for line in PROJECT["optional-dependencies"][name]]
    declared = {canonicalize_name(Requirement(line).name) for line in [*PROJECT["dependencies"], *extras]}
    distributions = importlib.metadata.packages_distributions()
    for path, module in imports():
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top in ROOMS:
            continue
        names = {canonicalize_name(name) for name in distributions.get(top, [top])}
        assert names & declared, f"{path} imports {top}, which pyproject.toml doesn't declare"


def test_keys_are_spelled_in_keyspace_only() -> None:
    for path, tree in sources():
        if path == "broker/keyspace.py":
            continue
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not node.value.startswith("gw:"), f"{path}:{node.lineno} spells a key"


def test_tests_wait_for_events_not_for_time() -> None:
    """A test that sleeps is slow on a fast machine and wrong on a slow one; `support/waiting.py` waits for things."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        if "chaos" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "sleep":
                only_lets_others_run = isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
                assert only_lets_others_run, f"{path.relative_to(ROOT)}:{node.lineno} sleeps"


@pytest.mark.parametrize("name", ["api", "scheduler", "worker"])
def test_a_service_is_a_command_that_also_runs_alone(name: str) -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"][name]
    assert service["command"] == f"gateway {name}"
    assert service["environment"]["GATEWAY_REDIS_URL"].startswith("redis://redis:")
    assert service["depends_on"]["redis"]["condition"] == "service_healthy"


def sources() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imports() -> Iterator[tuple[str, str]]:
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield path, node.module
