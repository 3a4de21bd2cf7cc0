"""Who is next, how long it will take, and whether moving helps: tables of facts and decisions."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.dispatch import (
    INTERACTIVE_MEMORY_MS,
    STOP_MS,
    UNKNOWN_SERVICE_MS,
    ModelView,
    back_in_s,
    choose,
    first_token_in_ms,
    foretold_ms,
    in_need,
    promotion_helps,
    ready_in_ms,
    retry_after_s,
    waiting_is_pointless,
)
from broker.fairness import Levels
from broker.records import Waiting

NOW = 1_000_000
WARM = ModelView("warm", slots_total=2, slots_free=2, service_ms=1_000, load_ms=8_000, first_token_ms=300)
KEPT = replace(WARM, slots_total=3, slots_free=3, slots_kept=1)


def job(
    name: str, *, age_ms: int = 0, slack_ms: int | None = None, batch: bool = False, session: str = "", caller: str = ""
) -> Waiting:
    return Waiting(
        job=name, lane="big", entry="1-1", submitted=NOW - age_ms, priority="batch" if batch else "interactive",
        caller=caller, session=session,
        promote_at=0 if slack_ms is None else NOW + slack_ms,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("why", "waiting", "chosen"),
    [
        ("the oldest", [job("new", age_ms=1), job("old", age_ms=9), job("mid", age_ms=5)], "old"),
        ("interactive before older batch", [job("b", age_ms=99, batch=True), job("i")], "i"),
        ("batch when there is nothing else", [job("b2", age_ms=1, batch=True), job("b1", age_ms=2, batch=True)], "b1"),
        ("slack under one service time beats age", [job("old", age_ms=99), job("near", slack_ms=999)], "near"),
        ("slack of one service time does not", [job("old", age_ms=99), job("far", slack_ms=1_000)], "old"),
        ("the earliest deadline of the near ones", [job("n1", age_ms=9, slack_ms=900), job("n2", slack_ms=100)], "n2"),
        ("an overdue one first of all", [job("near", slack_ms=10), job("late", slack_ms=-500)], "late"),
        ("no deadline is never near", [job("old", age_ms=1), job("new", slack_ms=50_000)], "old"),
        ("a near batch job waits for interactive work", [job("b", slack_ms=1, batch=True), job("i")], "i"),
        ("the id decides between equals", [job("b"), job("a"), job("c")], "a"),
    ],
)
def test_who_is_next(why: str, waiting: list[Waiting], chosen: str) -> None:
    for order in (waiting, waiting[::-1]):
        found = choose(order, free=1, total=1, now_ms=NOW, service_ms=1_000)
        assert found is not None and found.job == chosen, why


@pytest.mark.parametrize(
    ("why", "waiting", "open_slots", "chosen"),
    [
        ("a cached session before an older one", [job("old", age_ms=99), job("hot", session="s")], 2, "hot"),
        ("the older of two cached", [job("h1", age_ms=1, session="s"), job("h2", age_ms=2, session="t")], 2, "h2"),
        ("a near deadline before a cached session", [job("near", slack_ms=9), job("hot", session="s")], 2, "near"),
        ("a cached batch job after people", [job("hot", batch=True, session="s"), job("i")], 2, "i"),
        ("a kept slot is its session's", [job("old", age_ms=99), job("hot", session="s")], 0, "hot"),
        ("nobody else gets a kept slot", [job("old", age_ms=99), job("cold", session="x")], 0, None),
        ("but who is in need does", [job("old", age_ms=99), job("near", slack_ms=9)], 0, "near"),
        ("another host's session waits a moment for it", [job("there", age_ms=249, session="e")], 2, None),
        ("others go before it", [job("there", age_ms=249, session="e"), job("here")], 2, "here"),
        ("and then it is served here", [job("there", age_ms=250, session="e")], 2, "there"),
    ],
)
def test_a_session_is_led_back_to_its_cached_prompt(
    why: str, waiting: list[Waiting], open_slots: int, chosen: str | None
) -> None:
    for order in (waiting, waiting[::-1]):
        found = choose(
            order, free=2, total=2, now_ms=NOW, service_ms=1_000, cached={"s", "t"}, open_slots=open_slots,
            elsewhere={"e"},
        )  # fmt: skip
        assert (found and found.job) == chosen, why


SERVED = {
    "interactive": Levels({"less": 100.0, "more": 150.0, "most": 301.0}, 300.0),
    "batch": Levels({"less": 900.0, "most": 0.0}, 100.0),
}


@pytest.mark.parametrize(
    ("why", "waiting", "chosen"),
    [
        ("the least served before an older one", [job("m", age_ms=99, caller="more"), job("l", caller="less")], "l"),
        ("age among the jobs of one", [job("l1", caller="less"), job("l2", age_ms=1, caller="less")], "l2"),
        ("a near deadline first", [job("l", caller="less"), job("m", slack_ms=9, caller="more")], "m"),
        ("a cached prompt first", [job("l", caller="less"), job("m", session="s", caller="more")], "m"),
        ("no near deadline of one that is ahead", [job("m", slack_ms=9, caller="most"), job("l", caller="less")], "l"),
        ("no cached prompt of one that is ahead", [job("m", session="s", caller="most"), job("l", caller="less")], "l"),
        ("alone it may be ahead", [job("m", slack_ms=9, caller="most")], "m"),
        (
            "each priority has its own",
            [job("m", age_ms=9, batch=True, caller="most"), job("l", age_ms=99, batch=True, caller="less")],
            "m",
        ),
        (
            "people before whoever is behind in batch work",
            [job("b", batch=True, caller="most"), job("i", caller="most")],
            "i",
        ),
    ],
)
def test_the_least_served_caller_goes_first_among_equals(why: str, waiting: list[Waiting], chosen: str) -> None:
    for order in (waiting, waiting[::-1]):
        found = choose(order, free=2, total=2, now_ms=NOW, service_ms=1_000, cached={"s"}, levels=SERVED)
        assert found is not None and found.job == chosen, why


def test_a_kept_slot_is_not_for_the_session_of_one_that_is_ahead() -> None:
    facts = {"free": 1, "total": 1, "now_ms": NOW, "service_ms": 1_000, "cached": {"s"}, "open_slots": 0}
    greedy, modest = job("m", session="s", caller="most"), job("l", session="s", caller="less")
    assert choose([greedy], levels=SERVED, **facts) is None  # type: ignore[arg-type]
    assert choose([greedy, modest], levels=SERVED, **facts) == modest  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("free", "total", "interactive_at", "active", "batch_runs"),
    [
        (1, 1, NOW, False, True),  # a single slot is never kept
        (1, 1, 0, True, True),
        (1, 2, NOW - 1, False, False),  # the last of two is kept after interactive work
        (2, 2, NOW - 1, False, True),
        (1, 2, NOW - INTERACTIVE_MEMORY_MS, False, True),  # long ago
        (1, 2, 0, False, True),  # never
        (1, 2, 0, True, False),  # never, but its active hours go on: people are expected
        (2, 2, 0, True, True),
        (0, 2, 0, False, False),
    ],
)
def test_the_slot_that_is_kept_for_people(
    free: int, total: int, interactive_at: int, active: bool, batch_runs: bool
) -> None:
    facts = {"free": free, "total": total, "now_ms": NOW, "service_ms": 1_000, "interactive_at": interactive_at}
    facts["active"] = active
    assert (choose([job("b", batch=True)], **facts) is not None) is batch_runs
    assert (choose([job("i"), job("b", batch=True)], **facts) is not None) is (free > 0)


TOKENS = st.integers(0, 3).map(float)
JOBS = st.builds(
    job, st.text("abcdef", min_size=1, max_size=3), age_ms=st.integers(0, 50),
    slack_ms=st.none() | st.integers(-9, 2_000), batch=st.booleans(), session=st.sampled_from(["", "s", "t"]),
    caller=st.sampled_from("abc"),
)  # fmt: skip


@given(st.lists(JOBS, unique_by=lambda j: j.job), st.randoms(use_true_random=False))
def test_the_choice_depends_on_the_facts_only(waiting: list[Waiting], rng: object) -> None:
    """Not on the order in which the entries come; an interactive job never waits for a batch job."""
    shuffled = list(waiting)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    facts = {"free": 1, "total": 1, "now_ms": NOW, "service_ms": 1_000.0}
    found = choose(waiting, **facts)  # type: ignore[arg-type]
    assert found == choose(shuffled, **facts)  # type: ignore[arg-type]
    assert (found is None) == (not waiting)
    if found is not None and found.priority == "batch":
        assert all(j.priority == "batch" for j in waiting)


@given(
    st.lists(JOBS, unique_by=lambda j: j.job), st.sampled_from([None, 0, 1]), st.frozensets(st.sampled_from("st")),
    st.frozensets(st.sampled_from("st")),
    st.dictionaries(
        st.sampled_from(["interactive", "batch"]),
        st.builds(Levels, st.fixed_dictionaries(dict.fromkeys("abc", TOKENS)), TOKENS),
    ),
)  # fmt: skip
def test_the_choice_is_the_first_of_all_in_order(
    waiting: list[Waiting],
    open_slots: int | None,
    cached: frozenset[str],
    elsewhere: frozenset[str],
    levels: dict[str, Levels],
) -> None:
    """Whatever is passed over quickly would not have been first."""

    def level(job: Waiting) -> float:
        return levels[job.priority].of[job.caller] if job.priority in levels else 0.0

    def ahead(job: Waiting) -> bool:
        return job.priority in levels and level(job) > levels[job.priority].ahead_above

    def urgent(job: Waiting) -> bool:
        return job.promote_at > 0 and job.promote_at - NOW < 1_000 and not ahead(job)

    def known(job: Waiting) -> bool:
        return job.session in cached and not ahead(job)

    def may_go(job: Waiting) -> bool:
        return known(job) or urgent(job) or (open_slots != 0 and job.session not in elsewhere)

    def order(job: Waiting) -> tuple[object, ...]:
        when = job.promote_at if urgent(job) else 0
        return (job.priority == "batch", not urgent(job), when, not known(job), level(job), job.submitted, job.job)

    found = choose(
        waiting,
        free=1,
        total=1,
        now_ms=NOW,
        service_ms=1_000,
        open_slots=open_slots,
        cached=cached,
        elsewhere=elsewhere,
        levels=levels,
    )
    assert found == min(filter(may_go, waiting), key=order, default=None)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (WARM, 0),
        (replace(WARM, availability="degraded"), 0),
        (replace(WARM, availability="cold"), 8_000),
        (replace(WARM, availability="unavailable"), math.inf),
        (replace(WARM, availability="cold", load_ms=0), None),
        (replace(WARM, availability="waking", load_ms=0, waking_since=NOW - 5), None),
        (replace(WARM, availability="waking", waking_since=NOW - 5_000), 3_000),
        (replace(WARM, availability="waking", waking_since=0), 8_000),
        (replace(WARM, availability="cold", room_at=NOW + 30_000), 38_000),  # others make room first
        (replace(WARM, availability="cold", room_at=NOW - 1), 8_000),
        (replace(WARM, availability="cold", load_ms=0, room_at=NOW + 30_000), 30_000),  # not sooner than that
        (replace(WARM, availability="waking", waking_since=0, room_at=NOW + 30_000), 8_000),  # it has room
        (replace(WARM, availability="waking", waking_since=NOW - 60_000), 2_000),  # late: a quarter more
    ],
)
def test_when_a_model_can_take_a_job(view: ModelView, expected: float | None) -> None:
    assert ready_in_ms(view, NOW) == expected


@pytest.mark.parametrize(
    ("view", "ahead", "expected"),
    [
        (WARM, 0, 300),
        (WARM, 1, 300),
        (WARM, 2, 800),  # both slots go to those before it; one of two becomes free every half service time
        (WARM, 3, 1_300),
        (WARM, 4, 1_800),
        (replace(WARM, slots_free=0), 0, 800),
        (replace(WARM, slots_free=0, slots_total=1), 0, 1_300),
        (replace(WARM, service_ms=0, slots_free=0), 0, UNKNOWN_SERVICE_MS / 2 + 300),
        (replace(WARM, availability="cold", slots_free=0), 1, 8_300),
        (replace(WARM, availability="cold", slots_free=0), 2, 9_300),  # a load's slots all start, and end, together
        (replace(WARM, availability="cold", slots_free=0), 3, 9_300),
        (replace(WARM, availability="cold", slots_free=0), 4, 10_300),
        (replace(WARM, availability="cold", slots_total=0, slots_free=0), 0, 8_300),
        (replace(WARM, availability="unavailable"), 0, math.inf),
        (replace(WARM, availability="cold", load_ms=0), 0, None),
    ],
)
def test_when_a_first_token_comes(view: ModelView, ahead: int, expected: float | None) -> None:
    assert first_token_in_ms(view, ahead=ahead, now_ms=NOW) == expected


@pytest.mark.parametrize(
    ("view", "ahead", "fresh_tokens", "expected"),
    [
        (WARM, 0, 99_000, 300),  # how fast it reads was never learned
        (replace(WARM, prefill_tps=950), 0, 0, 300),
        (replace(WARM, prefill_tps=950), 0, 735, 300 + 735 / 0.95),  # the rest of 99k tokens is in a cache
        (replace(WARM, prefill_tps=950), 0, 99_000, 300 + 99_000 / 0.95),
        (replace(WARM, prefill_tps=950), 2, 950, 1_800),
        (replace(WARM, prefill_tps=950, availability="cold", slots_free=0), 0, 950, 9_300),
        (replace(WARM, prefill_tps=950, availability="unavailable"), 0, 950, math.inf),
        (replace(WARM, prefill_tps=950, availability="cold", load_ms=0), 0, 950, None),
    ],
)
def test_a_first_token_waits_for_the_prompt_to_be_read(
    view: ModelView, ahead: int, fresh_tokens: int, expected: float | None
) -> None:
    found = first_token_in_ms(view, ahead=ahead, now_ms=NOW, fresh_tokens=fresh_tokens)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("view", "ahead", "fresh_tokens", "expected"),
    [
        (WARM, 0, 512, 300),
        (WARM, 1, 0, 300),
        (WARM, 4, 0, 1_800),
        (replace(WARM, service_ms=0), 1, 0, 300),  # a slot is free for it
        (replace(WARM, service_ms=0), 2, 0, None),  # how long those before it take is not known
        (replace(WARM, service_ms=0, slots_free=0), 0, 0, None),
        (WARM, 0, 513, None),  # how fast it reads is not known
        (replace(WARM, prefill_tps=950), 0, 9_500, 10_300),
        (replace(WARM, availability="cold"), 1, 0, 8_300),
        (replace(WARM, availability="cold", service_ms=0), 1, 0, 8_300),
        (replace(WARM, availability="cold", service_ms=0), 2, 0, None),
        (replace(WARM, availability="cold", load_ms=0), 0, 0, None),
        (replace(WARM, availability="cold", room_at=NOW + 30_000), 0, 0, None),  # not sooner, but when?
        (replace(WARM, availability="waking", waking_since=NOW - 5_000), 0, 0, 3_300),
        (replace(WARM, availability="waking", waking_since=NOW - 9_000), 0, 0, None),  # longer than it ever took
        (replace(WARM, availability="waking", waking_since=0), 0, 0, None),  # it waits for something before it loads
        (replace(WARM, availability="unavailable"), 0, 0, None),
        (replace(WARM, service_ms=1e9), 3, 0, None),
    ],
)
def test_who_waits_is_told_a_measured_time_or_none(
    view: ModelView, ahead: int, fresh_tokens: int, expected: int | None
) -> None:
    assert foretold_ms(view, ahead=ahead, now_ms=NOW, fresh_tokens=fresh_tokens) == expected


@pytest.mark.parametrize(
    ("view", "people", "batch", "expected"),
    [
        (KEPT, 0, 0, 300),
        (KEPT, 0, 1, 300),
        (KEPT, 1, 0, 300),
        (KEPT, 0, 2, 800),  # two of three slots are batch work's: one of them becomes free every half service time
        (KEPT, 2, 0, 633),  # a person's turn ends first
        (replace(KEPT, slots_free=1), 0, 0, 800),
        (replace(KEPT, slots_free=0), 0, 0, 1_300),
        (replace(KEPT, slots_free=0), 6, 0, 3_300),  # people take all three slots, and two must be free after them
        (replace(KEPT, slots_free=0), 6, 4, 5_300),
        (replace(KEPT, slots_kept=0, slots_free=0), 6, 4, 300 + 11_000 / 3),
        (replace(KEPT, slots_free=1, service_ms=0), 0, 0, None),  # the free slot is not its own
        (replace(KEPT, service_ms=0), 0, 1, 300),
        (replace(KEPT, availability="cold", slots_total=0, slots_free=0, slots_kept=0), 2, 1, 11_300),
    ],
)
def test_batch_work_waits_for_people_and_for_a_slot_that_is_not_kept_for_them(
    view: ModelView, people: int, batch: int, expected: float | None
) -> None:
    told = foretold_ms(view, ahead=people, batch_ahead=batch, now_ms=NOW)
    assert told == (None if expected is None else round(expected))


@pytest.mark.parametrize(
    ("here", "there", "overdue", "helps"),
    [
        (5_000, 300, False, True),
        (300, 5_000, True, False),
        (300, 300, True, False),
        (None, 300, False, False),  # nothing is known and there is time: wait
        (None, 300, True, True),  # past the deadline, unknown counts as never
        (None, None, True, True),
        (math.inf, None, False, True),
        (3_999, None, True, False),  # a fallback that was never loaded counts as its own budget
        (4_001, None, True, True),
        (math.inf, math.inf, True, False),
        (None, math.inf, True, False),
    ],
)
def test_whether_moving_helps(here: float | None, there: float | None, overdue: bool, helps: bool) -> None:
    assert promotion_helps(here, there, there_budget_ms=4_000, overdue=overdue) is helps


@pytest.mark.parametrize(
    ("availability", "here", "priority", "pointless"),
    [
        ("unavailable", math.inf, "batch", True),
        ("degraded", 0, "interactive", True),
        ("degraded", 0, "batch", False),
        ("warm", 90_000, "interactive", False),  # warm and busy: its turn will come
        ("cold", 5_001, "interactive", True),
        ("waking", 5_000, "interactive", False),
        ("waking", None, "interactive", False),
    ],
)
def test_whether_waiting_is_pointless(availability: str, here: float | None, priority: str, pointless: bool) -> None:
    view = ModelView(availability)  # type: ignore[arg-type]
    assert waiting_is_pointless(here, view, left_ms=5_000, priority=priority) is pointless


@pytest.mark.parametrize(
    ("why", "view", "here", "left_ms", "ahead", "pointless"),
    [
        ("its turn comes too late", replace(WARM, slots_free=0), 5_001, 5_000, 0, True),
        ("in time", replace(WARM, slots_free=0), 5_000, 5_000, 0, False),
        ("a slot is free for it, however long its prompt", WARM, 90_000, 5_000, 1, False),
        ("the free slots go to those before it", WARM, 90_000, 5_000, 2, True),
        ("no service time was measured", replace(WARM, slots_free=0, service_ms=0), 90_000, 5_000, 0, False),
        ("its deadline has passed, the due loop looks", replace(WARM, slots_free=0), 90_000, 0, 0, False),
        ("nothing can be said", replace(WARM, slots_free=0), None, 5_000, 0, False),
        ("batch on a slow model, by its turn", replace(WARM, availability="degraded"), 9_000, 5_000, 2, True),
        ("a load that will take too long", replace(WARM, availability="cold"), 9_000, 5_000, 0, True),
    ],
)
def test_whether_waiting_for_a_turn_is_pointless(
    why: str, view: ModelView, here: float | None, left_ms: float, ahead: int, pointless: bool
) -> None:
    found = waiting_is_pointless(here, view, left_ms=left_ms, priority="batch", ahead=ahead)
    assert found is pointless, why


@pytest.mark.parametrize(
    ("view", "seconds"),
    [
        (WARM, 1),
        (replace(WARM, service_ms=7_000), 4),
        (replace(WARM, service_ms=7_000, slots_total=0), 7),
        (replace(WARM, service_ms=0, slots_total=1), 5),
        (replace(WARM, availability="waking"), 9),
        (replace(WARM, availability="cold", load_ms=90_000), 30),
        (replace(WARM, service_ms=1, slots_total=8), 1),
    ],
)
def test_when_to_come_back(view: ModelView, seconds: int) -> None:
    assert retry_after_s(view) == seconds


def test_who_is_in_line_comes_back_when_it_is_its_turn() -> None:
    assert retry_after_s(replace(WARM, service_ms=7_000), before=2) == 11


@given(
    st.sampled_from(["warm", "degraded", "waking", "cold", "unavailable"]), st.integers(0, 9), st.floats(0, 1e9),
    st.floats(0, 1e9),
)  # fmt: skip
def test_the_answer_is_always_between_one_and_thirty(state: str, slots: int, service: float, load: float) -> None:
    view = ModelView(state, slots_total=slots, service_ms=service, load_ms=load)  # type: ignore[arg-type]
    assert 1 <= retry_after_s(view) <= 30


@pytest.mark.parametrize(
    ("left_ms", "seconds"), [(75_000, 30), (30_001, 30), (12_001, 13), (900, 1), (0, 5), (-4_000, 5)]
)
def test_a_model_that_is_set_aside_may_be_asked_for_when_that_is_over(left_ms: int, seconds: int) -> None:
    """And where nobody knows when it comes back, in a few seconds."""
    assert back_in_s(ModelView("unavailable", aside_until=NOW + left_ms), NOW) == seconds
    assert back_in_s(ModelView("unavailable"), NOW) == 5


@pytest.mark.parametrize(
    ("why", "waiting", "need", "next_in_ms"),
    [
        ("nobody waits", [], 0, None),
        ("a deadline that a stop now just keeps", [job("a", slack_ms=STOP_MS + 300)], 1, None),
        ("a moment later is time enough", [job("a", slack_ms=STOP_MS + 301)], 0, 1),
        ("one that has passed", [job("a", slack_ms=-5)], 1, None),
        ("the budget of its lane, where it has no fallback", [job("a", age_ms=9_700 - STOP_MS)], 1, None),
        ("the next of several", [job("a"), job("b", age_ms=500), job("c", slack_ms=0)], 1, 9_200 - STOP_MS),
        ("batch work has none", [job("a", slack_ms=0, batch=True)], 0, None),
    ],
)
def test_who_is_in_need_of_a_slot(why: str, waiting: list[Waiting], need: int, next_in_ms: int | None) -> None:
    found = in_need(waiting, now_ms=NOW, budgets_ms={"big": 10_000}, first_token_ms=300, prefill_tps=1_000)
    assert (len(found[0]), found[1]) == (need, None if next_in_ms is None else NOW + next_in_ms), why


def test_a_long_prompt_needs_its_slot_sooner() -> None:
    facts = {"now_ms": NOW, "budgets_ms": {"big": 10_000}, "first_token_ms": 0.0}
    long = replace(job("a"), tokens=5_000)
    assert in_need([long], prefill_tps=1_000, **facts) == ([], NOW + 5_000 - STOP_MS)  # type: ignore[arg-type]
    assert in_need([long], prefill_tps=0, **facts) == ([], NOW + 10_000 - STOP_MS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("priority", "ahead", "pointless"),
    [("interactive", 0, False), ("interactive", 1, True), ("batch", 0, True)],
)
def test_slots_that_batch_work_makes_way_from_are_peoples(priority: str, ahead: int, pointless: bool) -> None:
    view = replace(WARM, slots_free=0, slots_yielding=1)
    assert waiting_is_pointless(9_000, view, left_ms=5_000, priority=priority, ahead=ahead) is pointless
