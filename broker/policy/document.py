"""Reads the text of a policy file into plain data, and remembers on which line every part of it stands.

Only what a policy needs of YAML is read: mappings, lists and plain values. Aliases, tags, a second document, keys given
twice, deep nesting and big files are refused, so a file cannot be a bomb and cannot mean something that the eye misses.
Plain words follow YAML 1.2: `true` and `false` are booleans, while `yes`, `no`, `on` and `010` stay text.
"""

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

BYTES_MAX = 128 * 1024
DEPTH_MAX = 12

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """The data of a policy file, the line of every path in it, and what was wrong with it as YAML."""

    data: Any
    lines: dict[Path, int]
    problems: list[str] = field(default_factory=list)

    def sentence(self, path: Path, words: str) -> str:
        """Puts line and path before the words of a problem."""
        return sentence(self.line(path), path, words)

    def line(self, path: Path) -> int:
        """Gives the line of a path, or of the nearest part of the file around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def in_order(self, problems: Iterable[tuple[Path, str]]) -> list[str]:
        """Turns problems into sentences, in the order of the file's lines."""
        return [self.sentence(path, words) for path, words in sorted(problems, key=lambda p: self.line(p[0]))]


def read(text: str) -> Document:
    """Reads YAML text; whatever is wrong with it is in the document's problems."""
    if len(text.encode("utf-8", "surrogatepass")) > BYTES_MAX:
        return _broken(1, f"the file is larger than {BYTES_MAX // 1024} KiB")
    try:
        root = _Reader(text).get_single_node()
    except _Unwanted as unwanted:
        return _broken(unwanted.line, unwanted.words)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return _broken(mark.line + 1 if mark else 1, f"not valid YAML: {_one_line(error.problem or str(error))}")
    except ReaderError as error:
        return _broken(text.count("\n", 0, error.position) + 1, "holds a character that YAML does not allow")
    except (ValueError, OverflowError):  # the scanner makes numbers and characters of escapes without looking
        return _broken(1, "not valid YAML: an escape or a directive in it is out of range")
    if root is None:
        return _broken(1, "the file is empty")
    return _plain(root)


def sentence(line: int, path: Path, words: str) -> str:
    """Says what is wrong and where: `line 8: models.deep-coder.maxQueue: must be at least 0, not -1`."""
    return f"line {line}: {path_text(path)}: {words}"


def path_text(path: Path) -> str:
    """Writes a path the way people read it: `routing[0].match.lane`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{_short(part)}" if text else _short(part)
    return text or "policy"


def shown(value: object) -> str:
    """Shows a value of the file in a sentence, short and on one line."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int | float):
        return _short(str(value))
    return f"'{_short(str(value))}'"


def _short(text: str) -> str:
    text = _one_line(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _broken(line: int, words: str) -> Document:
    return Document(None, {}, [sentence(line, (), words)])


class _Unwanted(Exception):
    """YAML that is well formed but not wanted in a policy."""

    def __init__(self, line: int, words: str) -> None:
        super().__init__(words)
        self.line = line
        self.words = words


class _Reader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Makes a tree of nodes and no objects: there is no constructor in it that a tag could call."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # so in types-PyYAML
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            raise _Unwanted(line, "aliases (*name) are not read in a policy: write the value out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Unwanted(line, "tags (!name) are not read in a policy")
        if self._depth == DEPTH_MAX:
            raise _Unwanted(line, f"nested deeper than {DEPTH_MAX} levels")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _kind, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]{0,99})", list("-+0123456789")),
    ("float", r"[-+]?(0|[1-9][0-9]{0,99})(\.[0-9]{1,99})?([eE][-+]?[0-9]{1,3})?", list("-+0123456789")),
):
    _Reader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern})\\Z"), _first)


def _plain(root: Node) -> Document:
    """Walks the tree once; the reader has bounded its depth."""
    lines: dict[Path, int] = {(): root.start_mark.line + 1}
    problems: list[str] = []

    def walk(node: Node, path: Path) -> Any:
        if isinstance(node, MappingNode):
            return mapping(node, path)
        if isinstance(node, SequenceNode):
            for index, item in enumerate(node.value):
                lines[(*path, index)] = item.start_mark.line + 1
            return [walk(item, (*path, index)) for index, item in enumerate(node.value)]
        value = _scalar(node)
        words = _unfit(value)
        if words:
            problems.append(sentence(node.start_mark.line + 1, path, words))
        return value

    def mapping(node: MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                problems.append(sentence(line, path, "a key must be a plain word"))
                continue
            key = str(key_node.value)
            if _unfit(key):
                problems.append(sentence(line, path, "a key must be a plain word"))
            elif key in data:
                first = lines[(*path, key)]
                problems.append(sentence(line, (*path, key), f"is given twice, first on line {first}"))
            else:
                lines[(*path, key)] = line
                data[key] = walk(value_node, (*path, key))
        return data

    return Document(walk(root, ()), lines, problems)


def _scalar(node: Node) -> object:
    text = str(node.value)
    if node.tag == f"{_TAG}null":
        return None
    if node.tag == f"{_TAG}bool":
        return text == "true"
    if node.tag == f"{_TAG}int":
        return int(text)
    if node.tag == f"{_TAG}float":
        return float(text)
    # JSON writes a rare character as two escapes, a pair of surrogates: make it one character again.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _unfit(value: object) -> str | None:
    """Says why a value cannot be kept, shown or stored."""
    if isinstance(value, float) and not math.isfinite(value):
        return "this number is too large"
    if isinstance(value, str) and any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in value):
        return "holds a control character"
    return None
