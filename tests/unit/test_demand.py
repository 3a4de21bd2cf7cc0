"""Whether anybody asks for a model, and what an operator's unload and pin make of that."""

import asyncio

import pytest

from broker.policy import Model
from broker.records import ModelFacts
from workers.demand import Demand
from workers.warmth import Warmth

NOW_MS = 1_000_000
KEPT = Warmth(Model(backend="simulated", model="x", keepWarm=True))
PLAIN = Warmth(Model(backend="simulated", model="x", idleUnloadMs=1_000))


def demand(*, waited_for: bool = False, **facts: int | bool) -> Demand:
    async def now_ms() -> int:
        return NOW_MS

    return Demand(now_ms=now_ms, facts=lambda: ModelFacts(**facts), waited_for=lambda: waited_for)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("of", "kept", "plain"),
    [
        (demand(), True, False),
        (demand(waited_for=True), True, True),
        (demand(wanted_until=NOW_MS + 1), True, True),
        (demand(wanted_until=NOW_MS), True, False),
        (demand(unloaded_until=NOW_MS + 1), False, False),
        (demand(unloaded_until=NOW_MS + 1, waited_for=True), True, True),
        (demand(unloaded_until=NOW_MS + 1, wanted_until=NOW_MS + 1), True, True),
        (demand(unloaded_until=NOW_MS), True, False),
    ],
)
def test_what_an_operator_took_out_comes_back_for_a_request_only(of: Demand, kept: bool, plain: bool) -> None:
    assert (asyncio.run(of.wants(KEPT)), asyncio.run(of.wants(PLAIN))) == (kept, plain)


@pytest.mark.parametrize(
    ("of", "asked"),
    [(demand(), False), (demand(waited_for=True), True), (demand(wanted_until=NOW_MS + 1), True)],
)
def test_keeping_warm_asks_for_nothing(of: Demand, asked: bool) -> None:
    assert asyncio.run(of.asked_for()) is asked


def test_an_idle_model_leaves_unless_it_is_pinned_or_wanted() -> None:
    assert asyncio.run(demand().lets_go(PLAIN, idle_ms=1_001))
    assert not asyncio.run(demand().lets_go(PLAIN, idle_ms=1_000))
    assert not asyncio.run(demand().lets_go(KEPT, idle_ms=10**9))
    assert not asyncio.run(demand(pinned=True).lets_go(PLAIN, idle_ms=1_001))
    assert not asyncio.run(demand(waited_for=True).lets_go(PLAIN, idle_ms=1_001))
