"""Loads the Lua verbs: one file each under `lua/`, with includes, each put in once and in order.

A script's header is its contract: `header` reads the KEYS and ARGV names from it, and a test holds the Python callers
against them.
"""

import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib import resources

from broker import lifecycle

_INCLUDE = re.compile(r"^--- @include (\S+)$", re.MULTILINE)
_FLAGS = re.compile(r"^--- @flags (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """One verb: its whole text, ready for EVAL, and the text's SHA-1 for EVALSHA."""

    name: str
    text: str
    sha: str


class ScriptMissing(Exception):
    """A verb or an include has no file, or includes go in a circle."""


def read_all() -> None:
    """Reads every file now: those that an upgrade puts in their place are for processes that start after it."""
    _texts()


def names() -> list[str]:
    """Lists every verb that has a file."""
    return sorted(f.name.removesuffix(".lua") for f in _folder().iterdir() if f.name.endswith(".lua"))


@cache
def load(name: str, *, shebang: bool) -> Script:
    """Reads a verb and resolves its includes. `shebang` says by which flags a server runs it, which fakeredis does not
    know: without any, one that is full, or cannot write its files, refuses it before it begins."""
    source = _read(name)
    text = _resolve(source, done=set(), path=(name,))
    flags = _FLAGS.search(source)
    if shebang:
        text = f"#!lua{f' flags={flags.group(1)}' if flags else ''}\n{text}"
    return Script(name, text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def header(name: str) -> tuple[list[str], list[str]]:
    """Gives the names of KEYS and ARGV that a verb's header promises, in order."""
    comment = "\n".join(line for line in _read(name).split("\n") if line.startswith("--"))
    return (
        [m.group(1) for m in re.finditer(r"KEYS\[\d+\] (\w+)", comment)],
        [m.group(1) for m in re.finditer(r"ARGV\[\d+\] (\w+)", comment)],
    )


def _folder() -> resources.abc.Traversable:
    return resources.files("broker").joinpath("lua")


@cache
def _texts() -> dict[str, str]:
    """Verbs and includes by their names, as `_read` takes them."""
    folder = _folder()
    return {
        f"{prefix}{file.name.removesuffix('.lua')}": file.read_text(encoding="utf-8")
        for prefix, place in (("", folder), ("includes/", folder.joinpath("includes")))
        if place.is_dir()
        for file in place.iterdir()
        if file.name.endswith(".lua")
    }


def _read(name: str) -> str:
    if name == "includes/lifecycle":
        return lifecycle.as_lua()
    try:
        return _texts()[name]
    except KeyError:
        raise ScriptMissing(f"no Lua file for {name}") from None


def _resolve(source: str, *, done: set[str], path: tuple[str, ...]) -> str:
    def include(match: re.Match[str]) -> str:
        name = f"includes/{match.group(1)}"
        if name in path:
            raise ScriptMissing(f"includes go in a circle: {' -> '.join((*path, name))}")
        if name in done:
            return ""
        done.add(name)
        return _resolve(_read(name), done=done, path=(*path, name))

    return _INCLUDE.sub(include, source)
