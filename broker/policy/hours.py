"""Active hours: when a model is kept warm, by the clock on somebody's wall. Pure.

    Mon-Fri 08:00-12:00, 13:00-19:00, Sat 10:00-14:00 Europe/Berlin

Ranges stand between commas. A range without days has those of the range before it, the first one every day; days
without times have those of the next range (`Mon, Wed 08:00-12:00`). One that ends before it begins goes over midnight
and belongs to the day on which it begins. The zone stands once, at the end; without one it is the zone of the machine
that asks.

Where clocks change, a range begins at the first moment at which a clock on the wall shows its begin or later, and ends
at the last moment before its end: 02:30 of the day that has none is 03:00, and 02:30-02:45 of the day that has two
lasts from the first 02:30 to the second 02:45, so that nothing is unloaded and loaded again within the hour.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
EXAMPLE = "write them like 'Mon-Fri 08:00-19:00 Europe/Berlin'"
DAY_MIN = 24 * 60
TEXT_MAX = 500

_TIMES = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
_AHEAD_DAYS = 9
"""A week and a day on either side: hours come again every week."""


@dataclass(frozen=True)
class Range:
    """One stretch of the day, on some days of the week (0 = Monday). Minutes since midnight."""

    days: frozenset[int]
    begin: int
    end: int  # more than DAY_MIN where it goes over midnight


@dataclass(frozen=True)
class ActiveHours:
    """When a model is kept warm. Instants are ms since 1970, as Redis' clock tells them."""

    ranges: tuple[Range, ...]
    zone: ZoneInfo | None = None  # None = the zone of this machine

    def contains(self, instant_ms: int) -> bool:
        """Whether an instant lies within the hours."""
        return any(begin <= instant_ms < end for begin, end in self._stretches(instant_ms))

    def next_change_ms(self, instant_ms: int) -> int | None:
        """The first instant after this one at which the hours begin or end; None where they never do."""
        for begin, end in self._stretches(instant_ms):
            if begin > instant_ms:
                return begin
            if end > instant_ms:
                return end if end - instant_ms < (_AHEAD_DAYS - 1) * DAY_MIN * 60_000 else None
        return None

    def between(self, from_ms: int, until_ms: int) -> Iterator[tuple[int, int]]:
        """The stretches of the hours between two instants, merged and in order."""
        day = self.wall(from_ms).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=2)
        last = self.wall(until_ms) + timedelta(days=1)
        found: list[tuple[int, int]] = []
        while day <= last:
            for one in self.ranges:
                if day.weekday() in one.days:
                    begin = self._first(day + timedelta(minutes=one.begin))
                    end = self._last(day + timedelta(minutes=one.end))
                    if begin < end:
                        found.append((begin, end))
            day += timedelta(days=1)
        for begin, end in _merged(found):
            if begin < until_ms and end > from_ms:
                yield begin, end

    def _stretches(self, instant_ms: int) -> Iterator[tuple[int, int]]:
        return self.between(instant_ms, instant_ms + _AHEAD_DAYS * DAY_MIN * 60_000)

    def wall(self, instant_ms: int) -> datetime:
        """What a clock on the wall shows, without its zone."""
        utc = datetime.fromtimestamp(instant_ms // 1000, UTC)
        return utc.astimezone(self.zone).replace(tzinfo=None, fold=0)

    def _first(self, wall: datetime) -> int:
        """The first instant at which the clock on the wall shows this or later."""
        early, late = self._instants(wall)
        return early if self.wall(early) == wall else self._jump(early, late)

    def _last(self, wall: datetime) -> int:
        """The last instant before which the clock on the wall shows less than this."""
        early, late = self._instants(wall)
        return late if self.wall(late) == wall else self._jump(early, late)

    def _instants(self, wall: datetime) -> tuple[int, int]:
        """Both readings of a time on the wall, the earlier first; the same one twice where there is only one."""
        both = [_epoch_ms(wall.replace(fold=fold), self.zone) for fold in (0, 1)]
        return min(both), max(both)

    def _jump(self, early: int, late: int) -> int:
        """The instant, after `early` and up to `late`, at which the clock on the wall jumps forward, to the second."""

        def offset(at: int) -> timedelta:
            return self.wall(at) - datetime.fromtimestamp(at // 1000, UTC).replace(tzinfo=None)

        before = offset(early)
        while late - early > 1000:
            middle = (early + late) // 2000 * 1000
            early, late = (middle, late) if offset(middle) == before else (early, middle)
        return late


class HoursNow:
    """Answers whether hours go on now, and works it out again only when they may have changed."""

    def __init__(self, hours: ActiveHours | None) -> None:
        self._hours = hours
        self._from = self._until = 0
        self._within = hours is None

    def __call__(self, instant_ms: int) -> bool:
        """Whether the hours go on at an instant; always, where there are none."""
        if self._hours is not None and not self._from <= instant_ms < self._until:
            self._within = self._hours.contains(instant_ms)
            change = self._hours.next_change_ms(instant_ms)
            self._from, self._until = instant_ms, instant_ms + DAY_MIN * 60_000 if change is None else change
        return self._within


@lru_cache(maxsize=256)
def parse_hours(text: str) -> ActiveHours:
    """Reads active hours; ValueError is one sentence."""
    if len(text) > TEXT_MAX:
        raise ValueError(f"are {len(text)} characters, and {TEXT_MAX} is the most")
    words = text.replace(",", ", ").split()
    zone = None
    if words and not words[-1][:1].isdigit() and not _is_days(words[-1].rstrip(",")):
        zone = _zone(words.pop())
    pieces = [piece.split() for piece in " ".join(words).split(",")]
    ranges: list[Range] = []
    days = frozenset(range(7))
    early: frozenset[int] = frozenset()  # days whose times are still to come
    for piece in pieces:
        if not piece or len(piece) > 2:
            raise ValueError(f"'{' '.join(piece)}' is not days and times; {EXAMPLE}")
        if len(piece) == 1 and _is_days(piece[0]):
            early |= _days(piece[0])
            continue
        if len(piece) == 2:
            days = _days(piece[0]) | early
        elif early:
            days = early
        early = frozenset()
        ranges.append(Range(days, *_times(piece[-1])))
    if early:
        raise ValueError(f"'{text}' ends with days that have no times; {EXAMPLE}")
    return ActiveHours(tuple(ranges), zone)


def _is_days(word: str) -> bool:
    return bool(word) and all(part.capitalize()[:3] in DAYS and part.isalpha() for part in word.split("-"))


def _days(word: str) -> frozenset[int]:
    parts = word.split("-")
    for part in parts:
        if part.capitalize() not in DAYS:
            raise ValueError(f"'{part}' is no day, use {', '.join(DAYS)}")
    numbers = [DAYS.index(part.capitalize()) for part in parts]
    if len(numbers) > 2:
        raise ValueError(f"'{word}' are not days; {EXAMPLE}")
    first, last = numbers[0], numbers[-1]
    return frozenset(day % 7 for day in range(first, (last if last >= first else last + 7) + 1))


def _times(word: str) -> tuple[int, int]:
    found = _TIMES.fullmatch(word)
    if found is None:
        raise ValueError(f"'{word}' are no times; {EXAMPLE}")
    hours_a, minutes_a, hours_b, minutes_b = (int(number) for number in found.groups())
    begin, end = hours_a * 60 + minutes_a, hours_b * 60 + minutes_b
    if minutes_a > 59 or minutes_b > 59 or begin >= DAY_MIN or end > DAY_MIN:
        raise ValueError(f"'{word}' are no times of a day, which go from 00:00 to 24:00")
    if begin == end:
        raise ValueError(f"'{word}' is no time at all; the whole day is 00:00-24:00")
    return begin, end if end > begin else end + DAY_MIN


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        pass  # a name that is not there, that is no name, that is a directory
    known = {zone.lower(): zone for zone in available_timezones()}
    near = difflib.get_close_matches(name.lower()[:64], known, n=1)
    meant = f", did you mean '{known[near[0]]}'?" if near else ", use one like Europe/Berlin or UTC"
    raise ValueError(f"'{name}' is no time zone{meant}")


def _epoch_ms(wall: datetime, zone: ZoneInfo | None) -> int:
    """The instant of a time on the wall; of two, the one that its fold says."""
    return round((wall.replace(tzinfo=zone) if zone is not None else wall).timestamp() * 1000)


def _merged(stretches: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    going: tuple[int, int] | None = None
    for begin, end in sorted(stretches):
        if going is not None and begin <= going[1]:
            going = going[0], max(going[1], end)
            continue
        if going is not None:
            yield going
        going = begin, end
    if going is not None:
        yield going
