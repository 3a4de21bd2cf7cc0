"""Turns what pydantic found wrong into sentences that a person can act on."""

import difflib
import typing
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from broker.policy.content import Content, LaneEntry, Match, Model, Rule
from broker.policy.document import Path, shown
from broker.policy.remote import Redaction, Remote, RemoteOfModel
from broker.policy.webhooks import Webhooks

PROBLEMS_MAX = 100

_PLACES: dict[type[BaseModel], str] = {
    Content: "at the top of the file",
    Model: "in a model",
    LaneEntry: "in a lane",
    Match: "in a rule's match",
    Rule: "in a routing rule",
    Remote: "in remote",
    RemoteOfModel: "in a model's remote",
    Redaction: "in a redaction",
    Webhooks: "in webhooks",
}
_NOT_HERE: dict[type[BaseModel], dict[str, str]] = {
    Content: {"callers": "callers are made with `gateway key new`, not in the policy"},
}
_MAPPING_TYPES = frozenset({"dict_type", "model_type", "model_attributes_type"})


def from_validation(error: ValidationError) -> Iterator[tuple[Path, str]]:
    """Gives path and words of each problem; past a hundred nobody reads on."""
    for found in error.errors(include_url=False)[:PROBLEMS_MAX]:
        path: Path = found["loc"]
        if path and path[-1] == "[key]":
            path = path[:-1]
        yield path, _words(found["type"], path, found.get("input"), found.get("ctx", {}))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Gives `, did you mean 'x'?`, or nothing where no known word is near."""
    near = near_words(word, known, most=1)
    return f", did you mean '{near[0]}'?" if near else ""


def meant_or_known(word: str, known: Collection[str]) -> str:
    """The same, or all the known words where none is near."""
    return did_you_mean(word, known) or f", known here are {', '.join(known)}"


def near_words(word: str, known: Iterable[str], *, most: int, cutoff: float = 0.6) -> list[str]:
    """Gives the known words that look like this one, whatever their case, hyphens and underscores."""
    flat: dict[str, str] = {}
    for candidate in known:
        flat.setdefault(_flat(candidate), candidate)
    return [flat[near] for near in difflib.get_close_matches(_flat(word[:200]), flat, n=most, cutoff=cutoff)]


def _flat(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


def _words(kind: str, path: Path, value: Any, ctx: dict[str, Any]) -> str:
    if kind == "extra_forbidden":
        return _unknown_key(path)
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "literal_error":
        return _not_one_of(path, value, typing.get_args(_field_type(path)))
    if kind == "int_type":
        return f"must be a whole number{_unit(path)}, not {shown(value)}"
    if kind in ("float_type", "finite_number"):
        return f"must be a number, not {shown(value)}"
    if kind == "greater_than_equal":
        return f"must be at least {ctx['ge']:,.0f}, not {shown(value)}"
    if kind == "greater_than":
        return f"must be more than {ctx['gt']:g}, not {shown(value)}"
    if kind == "less_than_equal":
        return f"must be at most {ctx['le']:,.0f}, not {shown(value)}"
    if kind == "bool_type":
        return f"must be true or false, not {shown(value)}"
    if kind == "string_type":
        return f"must be text, not {shown(value)}"
    if kind == "list_type":
        return f"must be a list, not {shown(value)}"
    if kind == "too_short":
        return "needs at least one entry"
    if kind in _MAPPING_TYPES:
        return f"must be a mapping of keys to values, not {shown(value)}"
    return f"is wrong ({kind.replace('_', ' ')})"


def _unit(path: Path) -> str:
    key = str(path[-1]) if path else ""
    units = {"Ms": " of milliseconds", "Mb": " of megabytes", "Bytes": " of bytes", "Days": " of days"}
    return next((unit for end, unit in units.items() if key.endswith(end)), "")


def _not_one_of(path: Path, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        return f"must be one of {', '.join(allowed)}, not {shown(value)}"
    meant = did_you_mean(value, allowed)
    return f"must be one of {', '.join(allowed)}, not {shown(value)}{meant}"


def _unknown_key(path: Path) -> str:
    key = str(path[-1])
    part = _part_at(path[:-1])
    if key in _NOT_HERE.get(part, {}):
        return _NOT_HERE[part][key]
    keys = _keys(part)
    if not near_words(key, keys, most=1, cutoff=0.85):  # a slip of the pen is likelier than the wrong place
        for other, place in _PLACES.items():
            if key in _keys(other) or key in _NOT_HERE.get(other, {}):
                return f"unknown key {shown(key)} here, it belongs {place}"
    return f"unknown key {shown(key)}{meant_or_known(key, keys)}"


def _keys(part: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in part.model_fields.items()]


def _part_at(path: Path) -> type[BaseModel]:
    """Says which part of the file stands at a path."""
    if not path:
        return Content
    if path[0] == "routing":
        return Match if path[-1] == "match" else Rule
    if path[0] == "remote":
        return Redaction if "redact" in path[1:2] and len(path) > 2 else Remote
    if path[0] == "models" and path[2:3] == ("remote",):
        return RemoteOfModel
    return Model if path[0] == "models" else LaneEntry


def _field_type(path: Path) -> Any:
    """Gives the Literal of the field at a path, also where it may be left out or stands in a list."""
    if isinstance(path[-1], int):
        return _literal_in(_field_type(path[:-1]))
    for info in _part_at(path[:-1]).model_fields.values():
        if info.alias == path[-1]:
            wider = typing.get_args(info.annotation)
            return next((option for option in wider if typing.get_origin(option) is typing.Literal), info.annotation)
    return None


def _literal_in(kind: Any) -> Any:
    """Finds the Literal that a list's entries are."""
    if kind is None or typing.get_origin(kind) is typing.Literal:
        return kind
    return next((found for option in typing.get_args(kind) if (found := _literal_in(option)) is not None), None)
