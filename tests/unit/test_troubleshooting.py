"""docs/troubleshooting.md: whatever it names exists, and is spelled as the code spells it."""

import re
from pathlib import Path
from typing import Any

import typer

from api import cli, door, errors, openapi
from broker.inspection import timeline
from broker.metrics import Metrics
from broker.policy import content
from tests.support.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
CODE = [re.sub(r"\s+", " ", text) for text in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))]
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
OF_JOBS = {"notBefore", "expiresAfter", "webhook", "wait"}
"""Keys of `POST /v1/jobs` and of a job."""


def words(pattern: str) -> set[str]:
    """What of the inline code looks so, commands and their names aside."""
    return {found for text in CODE if not text.startswith("gateway ") for found in re.findall(pattern, text)}


def codes() -> dict[str, set[int]]:
    """Each code that a client may hear, with its statuses."""
    told: dict[str, set[int]] = {}
    for error, row in errors.ROWS.items():
        told.setdefault(error.code, set()).add(row.status)
    told["runtime_failed"].add(errors.TOO_SLOW)
    for text in (openapi._ABOUT, (ROOT / "README.md").read_text()):
        for status, code in re.findall(r"\b([45]\d\d) `(\w+)`", text):
            told.setdefault(code, set()).add(int(status))
    for fault in vars(door).values():
        if isinstance(fault, errors.Wrong):
            told.setdefault(fault.code, set()).add(fault.status)
    return told


def test_codes_exist_and_have_the_statuses_that_are_told() -> None:
    known = codes()
    metrics = {family.name for family in Metrics(version="1").families()}
    named = words(r"(?<![\w=/.-])[a-z]+(?:_[a-z]+)+\b(?!:)") - {"prompt_cache_key"}
    plain = {name for name in named if not name.startswith("gateway_")}
    assert len(plain) >= 20 and plain - known.keys() == set()
    told = re.findall(r"\b([45]\d\d) `(\w+)`|`(\w+)`(?:, `\w+`)* \(([45]\d\d)\)", PAGE)
    for status, code, code_before, status_behind in told:
        assert int(status or status_behind) in known[code or code_before], code or code_before
    assert len(told) > 10
    measured = {name.removesuffix("_total") for name in named - plain}
    assert len(measured) > 8 and measured <= {name.removesuffix("_total") for name in metrics}


def test_keys_of_the_policy_exist() -> None:
    parts: list[Any] = [content.Content, content.Model, content.LaneEntry, content.Match, content.Rule]
    known = {field.alias or name for part in parts for name, field in part.model_fields.items()}
    named = words(r"\b[a-z]+[A-Z]\w*\b") | words(r"\b([a-z]+): ")
    assert len(named) > 20 and named - known - OF_JOBS - {"outsideHours", "allow"} == set()


def test_words_of_the_log_exist() -> None:
    sources = [path.read_text() for room in ("api", "broker", "workers") for path in (ROOT / room).rglob("*.py")]
    known = {word for text in sources for word in re.findall(r"event=(\w+)", text)}
    named = words(r"event=(\w+)")
    assert len(named) >= 6 and named - known == set()


def test_settings_endpoints_and_options_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in words(r"\b(?:GATEWAY|OLLAMA)_[A-Z_]+\b") | words(r"\bX-[A-Z][\w-]+"):
        assert name in readme or any(name in path.read_text() for path in (ROOT / "api").rglob("*.py")), name
    pages = readme + (ROOT / "docs" / "jobs.md").read_text()
    for path in words(r"GET (/\S+)"):
        assert f"GET {path.replace('ID', '{id}')}`" in pages, path
    assert len(words(r"GET (/\S+)")) > 1
    options = {
        option for _, command in _commands(typer.main.get_command(cli.app)) for p in command.params for option in p.opts
    }
    assert {word for text in CODE for word in re.findall(r"(?<![\w-])--[a-z-]+", text)} - {"--max-waiting"} <= options


def _commands(command: Any, path: str = "gateway") -> Any:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from _commands(below, f"{path} {name}")
    else:
        yield path, command


def test_what_is_quoted_is_said_somewhere() -> None:
    """By a table, a note, a finding or the page; figures and … stand for what changes."""
    files = [
        path
        for room in ("api", "broker", "workers")
        for path in (ROOT / room).rglob("*.*")
        if path.suffix in (".py", ".js")
    ]
    said = "\n".join(path.read_text() for path in files)
    quoted = [text for text in re.findall(r"(?<![\w*])\*([^*\n]+)\*(?![\w*])", PAGE) if " " in text]
    assert len(quoted) > 6
    for text in quoted:
        for part in re.split(r"\s*(?:\d+|…)\s*", text):
            assert part in said, part


def test_steps_are_called_as_inspect_calls_them() -> None:
    text = Path(timeline.__file__).read_text()
    for step in ("submitted", "claimed", "first token"):
        assert f'"{step}"' in text and f"`{step}`" in PAGE


def test_each_row_says_where_to_look_and_each_symptom_has_a_command_or_a_figure() -> None:
    assert len(SECTIONS) > 12
    for symptom, text in SECTIONS.items():
        rows = [row.split("|")[1:-1] for row in re.findall(r"^\|.*\|$", text.replace("\\|", ""), re.MULTILINE)]
        assert [cell.strip() for cell in rows[0]] == ["look at", "it means", "change"], symptom
        assert len(rows) > 4 and all(len(row) == 3 and row[0].strip() and row[1].strip() for row in rows), symptom
        assert re.search(r"`(gateway[ _]|curl |GET |event=)", text), symptom
