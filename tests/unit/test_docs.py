"""What the pages say about the code is printed by the code. WARMLANE_ACCEPT=1 writes the blocks anew."""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from api import cli, exit_codes
from broker import keyspace, lifecycle, log_words, metric_notes, model_life, pictures, traces
from broker.metrics import Metrics
from broker.policy import Policy, content, reference, remote, webhooks
from tests.support.pages import ROOT, marked


def drawn(text: str) -> str:
    return f"```mermaid\n{text}\n```"


def policy_of(page: str, file: str) -> Policy:
    """The policy that a page shows as this file."""
    [found] = [block.text for block in marked(ROOT / "docs" / page) if (block.kind, block.name) == ("file", file)]
    return Policy.parse(found)


def deep() -> str:
    policy = policy_of("policy.md", "policy.yaml")
    return pictures.instants(policy, policy.all_lanes()["deep-coder"])


BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {
    "lifecycle": ("ARCHITECTURE.md", lambda: drawn(lifecycle.as_mermaid())),
    "keys": ("ARCHITECTURE.md", keyspace.as_markdown),
    "exit-codes": ("docs/ci.md", exit_codes.as_markdown),
    "metrics": ("docs/metrics.md", lambda: metric_notes.as_markdown(Metrics(version="1").families())),
    "spans": ("docs/traces.md", traces.as_markdown),
    "log-words": ("docs/inspect.md", log_words.as_markdown),
    "policy": ("docs/policy.md", reference.as_markdown),
    "lanes": ("docs/concepts.md", lambda: drawn(pictures.lanes(policy_of("policy.md", "policy.yaml")))),
    "instants": ("docs/concepts.md", lambda: drawn(deep())),
    "zones": ("docs/concepts.md", lambda: drawn(pictures.lanes(policy_of("concepts.md", "zones.yaml")))),
    "model-states": ("docs/concepts.md", model_life.as_markdown),
    "model-life": ("docs/concepts.md", lambda: drawn(model_life.as_mermaid())),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_generated_blocks_are_what_the_code_prints(name: str) -> None:
    page, printed = ROOT / BLOCKS[name][0], BLOCKS[name][1]
    text = page.read_text()
    block = re.compile(rf"(<!-- generated: {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    found = block.search(text)
    assert found is not None, f"{page.name} has no block {name}"
    wanted = printed() + "\n"
    if os.environ.get("WARMLANE_ACCEPT"):
        page.write_text(block.sub(lambda m: m.group(1) + wanted + m.group(3), text))
        return
    assert found.group(2) == wanted, "run WARMLANE_ACCEPT=1 python -m pytest tests/unit/test_docs.py"


# --- README ------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
PARTS = (remote.Remote, remote.RemoteOfModel, remote.Redaction, webhooks.Webhooks)
GATEWAY = typer.main.get_command(cli.app)


def test_readme_names_every_key_of_the_policy() -> None:
    """A key that only the schema knows is found by nobody who reads before asking."""
    words = set(re.findall(r"\w+", README))
    keys = {
        field.alias or name
        for part in (content.Content, content.Model, content.LaneEntry, content.Match, content.Rule, *PARTS)
        for name, field in part.model_fields.items()
    }
    assert len(keys) > 40 and keys - words == set()


def test_the_reference_begins_with_the_file_that_readme_shows() -> None:
    """The one of the specification; it is a policy as it stands, and the schema line is one that editors know."""
    page = (ROOT / "docs" / "policy.md").read_text()
    first, schema_line = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert f"```yaml\n{first}```" in README
    assert Policy.parse(first).models.keys() == {"deep-coder", "coder-small"}
    assert Policy.parse(schema_line + first) is not None and "$schema=policy.schema.json" in schema_line


def test_the_reference_has_every_key_with_its_meaning() -> None:
    text = reference.as_markdown()
    keys = {
        field.alias or name
        for part in (content.Content, content.Model, content.LaneEntry, content.Match, content.Rule, *PARTS)
        for name, field in part.model_fields.items()
    }
    assert keys == set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    for row in re.findall(r"^\| `.*", text, re.MULTILINE):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 5 and cells[1] and cells[3], row


def test_readme_shows_every_command() -> None:
    commands = [" ".join(words) for words, _ in _commands(GATEWAY, ["gateway"])]
    assert len(commands) > 20 and [command for command in commands if command not in README] == []


CI = (ROOT / "docs" / "ci.md").read_text() + (ROOT / "docs" / "inspect.md").read_text()
MONITORING = "".join((ROOT / "docs" / page).read_text() for page in ("metrics.md", "monitoring/alerts.yaml"))
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
REST = "".join(
    (ROOT / "docs" / page).read_text() for page in ("quickstart.md", "troubleshooting.md", "policy.md", "concepts.md")
)


@pytest.mark.parametrize(
    "line",
    [line for line in (README + CI).splitlines() if line.startswith(("    gateway ", "    git diff | gateway "))],
)
def test_command_lines_of_the_pages_are_understood(line: str) -> None:
    """As a shell would pass them on; nothing is run."""
    line = line.rpartition(" | ")[2]
    words = shlex.split(line, comments=True)[1:]
    command, words = _find(words)
    with command.make_context("gateway", ["1" if word == "VERSION" else word for word in words]):
        pass


@pytest.mark.parametrize(
    "text", sorted(set(re.findall(r"`(gateway [a-z][^`]*)`", README + CI + MONITORING + OPERATIONS + REST)))
)
def test_commands_in_the_prose_of_the_pages_exist(text: str) -> None:
    """With each option that is written behind them."""
    command, words = _find(re.split(r"[ |]+", text)[1:])
    known = {option for parameter in command.params for option in parameter.opts}
    assert not hasattr(command, "commands"), "a group alone does nothing"
    assert {word for word in words if word.startswith("-")} <= known


def _commands(command: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from _commands(below, [*path, name])
    else:
        yield path, command


def _find(words: list[str]) -> tuple[Any, list[str]]:
    """Follows the words to a command; gives it, and the words that are its own."""
    command, left = GATEWAY, list(words)
    while hasattr(command, "commands") and left:
        command = command.commands[left.pop(0)]
    return command, left


# --- security.md -------------------------------------------------------------------------------------------------


def test_each_test_that_security_names_exists() -> None:
    """A defence is as good as the test that fails without it. `…` stands for the file named before."""
    text = (ROOT / "docs" / "security.md").read_text()
    file, found = "", 0
    for path, name in re.findall(r"`(tests/[\w/]+\.py|…)(?:::(\w+))?`", text):
        file = file if path == "…" else path
        code = (ROOT / file).read_text()
        assert not name or f"def {name}(" in code, f"{file} has no {name}"
        found += bool(name)
    assert found > 30
