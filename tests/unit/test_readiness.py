"""What first tokens make of a resident model: warm, or degraded until one is good again."""

import pytest

from workers.readiness import EWMA, PROBE_LEAST_S, PROBE_PATIENCE, Readiness, probe_within_s

BUDGET_MS = 1_000
GOOD, SLOW = 100.0, 2_000.0


def after(*probes: float | str, state: str = "warm") -> tuple[Readiness, str]:
    """Measures one after another, judging after each; a word is a probe that failed."""
    readiness = Readiness()
    for probe in probes:
        if isinstance(probe, str):
            readiness.failed(probe)
        else:
            readiness.measured(probe, budget_ms=BUDGET_MS)
        state = readiness.verdict(state)
    return readiness, state


@pytest.mark.parametrize(
    ("probes", "state"),
    [
        ([GOOD], "warm"),
        ([float(BUDGET_MS)] * 3, "warm"),
        ([SLOW], "warm"),
        ([SLOW, GOOD, SLOW], "warm"),
        ([SLOW, SLOW], "degraded"),
        (["no answer", SLOW], "degraded"),
        (["no answer", "no answer"], "degraded"),
        ([SLOW, SLOW, SLOW, GOOD], "warm"),
        ([SLOW, SLOW, GOOD, SLOW], "warm"),
    ],
)
def test_two_slow_in_a_row_degrade_and_a_good_one_restores(probes: list[float | str], state: str) -> None:
    assert after(*probes)[1] == state


def test_the_reason_names_the_figure_and_the_budget_until_it_is_good_again() -> None:
    readiness, state = after(SLOW, SLOW)
    assert (state, readiness.words) == ("degraded", "first token after 2000 ms, budget 1000 ms")
    readiness.failed("it answered 500")
    assert readiness.words == "it answered 500"
    readiness.measured(GOOD, budget_ms=BUDGET_MS)
    assert (readiness.verdict(state), readiness.words) == ("warm", "")


def test_a_model_that_is_slow_right_after_its_load_gets_no_second_chance() -> None:
    readiness = Readiness()
    readiness.woke(SLOW, budget_ms=BUDGET_MS)
    assert (readiness.verdict("warm"), readiness.words) == ("degraded", "first token after 2000 ms, budget 1000 ms")
    readiness.woke(GOOD, budget_ms=BUDGET_MS)
    assert (readiness.verdict("warm"), readiness.words) == ("warm", "")


def test_a_wake_forgets_the_slow_ones_of_an_earlier_stay() -> None:
    readiness, _ = after(SLOW)
    readiness.woke(GOOD, budget_ms=BUDGET_MS)
    readiness.measured(SLOW, budget_ms=BUDGET_MS)
    assert readiness.verdict("warm") == "warm"


def test_a_stuck_runtime_is_degraded_at_once_and_stays_so_until_a_good_token() -> None:
    readiness = Readiness()
    readiness.stuck()
    assert readiness.verdict("warm") == "degraded"
    assert "closed long ago" in readiness.words
    assert readiness.verdict("degraded") == "degraded"
    readiness.measured(GOOD, budget_ms=BUDGET_MS)
    assert readiness.verdict("degraded") == "warm"


@pytest.mark.parametrize("state", ["cold", "unloading", "quarantined", "waking"])
def test_a_model_that_is_not_resident_is_not_judged(state: str) -> None:
    assert after(SLOW, SLOW, state=state)[1] == state


def test_the_usual_first_token_follows_slowly_and_failed_probes_teach_nothing() -> None:
    readiness, _ = after(100.0, "no answer", 200.0)
    assert readiness.first_token_ms == 200.0
    assert readiness.first_token_ewma_ms == pytest.approx(100.0 + EWMA * 100.0)


def test_a_probe_has_patience_in_proportion_to_the_budget() -> None:
    assert probe_within_s(100) == PROBE_LEAST_S
    assert probe_within_s(60_000) == 60 * PROBE_PATIENCE
