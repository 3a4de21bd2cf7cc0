"""The examples of docs/ci.md: the pipelines keep to their schemas, and their steps run as they stand."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.batch_command import read
from tests.support.gateway_process import COMMAND_S_MAX, House, environment, gateway_program, house
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text()
BLOCKS = dict(re.findall(r"<!-- block: ([\w-]+) -->\n```yaml\n(.*?)```", PAGE, re.DOTALL))
SCHEMAS = {"github": "vendor.github-workflows", "gitlab": "vendor.gitlab-ci"}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    models = {"coder-small": simulated(maxConcurrent=4, maxQueue=8, memoryMb=1, options={"decodeTps": 200})}
    with house(tmp_path_factory.mktemp("house") / "data", policy=policy(models)) as up:
        up.until_state("coder-small", "warm")
        yield up


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clone with a change that its origin does not have."""
    clone, origin = tmp_path / "clone", tmp_path / "origin"
    origin.mkdir()
    names = ["-c", "user.name=bot", "-c", "user.email=bot@example.org"]
    for at, *words in (
        (origin, "init", "-qb", "main"),
        (origin, *names, "commit", "-q", "--allow-empty", "-m", "empty"),
        (tmp_path, "clone", "-q", str(origin), str(clone)),
    ):
        subprocess.run(["git", *words], cwd=at, check=True)
    for name in ("README.md", "GUIDE.md"):
        (clone / name).write_text(f"{name} says this and that.\n")
    for words in (["add", "."], [*names, "commit", "-qm", "two pages"]):
        subprocess.run(["git", *words], cwd=clone, check=True)
    return clone


def shell(script: str, at: Path, up: House, **more: str) -> "subprocess.CompletedProcess[str]":
    """Runs the lines of a step as its runner does."""
    path = f"{Path(gateway_program()).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=at,
        env=environment(**{"GATEWAY_URL": up.url, "PATH": path, **more}),
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX * 2,
    )


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_pipeline_keeps_to_its_schema(name: str, tmp_path: Path) -> None:
    """That of SchemaStore or of GitLab itself, as check-jsonschema carries it; a typo is found."""
    assert BLOCKS.keys() == SCHEMAS.keys()

    def checked(text: str) -> int:
        file = tmp_path / "pipeline.yml"
        file.write_text(text)
        words = ["-m", "check_jsonschema", "--builtin-schema", SCHEMAS[name], str(file)]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
        return done.returncode

    assert checked(BLOCKS[name]) == 0
    assert checked(BLOCKS[name].replace("  timeout", "  timeuot", 1).replace("max: 2", "max: 20")) != 0


def test_the_github_step_reviews_a_change(up: House, repository: Path, tmp_path: Path) -> None:
    """And a second run of the job comes back to the same answer; a gateway that is away fails nobody's build."""
    steps = yaml.safe_load(BLOCKS["github"])["jobs"]["review"]["steps"]
    script = next(step["run"] for step in steps if "run" in step)
    summary = tmp_path / "summary.md"
    more = {"GITHUB_BASE_REF": "main", "GITHUB_SHA": "0123abcd", "GITHUB_STEP_SUMMARY": str(summary)}
    before = len(jobs_of(up))
    for _ in range(2):
        done = shell(script, repository, up, **more)
        assert done.returncode == 0, done.stderr
    assert "+README.md says this and that." in (repository / "prompt.md").read_text()
    assert (repository / "review.md").read_text().startswith("simulated")
    assert summary.read_text() == (repository / "review.md").read_text() * 2
    assert len(jobs_of(up)) == before + 1
    hasty = script.replace("--patience 10m", "--patience 1s")
    away = shell(hasty, repository, up, **more, GATEWAY_URL="http://127.0.0.1:9")
    assert away.returncode == 0 and "::warning::no review this time (exit 3)" in away.stdout


def test_the_gitlab_step_summarises_every_page(up: House, repository: Path) -> None:
    job = yaml.safe_load(BLOCKS["gitlab"])["summaries"]
    done = shell("\n".join(job["script"]), repository, up)
    assert done.returncode == 0, done.stderr
    asked = {entry["custom_id"] for entry in read(repository / "requests.jsonl")}
    outputs = read(repository / "out.jsonl")
    assert asked == {entry["custom_id"] for entry in outputs} == {"README.md", "GUIDE.md"}
    for entry in outputs:
        assert entry["response"]["body"]["choices"][0]["message"]["content"].startswith("simulated")
    assert set(job["cache"]["paths"]) == {"out.jsonl", "out.errors.jsonl"}


def test_the_bot_prints_a_review_and_comes_back_to_it(up: House) -> None:
    bot = ROOT / "docs" / "examples" / "bot.py"
    before = len(jobs_of(up))
    assert sum(1 for line in bot.read_text().splitlines() if line.strip()) <= 20
    said = set()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(bot)],
            input="+ a line",
            env=environment(GATEWAY_URL=up.url),
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
        )
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1 and said.pop().startswith("simulated")
    assert len(jobs_of(up)) == before + 1


def jobs_of(up: House) -> list[dict[str, Any]]:
    told: dict[str, list[dict[str, Any]]] = json.loads(up.command("job", "list", "--json").stdout)
    return told["data"]
