"""What a request holds beside plain text, as each dialect tells it; below the dialects, and without one of its own.

A dialect knows which of its parts are what. What it does not know it calls unreadable, so that a part that a newer
client sends is not taken for harmless. The words of a kind are those of the policy's `remote.allow`.
"""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["text", "systemPrompts", "toolOutput", "fileContext", "images", "unreadable"]

STRAY_CHARS = 200
"""So much text under keys that a dialect does not know may be an option; more may be a file."""


class Held(NamedTuple):
    """One thing in a request. `text` is what it says, where that is text; `note` names what cannot be read."""

    kind: Kind
    where: str
    text: str = ""
    note: str = ""


PartOf = Callable[[dict[str, Any], str, Kind], Iterator[Held]]


def of_content(content: object, where: str, kind: Kind, part: PartOf) -> Iterator[Held]:
    """Tells of a message's content: a text, or a list of parts that `part` knows."""
    if content is None or content == "" or content == []:
        return
    if isinstance(content, str):
        yield Held(kind, where, content)
    elif isinstance(content, list):
        for index, one in enumerate(content):
            at = f"{where}[{index}]"
            if isinstance(one, str):
                yield Held(kind, at, one)
            elif isinstance(one, dict):
                yield from part(one, at, kind)
            else:
                yield unreadable(at, "a part that is no object")
    elif isinstance(content, dict):
        yield from part(content, where, kind)
    else:
        yield unreadable(where, "a content that is no text")


def of_messages(request: Mapping[str, Any], roles: Mapping[str, Kind], message_of: PartOf) -> Iterator[Held]:
    """Tells of each message: `message_of` knows what stands in one whose role is known, and what kind its text is."""
    messages = request.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        where = f"messages[{index}]"
        kind = roles.get(str(message.get("role"))) if isinstance(message, dict) else None
        if kind is None:
            yield unreadable(where, "a message of a role that is not known here")
        else:
            yield from message_of(message, where, kind)


def unreadable(where: str, note: str) -> Held:
    """Something that nobody here can read; nothing allows that it leaves."""
    return Held("unreadable", where, note=note)


def unknown_part(part: Mapping[str, Any], where: str) -> Held:
    """A part of a type that its dialect does not know."""
    name = str(part.get("type") or "no type")[:40]
    return unreadable(where, f"a part of type {name}")


def file_of(data: object, where: str) -> Iterator[Held]:
    """A file in base64, perhaps as a data URL: file context, and unreadable where it is no text."""
    text = text_of(data)
    if text is None:
        yield unreadable(where, "a file that is no text")
    yield Held("fileContext", where, text or "")


def text_of(data: object) -> str | None:
    """Reads base64 or a data URL as text, None where it is none."""
    if not isinstance(data, str):
        return None
    head, comma, rest = data.partition(",") if data.startswith("data:") else ("", "", data)
    if comma and ";base64" not in head:
        return rest
    try:
        text = base64.b64decode(rest, validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return None if "\0" in text else text


def strays(value: Mapping[str, Any], known: frozenset[str], where: str) -> Iterator[Held]:
    """Tells of text under keys that the dialect does not know, where there is too much of it for an option."""
    for key, inner in value.items():
        if key not in known and chars_of(inner) > STRAY_CHARS:
            at = f"{where}.{key[:40]}" if where else key[:40]
            yield unreadable(at, "much text under a key that is not known here")


def chars_of(value: object) -> int:
    """Counts the characters of all texts below a value, keys among them."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + chars_of(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(4 if isinstance(inner, int | float) else chars_of(inner) for inner in value)
    return 0
