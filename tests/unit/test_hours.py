"""Active hours: what they mean on the clock of a wall, through both changes of the clocks."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.policy.hours import ActiveHours, HoursNow, parse_hours

HOUR_MS = 3_600_000
WEEK = "Mon-Fri 08:00-19:00 Europe/Berlin"


def at(text: str, zone: str = "UTC", fold: int = 0) -> int:
    """The instant of `2026-03-29 08:00` on a wall, in ms."""
    wall = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold)
    return round(wall.timestamp() * 1000)


CONTAINS = [
    # 2026-11-27 is a Friday; Berlin is an hour before UTC then, two in summer
    (WEEK, "2026-11-27 06:59", False),
    (WEEK, "2026-11-27 07:00", True),
    (WEEK, "2026-11-27 17:59", True),
    (WEEK, "2026-11-27 18:00", False),
    (WEEK, "2026-11-28 12:00", False),
    (WEEK, "2026-07-03 06:00", True),
    (WEEK, "2026-07-03 17:00", False),
    ("08:00-19:00 UTC", "2026-11-28 08:00", True),
    ("00:00-24:00 UTC", "2026-11-28 00:00", True),
    ("Sat 00:00-24:00 UTC", "2026-11-28 23:59", True),
    ("Sat 00:00-24:00 UTC", "2026-11-29 00:00", False),
    ("Mon-Fri 08:00-12:00, 13:00-17:00, Sat 10:00-14:00 UTC", "2026-11-27 12:30", False),
    ("Mon-Fri 08:00-12:00, 13:00-17:00, Sat 10:00-14:00 UTC", "2026-11-27 13:30", True),
    ("Mon-Fri 08:00-12:00, 13:00-17:00, Sat 10:00-14:00 UTC", "2026-11-28 13:30", True),
    ("Mon-Fri 08:00-12:00, 13:00-17:00, Sat 10:00-14:00 UTC", "2026-11-28 09:30", False),
    ("Mon, Wed, Fri-Sat 08:00-12:00 UTC", "2026-11-26 09:00", False),
    ("Mon, Wed, Fri-Sat 08:00-12:00 UTC", "2026-11-25 09:00", True),
    ("Mon, Wed, Fri-Sat 08:00-12:00 UTC", "2026-11-28 09:00", True),
    ("Sat-Mon 08:00-12:00 UTC", "2026-11-29 09:00", True),
    ("Sat-Mon 08:00-12:00 UTC", "2026-12-01 09:00", False),
    # over midnight: Friday's night is Saturday's morning, Sunday's is not
    ("Mon-Fri 22:00-06:00 UTC", "2026-11-28 05:59", True),
    ("Mon-Fri 22:00-06:00 UTC", "2026-11-28 06:00", False),
    ("Mon-Fri 22:00-06:00 UTC", "2026-11-30 05:00", False),
    ("fri 22:00-00:00 UTC", "2026-11-27 23:59", True),
    ("fri 22:00-00:00 UTC", "2026-11-28 00:00", False),
]


@pytest.mark.parametrize(("text", "instant", "within"), CONTAINS)
def test_an_instant_lies_within_the_hours_or_not(text: str, instant: str, within: bool) -> None:
    assert parse_hours(text).contains(at(instant)) is within


# Berlin, 2026: 03-29 has no 02:00 to 03:00, 10-25 has it twice.
STRETCHES = [
    # the gap: the day is an hour shorter
    ("08:00-19:00 Europe/Berlin", "2026-03-28 18:00", "2026-03-29 06:00", "2026-03-29 17:00"),
    ("Sun 00:00-24:00 Europe/Berlin", "2026-03-28 12:00", "2026-03-28 23:00", "2026-03-29 22:00"),
    # it begins where there is no such time: at the jump; it ends there: at the jump too
    ("Sun 02:30-05:00 Europe/Berlin", "2026-03-28 12:00", "2026-03-29 01:00", "2026-03-29 03:00"),
    ("Sun 01:00-02:30 Europe/Berlin", "2026-03-28 12:00", "2026-03-29 00:00", "2026-03-29 01:00"),
    ("Sat 22:00-02:30 Europe/Berlin", "2026-03-28 12:00", "2026-03-28 21:00", "2026-03-29 01:00"),
    # wholly in the gap: not that Sunday, but the next
    ("Sun 02:10-02:50 Europe/Berlin", "2026-03-28 12:00", "2026-04-05 00:10", "2026-04-05 00:50"),
    # the fold: the day is an hour longer
    ("08:00-19:00 Europe/Berlin", "2026-10-24 18:00", "2026-10-25 07:00", "2026-10-25 18:00"),
    ("Sun 00:00-24:00 Europe/Berlin", "2026-10-24 12:00", "2026-10-24 22:00", "2026-10-25 23:00"),
    # from the first 02:30 on, until the second
    ("Sun 02:30-05:00 Europe/Berlin", "2026-10-24 12:00", "2026-10-25 00:30", "2026-10-25 04:00"),
    ("Sun 01:00-02:30 Europe/Berlin", "2026-10-24 12:00", "2026-10-24 23:00", "2026-10-25 01:30"),
    ("Sun 02:30-02:45 Europe/Berlin", "2026-10-24 12:00", "2026-10-25 00:30", "2026-10-25 01:45"),
    ("Sat 22:00-02:30 Europe/Berlin", "2026-10-24 12:00", "2026-10-24 20:00", "2026-10-25 01:30"),
    # half an hour, on the other half of the world
    ("Sun 01:00-06:00 Australia/Lord_Howe", "2026-10-03 00:00", "2026-10-03 14:30", "2026-10-03 19:00"),
    # a whole day that was left out: Samoa had no 30th of December
    ("Fri 08:00-12:00 Pacific/Apia", "2011-12-28 12:00", "2012-01-05 18:00", "2012-01-05 22:00"),
]


@pytest.mark.parametrize(("text", "before", "begin", "end"), STRETCHES)
def test_hours_begin_and_end_right_where_clocks_change(text: str, before: str, begin: str, end: str) -> None:
    hours = parse_hours(text)
    assert not hours.contains(at(before))
    assert hours.next_change_ms(at(before)) == at(begin)
    assert hours.contains(at(begin)) and not hours.contains(at(begin) - 1)
    assert hours.next_change_ms(at(begin)) == at(end)
    assert hours.contains(at(end) - 1) and not hours.contains(at(end))


@pytest.mark.parametrize("text", ["00:00-24:00 Europe/Berlin", "08:00-20:00,20:00-08:00 UTC"])
def test_hours_that_never_end_have_no_change(text: str) -> None:
    for instant in ("2026-03-29 00:59", "2026-10-25 00:30", "2026-11-28 12:00"):
        assert parse_hours(text).contains(at(instant))
        assert parse_hours(text).next_change_ms(at(instant)) is None


def test_ranges_that_touch_are_one_stretch() -> None:
    hours = parse_hours("Mon 20:00-24:00, Tue 00:00-04:00 UTC")
    assert hours.next_change_ms(at("2026-11-30 21:00")) == at("2026-12-01 04:00")


@pytest.fixture
def new_york() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "America/New_York"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def test_without_a_zone_the_machine_s_own_counts(new_york: None) -> None:
    hours = parse_hours("Mon-Sun 08:00-19:00")
    for instant in ("2026-03-07 23:00", "2026-03-08 06:00", "2026-11-01 05:00", "2026-07-01 03:00"):
        zoned = parse_hours("Mon-Sun 08:00-19:00 America/New_York")
        assert hours.next_change_ms(at(instant)) == zoned.next_change_ms(at(instant))
        assert hours.contains(at(instant)) is zoned.contains(at(instant))
    assert hours.contains(at("2026-03-08 12:00")) and not hours.contains(at("2026-03-08 11:59"))


EXAMPLE = "write them like 'Mon-Fri 08:00-19:00 Europe/Berlin'"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", f"'' is not days and times; {EXAMPLE}"),
        ("Mon-Fri", f"'Mon-Fri' ends with days that have no times; {EXAMPLE}"),
        ("Mon-Fri 08:00-19:00 Europe/Berln", "'Europe/Berln' is no time zone, did you mean 'Europe/Berlin'?"),
        ("08:00-19:00 ../../etc/passwd", "'../../etc/passwd' is no time zone, use one like Europe/Berlin or UTC"),
        ("08:00-19:00 GMT+1", "'GMT+1' is no time zone, did you mean 'GMT+0'?"),
        ("Mon-Fry 08:00-19:00 UTC", "'Fry' is no day, use Mon, Tue, Wed, Thu, Fri, Sat, Sun"),
        ("Mon-Wed-Fri 08:00-19:00 UTC", f"'Mon-Wed-Fri' are not days; {EXAMPLE}"),
        ("Mon 8-19 UTC", f"'8-19' are no times; {EXAMPLE}"),
        ("Mon 8-19", f"'8-19' are no times; {EXAMPLE}"),
        ("Mon 08:00-25:00 UTC", "'08:00-25:00' are no times of a day, which go from 00:00 to 24:00"),
        ("Mon 08:60-10:00 UTC", "'08:60-10:00' are no times of a day, which go from 00:00 to 24:00"),
        ("Mon 24:00-08:00 UTC", "'24:00-08:00' are no times of a day, which go from 00:00 to 24:00"),
        ("Mon 08:00-08:00 UTC", "'08:00-08:00' is no time at all; the whole day is 00:00-24:00"),
        ("Mon 08:00 - 10:00 UTC", f"'Mon 08:00 - 10:00' is not days and times; {EXAMPLE}"),
        ("Mon 08:00-10:00,, Tue 08:00-10:00 UTC", f"'' is not days and times; {EXAMPLE}"),
        ("08:00-09:00," * 50, "are 600 characters, and 500 is the most"),
    ],
)
def test_what_is_wrong_with_hours_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_hours(text)
    assert str(caught.value) == sentence


DAY_NAMES = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MINUTES = st.integers(0, 24 * 60 - 1)
RANGES = st.lists(
    st.tuples(st.sampled_from(DAY_NAMES), st.sampled_from(DAY_NAMES), MINUTES, MINUTES).filter(lambda r: r[2] != r[3]),
    min_size=1,
    max_size=4,
)
ZONES = st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "UTC"])
NEAR_A_CHANGE = st.sampled_from(
    [
        at("2026-03-29 01:00"),
        at("2026-10-25 01:00"),
        at("2026-03-08 07:00"),
        at("2026-11-01 06:00"),
        at("2026-10-03 15:30"),
    ]
)
INSTANTS = st.one_of(
    st.integers(at("2020-01-01"), at("2035-01-01")),
    st.builds(lambda change, away: change + away, NEAR_A_CHANGE, st.integers(-30 * HOUR_MS, 30 * HOUR_MS)),
)


def spelled(ranges: list[tuple[str, str, int, int]], zone: str) -> str:
    def clock(minutes: int) -> str:
        return f"{minutes // 60:02}:{minutes % 60:02}"

    return ", ".join(f"{a}-{b} {clock(begin)}-{clock(end)}" for a, b, begin, end in ranges) + f" {zone}"


def by_the_wall(ranges: list[tuple[str, str, int, int]], zone: str, instant: int) -> bool:
    """Reads the clock on the wall, as a person would; true to the minute on every day without a change of clocks."""
    wall = datetime.fromtimestamp(instant // 1000, UTC).astimezone(ZoneInfo(zone))
    minute = wall.hour * 60 + wall.minute
    for a, b, begin, end in ranges:
        first, last = DAY_NAMES.index(a), DAY_NAMES.index(b)
        days = {d % 7 for d in range(first, (last if last >= first else last + 7) + 1)}
        today, yesterday = wall.weekday() in days, (wall.weekday() - 1) % 7 in days
        if begin < end and today and begin <= minute < end:
            return True
        if begin > end and ((today and minute >= begin) or (yesterday and minute < end)):
            return True
    return False


def clocks_change_near(zone: str, instant: int) -> bool:
    around = [
        (datetime.fromtimestamp(instant // 1000, UTC) + timedelta(hours=hours)).astimezone(ZoneInfo(zone)).utcoffset()
        for hours in (-3, 3)
    ]
    return around[0] != around[1]


@settings(max_examples=100, deadline=None)
@given(RANGES, ZONES, INSTANTS)
@example([("Sun", "Sun", 150, 165)], "Europe/Berlin", at("2026-10-25 00:50"))
def test_hours_follow_the_clock_on_the_wall(ranges: list[tuple[str, str, int, int]], zone: str, instant: int) -> None:
    """Away from a change of clocks it is what the wall shows; the next change is the first, and it is one."""
    hours = parse_hours(spelled(ranges, zone))
    if not clocks_change_near(zone, instant):
        assert hours.contains(instant) is by_the_wall(ranges, zone, instant)
    change = hours.next_change_ms(instant)
    if change is None:
        assert hours.contains(instant) and all(hours.contains(instant + n * 6 * HOUR_MS) for n in range(30))
        return
    assert change > instant
    assert hours.contains(change) is not hours.contains(instant)
    for part in range(20):
        assert hours.contains(instant + (change - instant) * part // 20) is hours.contains(instant)
    assert hours.contains(change - 1) is hours.contains(instant)


@settings(max_examples=25, deadline=None)
@given(RANGES, ZONES, st.lists(INSTANTS, min_size=1, max_size=6))
def test_a_remembered_answer_is_the_right_one(
    ranges: list[tuple[str, str, int, int]], zone: str, instants: list[int]
) -> None:
    """Also when the clock is set back."""
    hours = parse_hours(spelled(ranges, zone))
    now = HoursNow(hours)
    for instant in instants:
        for later in (instant, instant + 60_000, instant + 5 * HOUR_MS):
            assert now(later) is hours.contains(later)


def test_who_has_no_hours_is_always_within_them() -> None:
    assert HoursNow(None)(0) is True
    assert isinstance(parse_hours(WEEK), ActiveHours)
