"""When a model should be in memory, over whole days of virtual time."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from broker.policy.content import Model
from workers.warmth import Warmth

MINUTE_MS = 60_000
IDLE_MS = 15 * MINUTE_MS
ASKED_FOR_MS = MINUTE_MS  # how long a request keeps a model wanted


def kept(**keys: object) -> Model:
    return Model.model_validate(
        {"backend": "simulated", "model": "x", "keepWarm": True, "idleUnloadMs": IDLE_MS, **keys}
    )


def utc(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def live(model: Model, begin: str, end: str, asked_at: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Runs the waker's decisions minute by minute; gives each change as (Berlin time, warm | cold), from cold."""
    warmth, asked = Warmth(model), {utc(text) for text in asked_at}
    told: list[tuple[str, str]] = []
    warm, used_at, wanted_until = False, 0, 0
    for now in range(utc(begin), utc(end), MINUTE_MS):
        if now in asked:
            wanted_until = now + ASKED_FOR_MS
        demand = {"waited_for": now in asked, "wanted_until": wanted_until}
        if not warm and warmth.wanted(now, **demand):
            warm, used_at = True, now
        elif warm and warmth.idle_too_long(now, idle_ms=now - used_at, **demand):
            warm = False
        elif not (warm and now in asked):
            continue
        else:
            used_at = now
            continue
        wall = datetime.fromtimestamp(now // 1000, UTC).astimezone(ZoneInfo("Europe/Berlin"))
        told.append((f"{wall:%a %H:%M%z}", "warm" if warm else "cold"))
    return told


def test_the_day_on_which_clocks_go_forward() -> None:
    """Sunday, 29 March 2026 has 23 hours in Berlin: the hours begin and end by the clock on the wall."""
    model = kept(activeHours="Sat-Mon 08:00-19:00 Europe/Berlin")

    assert live(model, "2026-03-28 00:00", "2026-03-30 20:00") == [
        ("Sat 08:00+0100", "warm"),
        ("Sat 19:00+0100", "cold"),
        ("Sun 08:00+0200", "warm"),  # 23 hours after Saturday's
        ("Sun 19:00+0200", "cold"),
        ("Mon 08:00+0200", "warm"),
        ("Mon 19:00+0200", "cold"),
    ]


def test_the_day_on_which_clocks_go_back() -> None:
    """Sunday, 25 October 2026 has 25 hours; a night shift goes on through the hour that comes twice."""
    by_day = kept(activeHours="Sat-Sun 08:00-19:00 Europe/Berlin")
    at_night = kept(activeHours="Sat 22:00-02:30, Sun 02:30-05:00 Europe/Berlin")

    assert live(by_day, "2026-10-24 00:00", "2026-10-25 23:00") == [
        ("Sat 08:00+0200", "warm"),
        ("Sat 19:00+0200", "cold"),
        ("Sun 08:00+0100", "warm"),
        ("Sun 19:00+0100", "cold"),
    ]
    assert live(at_night, "2026-10-24 12:00", "2026-10-25 12:00") == [
        ("Sat 22:00+0200", "warm"),
        ("Sun 05:00+0100", "cold"),
    ]


def test_outside_its_hours_it_is_woken_on_demand_and_goes_when_idle() -> None:
    """As any other: 15 minutes after the last request, also when that came within the hours."""
    model = kept(activeHours="Sun 08:00-19:00 Europe/Berlin")
    asked = ["2026-03-29 01:30", "2026-03-29 01:40", "2026-03-29 16:55", "2026-03-29 20:00"]

    assert live(model, "2026-03-29 00:00", "2026-03-29 23:00", asked) == [
        ("Sun 03:30+0200", "warm"),
        ("Sun 03:56+0200", "cold"),
        ("Sun 08:00+0200", "warm"),
        ("Sun 19:11+0200", "cold"),  # last used at 18:55
        ("Sun 22:00+0200", "warm"),
        ("Sun 22:16+0200", "cold"),
    ]


def test_a_worker_that_starts_within_the_hours_loads_at_once() -> None:
    model = kept(activeHours="Sun 08:00-19:00 Europe/Berlin")
    assert live(model, "2026-03-29 10:17", "2026-03-29 10:20") == [("Sun 12:17+0200", "warm")]


def test_without_hours_it_is_always_warm_and_without_keep_warm_never_by_itself() -> None:
    assert live(kept(), "2026-03-28 00:00", "2026-03-30 00:00") == [("Sat 01:00+0100", "warm")]
    assert live(kept(keepWarm=False), "2026-03-28 00:00", "2026-03-30 00:00") == []


@pytest.mark.parametrize(
    ("model", "active"),
    [
        (lambda: kept(activeHours="08:00-19:00 UTC"), True),
        (lambda: kept(activeHours="08:00-19:00 UTC", keepWarm=False), True),  # they also hold a slot for people
        (lambda: kept(activeHours="18:00-19:00 UTC"), False),
        (kept, False),
    ],
)
def test_active_hours_say_that_people_are_expected(model: Callable[[], Model], active: bool) -> None:
    assert Warmth(model()).active(utc("2026-03-28 12:00")) is active
