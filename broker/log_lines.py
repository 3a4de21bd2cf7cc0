"""Lines of the log read back, human or JSON, also behind what a supervisor or the journal puts before them. Pure."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from types import NoneType
from typing import Any

_LINE = re.compile(
    r"(?P<at>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<level>[A-Z]+) (?:warmlane\.)?(?P<module>\S+) (?P<said>.*)"
)
_FIELD = re.compile(r"(?:^| )([a-z_]+)=")
_PART = re.compile(r"(\w+) +\| ")
_JSON = '{"at": "'
_PLAIN = (str, int, float, NoneType)
"""What stands for a value in a line of ours; anything else is kept as its JSON."""

LAST = "reason"
"""The field that has the rest of its line, whatever stands in it: it comes last."""


@dataclass
class Line:
    """One line: when, of which part and module, and the fields of its event; `more` are the lines of a traceback."""

    at_ms: int
    part: str
    level: str
    module: str
    fields: dict[str, Any] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)

    @property
    def event(self) -> str:
        """The event's word, "" for a line that has none."""
        return str(self.fields.get("event", ""))

    @property
    def job(self) -> str:
        """The job that it concerns, "" for none."""
        return str(self.fields.get("job", ""))


def read(lines: Iterable[str], part: str = "") -> Iterator[Line]:
    """Reads lines in their order; what is no line of ours belongs to the one before, as a traceback does."""
    last: Line | None = None
    for text in lines:
        line = parse(text.rstrip("\n"), part)
        if line is None:
            if last is not None:
                last.more.append(text.rstrip("\n"))
            continue
        if last is not None:
            yield last
        last = line
    if last is not None:
        yield last


def begins(text: str) -> bool:
    """Whether a line of ours begins here, by a glance."""
    return _JSON in text or _LINE.search(text) is not None


def parse(text: str, part: str = "") -> Line | None:
    """Reads one line; None where it is no line of ours. `part` is whose it is, unless the line says so itself."""
    begin = text.find(_JSON)
    if begin >= 0:
        return _from_json(text[begin:], part)
    found = _LINE.search(text)
    if found is None:
        return None
    named = _PART.match(text)
    said = found["said"]
    fields = _fields(said) if said.startswith("event=") else {"message": said}
    return Line(_ms(found["at"]), named[1] if named else part, found["level"], found["module"], fields)


def _from_json(text: str, part: str) -> Line | None:
    try:
        told = json.loads(text)
        at, level, module = _ms(told.pop("at")), str(told.pop("level")), str(told.pop("module"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    trace = told.pop("trace", [])
    more = [str(row) for row in (trace if isinstance(trace, list) else [trace])]
    part = str(told.pop("part", part))
    fields = {name: value if isinstance(value, _PLAIN) else json.dumps(value) for name, value in told.items()}
    return Line(at, part, level, module, fields, more)


def _fields(said: str) -> dict[str, Any]:
    """The fields of a line for people. The first of a name counts, and what stands behind `reason=` is all reason."""
    said, has_reason, reason = said.partition(f" {LAST}=")
    found: dict[str, Any] = {}
    places = [*_FIELD.finditer(said)]
    ends = [*(place.start() for place in places[1:]), len(said)]
    for place, end in zip(places, ends, strict=True):
        value = said[place.end() : end]
        found.setdefault(place[1], int(value) if value.isdecimal() else value)
    if has_reason:
        found[LAST] = reason
    return found


def _ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1_000)
