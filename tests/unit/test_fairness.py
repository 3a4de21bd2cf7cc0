"""Who was served how much: the books behind the order in which callers are taken."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.fairness import KEPT, Served
from broker.records import Waiting
from workers.picture import LanePicture
from workers.shares import Shares


def settled(served: Served, caller: str, cost: int) -> None:
    """One job from its begin to its end."""
    estimate = served.estimate(caller, prompt=cost)
    served.charge(caller, estimate)
    served.settle(caller, estimate, prompt=cost, written=0)


def test_a_charge_is_an_estimate_until_the_runtime_tells() -> None:
    served = Served()
    served.charge("a", 100)
    assert served.level("a") == 100
    served.settle("a", 100, prompt=30, written=20)
    assert served.level("a") == 50
    assert served.estimate("a", prompt=10) == 30, "its own answers so far"
    assert served.estimate("b", prompt=10) == 30, "everybody's, of one that has had none"
    served.charge("a", 30)
    served.give_back("a", 30)
    assert served.level("a") == 50


def test_a_prompt_that_is_all_in_the_cache_costs_no_less_than_nothing() -> None:
    served = Served()
    assert served.estimate("a", prompt=-5) == 0
    served.settle("a", 0, prompt=-5, written=7)
    assert served.level("a") == 7


def test_with_one_caller_there_is_nothing_to_choose_between() -> None:
    served = Served()
    assert served.look(["a"]) is None and served.look([]) is None
    served.charge("a", 100)
    levels = served.look(["a", "b"])
    assert levels is not None and levels.of == {"a": 100, "b": 0}


def test_who_comes_first_begins_where_the_least_served_stands() -> None:
    """Not at nothing: the others did not take from it what they had while it was away."""
    served = Served()
    for _ in range(10):
        served.look(["a", "b"])
        settled(served, "a", 100)
        settled(served, "b", 100)
    served.look(["a", "b"])
    assert served.level("late") == 1_000


def test_who_comes_back_has_saved_up_one_large_job_at_most() -> None:
    served = Served()
    settled(served, "away", 10)
    for number in range(100):
        served.look(["a", "b"])
        settled(served, "ab"[number % 2], 100)
    served.look(["a", "b"])
    assert 4_900 <= served.level("away") <= served.floor
    assert served.floor == 5_000


def test_debt_stays() -> None:
    """A caller that was ahead when it went is ahead when it comes back."""
    served = Served()
    served.charge("greedy", 10_000)
    served.look(["a", "b"])
    settled(served, "a", 100)
    served.look(["a", "b"])
    assert served.level("greedy") == 10_000


def test_who_is_ahead_by_more_than_a_mean_charge() -> None:
    served = Served()
    settled(served, "a", 100)
    settled(served, "a", 1)
    levels = served.look(["a", "b"])
    assert levels is not None
    assert served.mean_charge == pytest.approx(100 - 0.2 * 99)
    assert levels.ahead_above == pytest.approx(served.mean_charge)


def test_callers_without_debt_are_forgotten() -> None:
    served = Served()
    for number in range(KEPT - 2):
        settled(served, f"c{number}", 10)
    settled(served, "a", 500)
    settled(served, "in debt", 600)
    served.look(["a", "in debt"])
    settled(served, "new", 1)
    assert set(served._given) == {"in debt", "new"}
    assert set(served._written) <= {"in debt", "new"}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 1_000)), max_size=60), st.randoms())
def test_the_floor_never_falls_and_nobody_stands_far_below(jobs: list[tuple[str, int]], rng: random.Random) -> None:
    served, largest = Served(), 0
    for caller, cost in jobs:
        before = served.floor
        served.look(rng.sample("abc", rng.randint(1, 3)))
        assert served.floor >= before
        settled(served, caller, cost)
        largest = max(largest, cost)
        assert all(served.level(c) >= served.floor - largest for c in "abcd")


def test_least_served_first_shares_alike_whatever_the_sizes() -> None:
    """The bound of the method: two who always want something differ by no more than their largest jobs."""
    served, rng, had = Served(), random.Random(4), {"small": 0, "large": 0}
    for _ in range(2_000):
        levels = served.look(["small", "large"])
        assert levels is not None
        caller = min(levels.of, key=lambda c: levels.of[c])
        cost = rng.randint(1, 30) if caller == "small" else rng.randint(500, 1_000)
        settled(served, caller, cost)
        had[caller] += cost
        assert abs(had["small"] - had["large"]) <= 2_000


def waiting(caller: str, *, tokens: int = 100, priority: str = "interactive", number: int = 1) -> Waiting:
    return Waiting(f"{caller}{number}", "big", f"{number}-0", caller=caller, tokens=tokens, priority=priority)


def books(*jobs: Waiting) -> Shares:
    picture = LanePicture()
    picture.follow(["big"])
    for number, job in enumerate(jobs):
        picture.add(Waiting(job.job, "big", f"{number}-1", caller=job.caller, priority=job.priority))
    return Shares(picture)


def test_the_books_are_kept_by_priority_and_model() -> None:
    shares = books(waiting("a"), waiting("b"), waiting("c"), waiting("a", priority="batch"))
    shares.charge("m", waiting("a"), cached=60)
    shares.charge("m", waiting("a", priority="batch"), cached=0)
    shares.charge("other", waiting("b"), cached=0)

    levels = shares.levels("m", ["big"], but={"c"})

    assert {priority: dict(found.of) for priority, found in levels.items()} == {"interactive": {"a": 40, "b": 0}}


def test_a_slot_waits_for_the_session_of_nobody_who_is_ahead() -> None:
    shares = books(waiting("b"))
    job = waiting("a")
    assert shares.may_wait("m", job, ["big"])
    for _ in range(2):
        shares.charge("m", job, cached=0).settle({"prompt_tokens": 90, "completion_tokens": 10})
    assert not shares.may_wait("m", job, ["big"])
    assert shares.may_wait("m", waiting("b"), ["big"])
    assert shares.may_wait("m", job, ["empty"]), "nobody else wants it"


def test_what_was_charged_is_put_right_by_the_runtime_or_given_back() -> None:
    shares = books(waiting("a"), waiting("b"))

    def level() -> float:
        return shares.levels("m", ["big"])["interactive"].of["a"]

    shares.charge("m", waiting("a"), cached=0).settle(
        {"prompt_tokens": 90, "cached_tokens": 50, "completion_tokens": 5}
    )
    assert level() == 45
    shares.charge("m", waiting("a"), cached=0).settle(None)
    assert level() == 45 + 100 + 5, "nobody told: the estimate stands"
    shares.charge("m", waiting("a"), cached=0).give_back()
    assert level() == 150
