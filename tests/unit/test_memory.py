"""Who must go so that a model fits: a pure choice."""

from dataclasses import replace

import pytest

from workers.memory import Resident, cannot_fit, evictions, predicted_bytes

GIB = 1 << 30
IDLE = Resident(
    "idle", 4 * GIB, load_ms=10_000, weight=1, idle_ms=60_000, stayed_ms=90_000, min_stay_ms=60_000, evictable=True
)


def test_what_fits_evicts_nobody() -> None:
    assert evictions(4 * GIB, 5 * GIB, [IDLE]) == []
    assert evictions(0, 0, [IDLE]) == []


def test_a_load_needs_a_little_more_than_its_footprint() -> None:
    assert evictions(4 * GIB, 4 * GIB, [IDLE]) == ["idle"]
    assert evictions(4 * GIB, 4 * GIB, []) is None


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("busy", {"idle_ms": 0}),
        ("inside its minimum stay", {"stayed_ms": 59_999}),
        ("not evictable", {"evictable": False}),
    ],
)
def test_who_may_not_go_does_not_go(what: str, change: dict[str, float | bool]) -> None:
    assert evictions(4 * GIB, 1 * GIB, [replace(IDLE, **change)]) is None, what
    assert evictions(4 * GIB, 1 * GIB, [IDLE]) == ["idle"]


def test_the_longest_idle_for_what_a_reload_costs_goes_first() -> None:
    """An hour idle and quick to load goes before two hours idle and very slow to load, or very valuable."""
    quick = replace(IDLE, name="quick", idle_ms=3_600_000, load_ms=5_000)
    slow = replace(IDLE, name="slow", idle_ms=7_200_000, load_ms=60_000)
    dear = replace(IDLE, name="dear", idle_ms=7_200_000, load_ms=5_000, weight=10)
    unknown = replace(IDLE, name="unknown", idle_ms=1_000, load_ms=0)
    assert evictions(4 * GIB, GIB, [slow, dear, quick]) == ["quick"]
    assert evictions(7 * GIB, 0, [slow, dear, quick]) == ["quick", "dear"]
    assert evictions(4 * GIB, GIB, [quick, unknown]) == ["unknown"]


def test_whoever_turns_out_not_to_be_needed_stays() -> None:
    """A small model that was idle for longer does not go for nothing beside the big one that makes the room."""
    small = replace(IDLE, name="small", footprint=GIB, idle_ms=7_200_000)
    other = replace(IDLE, name="other", footprint=2 * GIB, idle_ms=6_000_000)
    big = replace(IDLE, name="big", footprint=20 * GIB)
    assert evictions(19 * GIB, GIB, [small, other, big]) == ["big"]
    assert evictions(21 * GIB, 0, [small, other, big]) == ["small", "other", "big"]
    assert evictions(20 * GIB, 0, [small, other, big]) == ["small", "big"]


def test_nobody_goes_when_even_all_would_not_do() -> None:
    """An eviction that does not help is only a loss."""
    assert evictions(20 * GIB, 1 * GIB, [IDLE, replace(IDLE, name="other")]) is None


def predicted(here: int = 0, mb: int | None = None, elsewhere: int = 0, file: int = 0) -> int:
    return predicted_bytes(learned_here=here, memory_mb=mb, learned_elsewhere=elsewhere, file_bytes=file)


def test_a_footprint_is_learned_here_else_told_else_learned_elsewhere_else_guessed_from_the_file() -> None:
    assert predicted(7, 2, 9, 1000) == 7
    assert predicted(0, 2, 9, 1000) == 2 << 20
    assert predicted(0, None, 9, 1000) == 9
    assert predicted(0, None, 0, 1000) == 1200
    assert predicted() == 0


@pytest.mark.parametrize(
    ("headroom", "idle", "returning", "before", "unfit"),
    [
        (22, 0, 0, False, False),
        (20, 0, 0, False, True),
        (2, 20, 0, False, False),  # what is there now can go, today or when it is idle
        (2, 0, 20, False, False),  # it went and its memory is on its way back
        (2, 0, 20, True, True),  # what was unfit is not believed to fit before the memory is there
        (21.2, 0, 0, False, False),
        (21.2, 0, 0, True, True),  # and then needs a little more than it did
        (22.2, 0, 0, True, False),
    ],
)
def test_a_model_is_unfit_when_not_even_all_the_others_leave_it_room(
    headroom: float, idle: int, returning: int, before: bool, unfit: bool
) -> None:
    """A model of 20 GB."""
    found = cannot_fit(
        20 * GIB,
        headroom=int(headroom * GIB),
        idle_could_leave=idle * GIB,
        returning=returning * GIB,
        before=before,
    )
    assert found is unfit
