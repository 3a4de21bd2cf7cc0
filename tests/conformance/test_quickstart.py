"""A newcomer's walk: README and docs/quickstart.md, block by block, as they stand, and each prints what the page says.

The environment of the test run stands for the line that installs; that line is CI's own, and the long form runs it.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gateway_process import House, environment, gateway_program, moves_by_the_table, tells_no_traceback
from tests.support.pages import ADDRESS, ROOT, Marked, marked, unshown
from tests.support.waiting import block_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

README = (ROOT / "README.md").read_text()
WALK = marked(ROOT / "docs" / "quickstart.md")
INSTALLS = ("install", "openai")
"""Done already where the tests run: the package with its `gateway`, and the SDK."""
LAST = "fallback"
"""Where the short form of the walk ends; the long one goes on to the page's end."""
BLOCK_S_MAX = 120


class Newcomer:
    """Somebody in an empty folder with a shell, who has set nothing."""

    def __init__(self, home: Path, programs: Path) -> None:
        self.home = home
        self.settings = {"HOME": str(home), "GATEWAY_STATE_DIR": str(home / "data")}
        self.path = f"{programs}:{os.environ['PATH']}"
        self.address = ADDRESS
        self.printed: dict[str, str] = {}

    def does(self, step: Marked) -> None:
        """Writes a file, runs a block, or looks whether it printed what it should have."""
        text = step.text.replace(ADDRESS, self.address)
        if step.kind == "file":
            (self.home / step.name).write_text(text)
        elif step.kind == "shows":
            lacking = unshown(text, self.printed[step.name])
            assert not lacking, f"{step.name}: {lacking} not in\n{self.printed[step.name]}"
        else:
            self.printed[step.name] = self.runs(step.language, text)

    def runs(self, language: str, text: str) -> str:
        """Runs a block of a page to its end; gives what a terminal would show."""
        program = {"bash": ["bash", "-euo", "pipefail", "-c", text], "python": ["python", "-c", text]}[language]
        done = subprocess.run(
            program,
            cwd=self.home,
            env=environment(**self.settings) | {"PATH": self.path, "GATEWAY_URL": self.address},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BLOCK_S_MAX,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("newcomer")


@pytest.fixture(scope="module")
def newcomer(home: Path) -> Iterator[Newcomer]:
    """Has a gateway that was started as the page says, at a port of its own."""
    somebody = Newcomer(home, Path(gateway_program()).parent)
    up = House(home / "data", cwd=home)
    try:
        up.ready()
        up.until_said("event=warm")
        somebody.address, somebody.printed["up"] = up.url, up.output
        yield somebody
    finally:
        up.end()
    tells_no_traceback(up.output)
    moves_by_the_table(up.output)


def test_the_line_that_installs_is_the_one_that_ci_runs() -> None:
    """But for the tests' own packages, and without an editor's link to the sources."""
    [line] = [step.text.strip() for step in WALK if step.name == "install" and step.kind == "block"]
    assert f"    {line}\n" in README
    install, _, up = line.rpartition(" && ")
    assert up == ".venv/bin/gateway up"
    tried = (ROOT / ".ci" / "run").read_text().replace("-e '.[test]'", ".")
    assert any(tests.startswith(f"{install} && ") for tests in tried.splitlines())
    assert "pip install -q openai\n" in [step.text for step in WALK if step.name == "openai"]


def readme_leads_to_an_answer_and_to_the_walk(newcomer: Newcomer) -> None:
    """Its client is the one of the walk; its other one answers as well."""
    section = README.partition("## Point a client at it")[2].partition("\n## ")[0]
    [client] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert [step.text for step in WALK if (step.kind, step.name) == ("block", "client")] == [client]
    [curl] = re.findall(r"^    curl .*\n(?:^    .*\n)*", section, re.MULTILINE)
    told = newcomer.runs("bash", curl.replace(ADDRESS, newcomer.address))
    assert '"content":' in told and "data: [DONE]" in told
    assert "(docs/quickstart.md)" in README.partition("## Point a client at it")[0]


def test_the_walk_does_what_the_page_says(newcomer: Newcomer) -> None:
    """In its order, since each step stands on those before it."""
    readme_leads_to_an_answer_and_to_the_walk(newcomer)  # first: the walk changes the policy later
    last = max(place for place, step in enumerate(WALK) if step.name == LAST)
    for step in WALK[: last + 1]:
        if not (step.kind == "block" and step.name in INSTALLS):
            newcomer.does(step)
    sees_a_refusal(newcomer)


def sees_a_refusal(newcomer: Newcomer) -> None:
    """One is refused, the others are answered."""
    codes = sorted(re.findall(r"^(\d{3})$", newcomer.printed["refused"], re.MULTILINE))
    assert codes == ["200", "200", "503"], newcomer.printed["refused"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_a_clean_machine_the_first_line_leads_to_an_answer(tmp_path: Path) -> None:
    """The line itself, in a copy of the repository: a new environment, nothing of this one, and the whole walk."""
    copy = tmp_path / "warmlane"
    left_out = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=left_out)
    [line] = [step.text.strip() for step in WALK if step.name == "install" and step.kind == "block"]
    settings = environment(HOME=str(tmp_path), GATEWAY_STATE_DIR=str(tmp_path / "data"))
    with open(tmp_path / "up", "w") as heard:
        up = subprocess.Popen(
            ["bash", "-c", line.replace("gateway up", "gateway up --port 0")],
            cwd=copy,
            env=settings,
            stdout=heard,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        said = tmp_path / "up"
        block_until(lambda: "event=warm" in said.read_text() or up.poll() is not None, what="warm", timeout_s=240)
        found = re.search(r"listens on (http://\S+),", said.read_text())
        assert found is not None, said.read_text()
        stranger = Newcomer(tmp_path, copy / ".venv" / "bin")
        stranger.address, stranger.printed["up"] = found[1], said.read_text()
        for step in WALK:
            if not (step.kind == "block" and step.name == "install"):
                stranger.does(step)
        sees_a_refusal(stranger)
        assert stranger.printed.keys() == {step.name for step in WALK if step.kind == "block"} - {"install"} | {"up"}
        assert re.search(r"^wl_\w+_\S+$", stranger.printed["keys"], re.MULTILINE), "a key is shown"
    finally:
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGINT)  # as Ctrl-C in its terminal
        up.wait(60)
