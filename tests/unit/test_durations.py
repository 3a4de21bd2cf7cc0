"""Lengths of time and instants as people write them."""

import pytest

from api.durations import instant_ms, length_ms

NOW_MS = 1_795_000_000_000


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("900ms", 900),
        ("30s", 30_000),
        ("10m", 600_000),
        (" 12H ", 43_200_000),
        ("7d", 604_800_000),
        ("2w", 1_209_600_000),
    ],
)
def test_lengths(text: str, ms: int) -> None:
    assert length_ms(text) == ms
    assert instant_ms(text, now_ms=NOW_MS) == NOW_MS + ms


@pytest.mark.parametrize("text", ["", "0s", "-1m", "soon", "10", "1.5h", "10 m", "1h30m", "9999999999s", "1\u0661s"])
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(ValueError, match="is no length of time: write it like 90d, 12h or 30m"):
        length_ms(text)


@pytest.mark.parametrize(
    ("told", "ms"),
    [
        (1_795_000_060, 1_795_000_060_000),
        (1_795_000_060.5, 1_795_000_060_500),
        ("1795000060", 1_795_000_060_000),
        ("1795000060.5", 1_795_000_060_500),
        ("2026-11-30T06:00:00Z", 1_796_018_400_000),
        ("2026-11-30T07:00:00+01:00", 1_796_018_400_000),
        ("2026-11-30T06:00:00.25Z", 1_796_018_400_250),
    ],
)
def test_instants(told: object, ms: int) -> None:
    assert instant_ms(told, now_ms=NOW_MS) == ms


@pytest.mark.parametrize(
    "told",
    [None, True, [], "2026-11-30", "2026-11-30T06:00:00", "2026-13-30T06:00:00Z", "now", "10", "-1795000060",
     "1795000060000", "1e9", "17950000\u06660"],
)  # fmt: skip
def test_what_is_no_instant(told: object) -> None:
    with pytest.raises(ValueError):
        instant_ms(told, now_ms=NOW_MS)
