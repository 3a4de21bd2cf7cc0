"""How often a model that cannot load is tried."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.records import ModelFacts
from workers.quarantine import (
    FIRST_S,
    HOUR_MS,
    PER_HOUR,
    UNREACHABLE_MOST_S,
    Quarantine,
    failed_within_hour,
    pause_ms,
)

DAY_MS = 24 * HOUR_MS


def tries(until_ms: int, load_ms: int, *, succeeds_at: int = 0) -> list[int]:
    """Starts a load whenever it may be; each fails after so long. Gives when loads began."""
    began, failed_at, failures, now = [], "", 0, 1_000_000
    end = now + until_ms
    while now < end:
        began.append(now)
        now += load_ms
        recent = [*failed_within_hour(failed_at, now), now]
        failures += 1
        failed_at = json.dumps(recent[-PER_HOUR:])
        now += pause_ms(recent, now, failures=failures, first_s=5.0, most_s=900.0)
    return began


@pytest.mark.parametrize("load_ms", [1, 3_000, 60_000, 300_000])
def test_no_hour_of_a_day_sees_more_than_five_loads(load_ms: int) -> None:
    began = tries(DAY_MS, load_ms)
    for first in began:
        assert sum(first <= at < first + HOUR_MS for at in began) <= 5
    assert len(began) >= 24, "it is tried again, and for ever"


def test_the_pauses_grow_and_the_fifth_lasts_until_the_hour_is_over() -> None:
    began = tries(HOUR_MS + 60_000, 1)
    assert [round((b - a) / 1000) for a, b in itertools.pairwise(began)] == [5, 30, 180, 900, 2485]


@given(
    st.lists(st.integers(0, HOUR_MS - 1), max_size=8),
    st.integers(1, 50),
)
def test_five_failures_within_an_hour_leave_no_room_for_a_sixth(ages: list[int], failures: int) -> None:
    now = 10 * HOUR_MS
    recent = failed_within_hour(json.dumps([now - age for age in ages]), now)
    pause = pause_ms(recent, now, failures=failures, first_s=5.0, most_s=900.0)
    assert pause >= 5_000
    then = now + pause
    assert sum(then - HOUR_MS < at <= then for at in recent) < PER_HOUR


@pytest.mark.parametrize("told", ["", "[]", "nonsense", "{}", "[1, 2]", '["x", null, 3.5]'])
def test_what_is_old_or_unreadable_is_not_counted(told: str) -> None:
    assert failed_within_hour(told, 10 * HOUR_MS) == []


class Redis:
    """The facts of one model, with a clock that stands."""

    def __init__(self, **facts: Any) -> None:
        self.facts = ModelFacts(**facts)
        self.writes = 0
        self.now = 10 * HOUR_MS
        self.quarantine = Quarantine("big", now_ms=self._now_ms, facts=lambda: self.facts, learn=self._learn)

    async def _now_ms(self) -> int:
        return self.now

    async def _learn(self, name: str, **facts: Any) -> None:
        assert name == "big"
        self.facts = replace(self.facts, **facts)
        self.writes += 1


async def test_a_failure_begins_a_quarantine_that_time_ends() -> None:
    redis = Redis()
    assert not await redis.quarantine.goes_on()
    await redis.quarantine.begin("there is no GGUF file")
    assert (redis.facts.failures, redis.quarantine.words) == (1, "there is no GGUF file")
    assert failed_within_hour(redis.facts.failed_at, redis.now) == [redis.now]
    redis.now += int(FIRST_S * 1000) - 1
    assert await redis.quarantine.goes_on()
    redis.now += 1
    assert not await redis.quarantine.goes_on()


async def test_where_nobody_was_there_no_load_counts_and_the_pause_stays_short() -> None:
    redis = Redis(failures=8)
    await redis.quarantine.begin("no Ollama answers", tried=False)
    assert redis.facts.quarantined_until == redis.now + UNREACHABLE_MOST_S * 1000
    assert failed_within_hour(redis.facts.failed_at, redis.now) == []


async def test_a_pause_for_want_of_room_is_no_failure() -> None:
    redis = Redis()
    await redis.quarantine.pause("9 MB are missing", for_s=2.5)
    assert (redis.facts.failures, redis.facts.failed_at) == (0, "")
    assert redis.facts.quarantined_until == redis.now + 2_500


async def test_forgetting_writes_only_where_something_failed() -> None:
    redis = Redis()
    await redis.quarantine.forget()
    assert redis.writes == 0
    await redis.quarantine.begin("there is no GGUF file")
    await redis.quarantine.forget()
    assert redis.facts == ModelFacts()
