"""Who must go so that a model fits: a pure choice."""

from dataclasses import replace
from pathlib import Path

import pytest

from workers.memory import Resident, evictions, host_memory, predicted_bytes

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


def test_nobody_goes_when_even_all_would_not_do() -> None:
    """An eviction that does not help is only a loss."""
    assert evictions(20 * GIB, 1 * GIB, [IDLE, replace(IDLE, name="other")]) is None


def test_a_limit_counts_our_models_and_nothing_else() -> None:
    memory = host_memory(1000, [300 << 20, 200 << 20])
    assert (memory.total >> 20, memory.used >> 20, memory.headroom >> 20) == (1000, 500, 500)
    assert host_memory(100, [200 << 20]).headroom == 0


def test_without_a_limit_the_machine_is_asked() -> None:
    memory = host_memory(None, [])
    assert 0 < memory.used < memory.total
    assert memory.headroom == memory.total - memory.used


def test_a_footprint_is_learned_else_told_else_guessed_from_the_file(tmp_path: Path) -> None:
    weights = tmp_path / "model.gguf"
    weights.write_bytes(bytes(1000))
    assert predicted_bytes(learned=7, memory_mb=2, weights=str(weights)) == 7
    assert predicted_bytes(learned=0, memory_mb=2, weights=str(weights)) == 2 << 20
    assert predicted_bytes(learned=0, memory_mb=None, weights=str(weights)) == 1200
    assert predicted_bytes(learned=0, memory_mb=None, weights=str(tmp_path / "none.gguf")) == 0
    assert predicted_bytes(learned=0, memory_mb=None, weights="qwen2.5-coder:32b") == 0
