"""What a model's reading and writing rates are learned from, and what is not believed."""

from dataclasses import replace
from typing import Any

import pytest

from broker.records import ModelFacts
from workers.rates import Answer, Rates, decode_tps, learned, prefill_ms, prefill_tps

ANSWER = Answer(usage={}, timings={}, first_token_ms=1_000, total_ms=3_000, usual_ms=200)


def usage(prompt: int, cached: int | None, made: int = 0) -> dict[str, int]:
    told = {"prompt_tokens": prompt, "completion_tokens": made}
    return told if cached is None else told | {"cached_tokens": cached}


@pytest.mark.parametrize(
    ("changed", "tps"),
    [
        # the runtime's own clock
        ({"timings": {"prompt_n": 950, "prompt_ms": 1_000.0}}, 950),
        ({"timings": {"prompt_n": 63, "prompt_ms": 1.0}}, None),  # a tiny prompt
        ({"timings": {"prompt_n": 63, "prompt_ms": 1.0}, "usage": usage(5_000, 0)}, None),  # it tells: believe it
        ({"timings": {"prompt_n": True, "prompt_ms": "fast"}, "usage": usage(800, 0)}, 1_000),  # no figures
        ({"timings": {"prompt_n": 950, "prompt_ms": 0}, "usage": usage(800, 0)}, 1_000),
        # ours: 800 ms beyond the usual first token
        ({"usage": usage(800, 0)}, 1_000),
        ({"usage": usage(10_800, 10_000)}, 1_000),  # only what was not cached was read
        ({"usage": usage(255, 0)}, None),
        ({"usage": usage(10_255, 10_000)}, None),
        ({"usage": usage(800, 0), "usual_ms": 0}, None),  # nothing to subtract is known
        ({"usage": usage(800, 0), "usual_ms": 700}, None),  # it drowns in what is usual
        ({"usage": usage(800, 0), "first_token_ms": 100}, None),
        ({"usage": usage(800, None)}, None),  # how much was cached, nobody says
        ({"usage": usage(800, None), "new_session": True}, 1_000),
        ({}, None),
    ],
)
def test_how_fast_a_prompt_was_read(changed: dict[str, Any], tps: float | None) -> None:
    assert prefill_tps(replace(ANSWER, **changed)) == (None if tps is None else pytest.approx(tps))


@pytest.mark.parametrize(
    ("changed", "tps"),
    [
        ({"timings": {"predicted_n": 100, "predicted_ms": 4_000}}, 25),
        ({"timings": {"predicted_n": 15, "predicted_ms": 1}}, None),
        ({"usage": usage(0, 0, 81)}, 40),  # 80 tokens after the first, in two seconds
        ({"usage": usage(0, 0, 16)}, None),
        ({"usage": usage(0, 0, 81), "total_ms": 1_000}, None),  # it came in one piece
    ],
)
def test_how_fast_an_answer_was_written(changed: dict[str, Any], tps: float | None) -> None:
    assert decode_tps(replace(ANSWER, **changed)) == tps


@pytest.mark.parametrize(
    ("known", "measured", "then"),
    [
        (0, 950, 950),
        (1_000, None, 1_000),
        (1_000, 2_000, 1_200),
        (1_000, 900_000, 1_600),  # counts as four times as fast
        (1_000, 2, 850),  # a stall counts as four times as slow
        (1_000, 0.5, 1_000),
        (1_000, 2_000_000, 1_000),
        (0, 0.0, 0),
    ],
)
def test_one_odd_answer_does_not_turn_a_rate_over(known: float, measured: float | None, then: float) -> None:
    assert learned(known, measured) == pytest.approx(then)


def test_what_was_learned_goes_on_from_what_was_known() -> None:
    before = ModelFacts(service_ms=1_000, prefill_tps=500, rates_of="this")
    rates = Rates.known(before, "this")
    rates.note(
        replace(ANSWER, timings={"prompt_n": 1_000, "prompt_ms": 1_000, "predicted_n": 50, "predicted_ms": 1_000})
    )
    assert rates.told(before) == {"rates_of": "this", "service_ms": 1_400, "prefill_tps": 600, "decode_tps": 50}
    assert Rates("this", service_ms=3).told(before) == {"rates_of": "this", "service_ms": 3}, (
        "what is not known overwrites nothing"
    )


def test_what_was_learned_of_another_definition_is_dropped_and_overwritten() -> None:
    before = ModelFacts(service_ms=1_000, prefill_tps=500, decode_tps=50, rates_of="other")
    rates = Rates.known(before, "this")
    rates.note(replace(ANSWER, timings={"predicted_n": 50, "predicted_ms": 500}))
    assert rates.told(before) == {
        "rates_of": "this", "service_ms": ANSWER.total_ms, "prefill_tps": rates.prefill_tps, "decode_tps": 100
    }  # fmt: skip
    assert Rates.known(before, "this").told(before) == {
        "rates_of": "this", "service_ms": 0, "prefill_tps": 0, "decode_tps": 0
    }  # fmt: skip


def test_reading_takes_no_time_at_a_rate_that_nobody_knows() -> None:
    assert (prefill_ms(950, 950), prefill_ms(950, 0)) == (1_000, 0)
