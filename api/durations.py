"""Lengths of time and instants, as people write them: `90m`, `12h`, `2026-11-30T06:00:00Z`. One reader for all."""

import re
from datetime import datetime

UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}
LENGTH_PATTERN = "^[1-9][0-9]{0,8}(ms|s|m|h|d|w)$"

_length = re.compile("([1-9][0-9]{0,8})(ms|s|m|h|d|w)").fullmatch
_instant = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", re.ASCII).fullmatch
_seconds = re.compile(r"[1-9]\d{9}(\.\d{1,6})?", re.ASCII).fullmatch  # a shorter text is a length that lacks its unit
_SHOWN = 40


def length_ms(text: str) -> int:
    """Reads a length of time in ms; raises ValueError with a sentence."""
    found = _length(text.strip().lower())
    if found is None:
        raise ValueError(f"{text[:_SHOWN]!r} is no length of time: write it like 90d, 12h or 30m")
    return int(found.group(1)) * UNITS_MS[found.group(2)]


def instant_ms(told: object, *, now_ms: int) -> int:
    """Reads an instant in ms since 1970: RFC 3339 with its zone, seconds since 1970, as a number or as a text, or a
    length of time from now on; raises ValueError with a sentence."""
    if isinstance(told, int | float) and not isinstance(told, bool):
        return round(told * 1_000)
    if isinstance(told, str):
        if _length(told.strip().lower()):
            return now_ms + length_ms(told)
        if _seconds(told):
            return round(float(told) * 1_000)
        if _instant(told):
            return round(datetime.fromisoformat(told).timestamp() * 1_000)
    raise ValueError("must be an instant like 2026-11-30T06:00:00Z, seconds since 1970, or a length of time like 10m")
