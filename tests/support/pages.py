"""The pages for people, taken apart: what a reader would copy, what they will see, and which files to make."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:8400"
"""Where every page says that the gateway listens."""

_MARKED = re.compile(r"<!-- (block|file|shows): (\S+) -->\n```(\w+)\n(.*?)```", re.DOTALL)
_FENCED = re.compile(r"(?:<!-- (?:block|file|shows): (\S+) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^    .*\n(?:\n(?=    ))?)+", re.MULTILINE)
_GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Marked:
    """A block with a name: something to run, a file to write, or what a block of that name prints."""

    kind: str
    name: str
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """Any block of a page: fenced, with the name before it if there is one, or indented by four spaces."""

    name: str
    language: str
    text: str

    @property
    def known_as(self) -> str:
        """Its name, or where it has none its first line without the remark behind it."""
        return self.name or re.split(r"\s{2,}#", self.text.strip().splitlines()[0])[0].strip()


def marked(page: Path) -> list[Marked]:
    """The named blocks of a page, in its order."""
    return [Marked(*found) for found in _MARKED.findall(page.read_text())]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, but for what the code prints into it (which is compared elsewhere)."""
    text = _GENERATED.sub("", page.read_text())
    fenced = [Block(*found) for found in _FENCED.findall(text)]
    indented = [Block("", "", found) for found in _INDENTED.findall("\n" + _FENCED.sub("", text))]
    return fenced + indented


_FREE = re.compile(r"(…|\d+(?:\.\d+)?(?:(?:ms|s|m|h)\b)?|\s+)")
"""What of a line may differ: anything for …, figures, lengths of time, and gaps."""


def as_told(told: str) -> "re.Pattern[str]":
    """What a line of a page stands for."""
    return re.compile("".join(_as_told(part) for part in _FREE.split(told.strip())))


def _as_told(part: str) -> str:
    if part == "…":
        return ".*"
    if part[:1].isdigit():
        return r"[\d.]+" + (r"(?:ms|s|m|h)" if part[-1].isalpha() else "")
    return r"\s+" if part.isspace() else re.escape(part)


def unshown(told: str, printed: str) -> list[str]:
    """The lines of the page that are not found among those printed, each a whole line."""
    lines = [line.strip() for line in printed.splitlines()]
    return [line for line in told.strip().splitlines() if not any(as_told(line).fullmatch(found) for found in lines)]
