"""Reads a request as it would leave: the copy after the policy's redactions, what it holds, and the secrets in it.

Pure but for the scanner. What cannot be read is noted as such, and nothing that is noted so ever leaves: a body that
names a key twice (two readers may see two requests), token numbers, sounds, files that are no text.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from broker.dialects import anthropic_holds, ollama_holds, openai_holds, responses_holds
from broker.dialects.holds import Held
from broker.policy.remote import Remote
from broker.trust import secrets
from broker.trust.files import file_in

NOTED_MAX = 20
"""So many places of each kind are named; that there are more changes no verdict."""

HOLDS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Held]]] = {
    "/v1/chat/completions": openai_holds.chat_holds,
    "/v1/completions": openai_holds.completion_holds,
    "/v1/embeddings": openai_holds.embedding_holds,
    "/v1/responses": responses_holds.responses_holds,
    "/v1/messages": anthropic_holds.messages_holds,
    "/api/chat": ollama_holds.chat_holds,
    "/api/generate": ollama_holds.generate_holds,
    "/api/embed": ollama_holds.embed_holds,
    "/api/embeddings": ollama_holds.embed_holds,
}
"""Who knows the parts of a request, by its path."""

_STRUCTURE = frozenset({"role", "type", "model"})
_escape = re.compile(rb"\\+(.?)", re.DOTALL)
_BETWEEN = b"\n\x1e\n"  # no pattern of the scanner's reaches over it


class _Unreadable(Exception):
    """The body is not what every reader would take it for."""


@dataclass(frozen=True)
class Noted:
    """One thing that stands in a request: what, where, and a word about it. Never the thing itself."""

    kind: str
    where: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.where} ({self.note})" if self.note else self.where


@dataclass(frozen=True)
class Content:
    """What a request would take out: the size and hash of the copy, what it holds, what was replaced in it."""

    size: int
    copy_hash: str
    held: tuple[Noted, ...]
    secrets: tuple[Noted, ...]
    redacted: tuple[tuple[str, int], ...]

    def of(self, kind: str) -> list[Noted]:
        """What it holds of one kind."""
        return [noted for noted in self.held if noted.kind == kind]

    @property
    def kinds(self) -> list[str]:
        """The kinds that it holds."""
        return sorted({noted.kind for noted in self.held})


def examine(endpoint: str, body: bytes, rules: Remote) -> Content:
    """Reads a request; raises CannotScan. It may take seconds: call it in a thread."""
    if len(body) > rules.max_bytes:  # its verdict is known, and what is larger than this is never read
        return Content(len(body), "", (), (), ())
    try:
        request = _parsed(body)
        copy, counts = redacted(body, rules)
        if counts:
            request = _parsed(copy)
        held = list(HOLDS[endpoint](request)) if endpoint in HOLDS else [_strange(endpoint)]
        return Content(
            len(copy),
            hash_of_copy(copy),
            tuple(_noted(held)),
            tuple(_secrets_in(request, held)),
            tuple(sorted(counts.items())),
        )
    except _Unreadable as why:
        return Content(len(body), "", (Noted("unreadable", "the body", str(why)),), (), ())
    except RecursionError:
        return Content(len(body), "", (Noted("unreadable", "the body", "nested too deeply"),), (), ())


def redacted(body: bytes, rules: Remote) -> tuple[bytes, dict[str, int]]:
    """Gives the copy that leaves, and how often each redaction was applied; without one it is the body itself."""
    if not rules.redact:
        return body, {}
    patterns = [(one.name, re.compile(one.pattern), one.replacement.replace("\\", "\\\\")) for one in rules.redact]
    counts: Counter[str] = Counter()

    def replaced(value: Any, key: str = "") -> Any:
        if isinstance(value, str) and key not in _STRUCTURE:
            for name, pattern, replacement in patterns:
                value, times = pattern.subn(replacement, value)
                if times:
                    counts[name] += times
            return value
        if isinstance(value, dict):
            return {name: replaced(inner, name) for name, inner in value.items()}
        return [replaced(inner) for inner in value] if isinstance(value, list) else value

    copy = replaced(_parsed(body))
    return (json.dumps(copy, separators=(",", ":")).encode(), dict(counts)) if counts else (body, {})


def hash_of_copy(copy: bytes) -> str:
    """By what the last door knows that what it sends is what was judged."""
    return hashlib.sha256(copy).hexdigest()[:32]


def _parsed(body: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _Unreadable("it names a key twice")
        return found

    try:
        request = json.loads(body.decode(), object_pairs_hook=unique)
    except ValueError:
        raise _Unreadable("it is no JSON") from None
    if not isinstance(request, dict):
        raise _Unreadable("it is no JSON object")
    return request


def _strange(endpoint: str) -> Held:
    return Held("unreadable", "the body", note=f"nobody knows the parts of {endpoint[:40]}")


def _noted(held: list[Held]) -> Iterator[Noted]:
    """What is worth a word, at most NOTED_MAX of each kind; a plain text is where a file shows in it."""
    counts: Counter[str] = Counter()
    for one in held:
        kind, note = one.kind, one.note
        if kind == "text":
            note = file_in(one.text)
            if not note:
                continue
            kind = "fileContext"
        counts[kind] += 1
        if counts[kind] <= NOTED_MAX:
            yield Noted(kind, one.where, note)


def _secrets_in(request: Any, held: list[Held]) -> Iterator[Noted]:
    """Scans every text of the request, whatever part of it that is, and the texts of files."""
    texts, places = [], []
    for where, text in _texts(request, ""):
        texts.append(text.encode(errors="replace"))
        places.append(where)
    for one in held:
        if one.kind == "fileContext" and one.text:
            texts.append(one.text.encode(errors="replace"))
            places.append(one.where)
    for index, encoded in enumerate(texts[:]):  # JSON in a text, and code that writes it
        if b"\\" in encoded:
            texts.append(_unescaped(encoded))
            places.append(places[index])
    starts, at = [], 0
    for encoded in texts:
        starts.append(at)
        at += len(encoded) + len(_BETWEEN)
    whole = _BETWEEN.join(texts)
    told: set[tuple[str, int]] = set()
    for match in secrets.scan(whole):
        index = max(0, bisect_right(starts, match.start) - 1)
        line = whole.count(b"\n", starts[index], match.start) + 1
        if (places[index], line) not in told and len(told) < NOTED_MAX:
            told.add((places[index], line))
            yield Noted(match.kind, places[index], f"line {line}")


def _unescaped(text: bytes) -> bytes:
    """Takes backslashes away, however many levels of them there are: a secret must not hide behind one."""
    return _escape.sub(lambda found: b"\n" if found.group(1) == b"n" else found.group(1), text)


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text and where it stands. A short one comes with its key, which may be what gives a secret away."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            at = f"{where}.{key}" if where else key
            if isinstance(inner, str):
                yield at[:200], f"{key}: {inner}"
            else:
                if len(key) > 8:
                    yield at[:200], key
                yield from _texts(inner, at)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{where}[{index}]")
