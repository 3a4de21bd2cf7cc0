"""Changes a few top-level keys of a JSON object and leaves every other byte as it was.

A body that is parsed and dumped again loses big integers, odd floats, escapes, key order and duplicate keys, and a
prompt cache downstream loses its prefix with them. So the values are parsed by the C scanner only to learn where they
end, and the changes are cut into the original bytes.
"""

import json
import re
from collections.abc import Container, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from broker.errors import BadRequest

DEPTH_MAX = 200
"""Objects and lists within each other, the body itself among them. Well below what Python's own stack bears, which
depends on who reads: what the api can read, a worker must be able to read and to write anew."""


class Member(NamedTuple):
    """One `"key": value` of the object; the three offsets count bytes of the body."""

    key: str
    value: Any
    key_start: int
    start: int
    end: int


def read(body: bytes) -> list[Member]:
    """Scans what a client sent; refuses what is nested more deeply than DEPTH_MAX."""
    members = scan(body)
    if len(body.translate(None, _NO_BRACKETS)) > 2 * DEPTH_MAX:
        _check_depth(members)
    return members


def scan(body: bytes, *, finite: bool = True) -> list[Member]:
    """Lists the top-level members of a JSON object in the order of the body, duplicates included.

    `finite=False` lets NaN and Infinity pass, which some runtimes write although JSON has no such words.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as broken:
        raise BadRequest(f"the body is not valid UTF-8 (byte {broken.start})") from None
    try:
        members = _scan_text(text, (_STRICT if finite else _LENIENT).raw_decode)
    except json.JSONDecodeError as broken:
        where = f"line {broken.lineno} column {broken.colno} (char {broken.pos})"
        raise BadRequest(f"the body is not valid JSON: {broken.msg} at {where}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError:  # Python refuses to read integers of thousands of digits: their cost is quadratic
        raise BadRequest("the body holds a number with too many digits") from None
    return members if text.isascii() else _in_bytes(text, members)


def splice(body: bytes, changes: Mapping[str, object], *, finite: bool = True) -> bytes:
    """Sets top-level keys: present ones in their place, all duplicates alike, missing ones at the end.

    A value given as bytes is JSON already and goes in as it is.
    """
    return splice_members(body, scan(body, finite=finite), changes)


def splice_members(body: bytes, members: list[Member], changes: Mapping[str, object]) -> bytes:
    """Does the work of `splice` for a body that has been scanned already."""
    encoded = {key: value if isinstance(value, bytes) else encode(value) for key, value in changes.items()}
    missing = dict(encoded)
    pieces: list[bytes] = []
    done = 0
    for member in members:
        if member.key in encoded:
            pieces += body[done : member.start], encoded[member.key]
            done = member.end
            missing.pop(member.key, None)
    if missing:
        end = members[-1].end if members else body.index(b"{") + 1
        added = b",".join(encode(key) + b":" + value for key, value in missing.items())
        pieces += body[done:end], b"," if members else b"", added
        done = end
    pieces.append(body[done:])
    return b"".join(pieces)


def without(body: bytes, keys: Container[str]) -> bytes:
    """Takes top-level keys out of a JSON object, each with its comma; gives the very body back if it has none."""
    members = scan(body)
    left = [member for member in members if member.key not in keys]
    if len(left) == len(members):
        return body
    start, end = body.index(b"{") + 1, members[-1].end
    if not left:
        return body[:start] + body[end:]
    # What stays keeps the bytes up to the next member, but for the last: after it only the object's own end may follow.
    pieces = [body[: members[0].key_start]]
    for member, after in pairwise([*members, None]):
        if member is None or member.key in keys:
            continue
        last = member is left[-1]
        pieces.append(body[member.key_start : member.end if last or after is None else after.key_start])
    pieces.append(body[end:])
    return b"".join(pieces)


def encode(value: object) -> bytes:
    """Writes a value as compact ASCII JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _refuse_constant(word: str) -> NoReturn:
    raise BadRequest(f"the body is not valid JSON: {word} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (_INFINITE, -_INFINITE):
        raise BadRequest("the body holds a number that is too large")
    return value


def _check_depth(members: list[Member]) -> None:
    level = [member.value for member in members if isinstance(member.value, _CONTAINERS)]
    for _ in range(DEPTH_MAX):
        if not level:
            return
        level = [
            inner
            for value in level
            for inner in (value.values() if type(value) is dict else value)
            if isinstance(inner, _CONTAINERS)
        ]
    raise BadRequest("the body is nested too deeply")


_CONTAINERS = (dict, list)
_NO_BRACKETS = bytes(range(256)).translate(None, b"[]{}")
_INFINITE = float("inf")
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_LENIENT = json.JSONDecoder()
_SPACE = frozenset(" \t\n\r")
_skip_space = re.compile(r"[ \t\n\r]*").match


def _scan_text(text: str, raw_decode: Any) -> list[Member]:
    """Walks over the object once; offsets count characters."""
    at = _after_space(text, 0)
    if text[at : at + 1] != "{":
        raw_decode(text, at)  # malformed JSON is reported as such, a valid value of another kind as what it is
        raise BadRequest("the body must be a JSON object")
    members: list[Member] = []
    at = _after_space(text, at + 1)
    mark = text[at : at + 1]
    while mark != "}":
        if mark != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        key, colon = raw_decode(text, at)
        if text[colon : colon + 1] != ":":
            colon = _after_space(text, colon)
            if text[colon : colon + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", text, colon)
        start = _after_space(text, colon + 1)
        value, end = raw_decode(text, start)
        members.append(Member(key, value, at, start, end))
        at = _after_space(text, end)
        mark = text[at : at + 1]
        if mark != "}":
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _after_space(text, at + 1)
            mark = text[at : at + 1]
            if mark == "}":
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    at = _after_space(text, at + 1)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return members


def _after_space(text: str, at: int) -> int:
    if text[at : at + 1] not in _SPACE:  # compact JSON, the usual case
        return at
    found = _skip_space(text, at)
    return found.end() if found else at


def _in_bytes(text: str, members: list[Member]) -> list[Member]:
    """Turns offsets in characters into offsets in bytes."""
    chars = done = 0

    def up_to(offset: int) -> int:
        nonlocal chars, done
        done += len(text[chars:offset].encode())
        chars = offset
        return done

    return [Member(m.key, m.value, up_to(m.key_start), up_to(m.start), up_to(m.end)) for m in members]
