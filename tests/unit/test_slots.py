"""A slot is free only when the runtime is known to have stopped; and what a slot has in its cache is worth a moment."""

from workers.slots import KEEP_S, KEEP_TOKENS, ROW_MAX, Slots


def test_a_clean_end_frees_the_slot_at_once() -> None:
    slots = Slots(2)
    slots.take("a")
    slots.take("b")
    assert (slots.free, slots.idle) == (0, False)
    slots.give_back("a", clean=True, now_s=1)
    assert (slots.free, slots.idle) == (1, False)
    slots.give_back("b", clean=True, now_s=1)
    assert (slots.free, slots.idle) == (2, True)


def test_a_closed_answer_settles_until_the_runtime_runs_no_more_than_we_use() -> None:
    """One of three jobs was closed: the runtime must be down to two before another is claimed."""
    slots = Slots(3)
    for name in "abc":
        slots.take(name)
    slots.give_back("a", clean=False, now_s=1)
    assert (slots.free, slots.idle) == (0, False)
    assert slots.settled(3) is False
    assert slots.free == 0
    assert slots.settled(2) is True
    assert (slots.free, slots.settling) == (1, {})
    assert slots.settled(2) is False


def test_what_others_run_in_the_runtime_frees_nothing_and_takes_nothing() -> None:
    slots = Slots(4)
    slots.take("a")
    slots.take("b")
    slots.give_back("b", clean=False, now_s=1)
    assert slots.settled(9) is False
    assert list(slots.settling.values()) == [1]


def test_where_the_runtime_cannot_tell_each_slot_settles_for_the_whole_time() -> None:
    """One that has just been closed is not freed because an older one's time is over."""
    slots = Slots(3)
    for name, at in (("a", 10), ("b", 25)):
        slots.take(name)
        slots.give_back(name, clean=False, now_s=at)
    assert slots.expire(5) is False
    assert slots.expire(12) is True
    assert (list(slots.settling.values()), slots.free) == ([25], 2)
    assert slots.expire(30) is True
    assert slots.idle


def test_a_new_runtime_has_nothing_to_settle() -> None:
    slots = Slots(1)
    slots.take("a")
    slots.give_back("a", clean=False, now_s=1)
    slots.restarted()
    assert (slots.free, slots.idle) == (1, True)


def test_more_settling_than_slots_is_none_free() -> None:
    """maxConcurrent was lowered while answers were being closed."""
    slots = Slots(1)
    slots.settling = {0: 1, 1: 2}
    assert slots.free == 0


def test_a_request_on_its_way_does_not_free_a_settling_slot() -> None:
    """The runtime says one is busy: that is the closed answer, the new request has not reached it yet."""
    slots = Slots(2)
    slots.take("old", now_s=1.0)
    slots.give_back("old", clean=False, now_s=10.0)
    slots.take("new", now_s=11.9)
    assert not slots.settled(1, asked_s=12.0)
    assert slots.free == 0
    assert slots.settled(1, asked_s=14.0)
    assert slots.free == 1


def test_slots_that_settle_for_ever_show_a_wedged_runtime() -> None:
    slots = Slots(1)
    slots.take("a")
    slots.give_back("a", clean=False, now_s=10.0)
    assert not slots.wedged(9.0)
    assert slots.wedged(10.0)


def serve(
    slots: Slots, session: str, at: float, *, tokens: int = 0, contended: bool = False, clean: bool = True
) -> int:
    number = slots.take(session, session=session, contended=contended, now_s=at)
    slots.give_back(session, clean=clean, now_s=at, tokens=tokens)
    return number


def ready(slots: Slots) -> set[str]:
    return {name for name in ("a", "b", "c", "d", "new") if name in slots.ready()}


def test_a_session_goes_back_to_its_slot() -> None:
    slots = Slots(3)
    assert [serve(slots, name, at) for at, name in enumerate("abc")] == [0, 1, 2]
    assert serve(slots, "b", 10) == 1
    assert slots.told() == {0: ("a", 0), 1: ("b", 0), 2: ("c", 0)}


def test_a_stranger_gets_an_empty_slot_else_the_one_whose_prompt_is_oldest() -> None:
    slots = Slots(3)
    serve(slots, "a", 1)
    serve(slots, "b", 2)
    assert serve(slots, "c", 3) == 2
    serve(slots, "a", 4)
    assert serve(slots, "d", 5) == 1
    assert ready(slots) == {"a", "c", "d"}


def test_a_session_whose_slot_is_busy_takes_another() -> None:
    """Two calls of one agent at once: the second cannot wait for the first."""
    slots = Slots(2)
    assert slots.take("one", session="a") == 0
    assert slots.take("two", session="a") == 1
    assert ready(slots) == set()


def test_work_without_a_session_leaves_nothing_in_its_slot() -> None:
    slots = Slots(2)
    serve(slots, "a", 1)
    serve(slots, "b", 2)
    assert slots.take("probe") == 0
    slots.give_back("probe", clean=True, now_s=3)
    assert slots.told() == {1: ("b", 0)}


def test_a_slot_is_kept_for_the_session_of_a_long_prompt_for_a_moment() -> None:
    slots = Slots(2)
    serve(slots, "long", 10.0, tokens=KEEP_TOKENS)
    serve(slots, "short", 10.0, tokens=KEEP_TOKENS - 1)
    assert (slots.free, slots.open(10.0), slots.next_open_s(10.0)) == (2, 1, 10.0 + KEEP_S)
    assert slots.take("new", session="new", now_s=10.0) == 1  # the other is kept
    assert (slots.open(10.0), slots.open(10.0 + KEEP_S)) == (0, 1)
    assert slots.take("again", session="long", now_s=10.1) == 0
    assert slots.next_open_s(10.1) is None


def test_after_its_row_a_session_takes_its_place_in_line() -> None:
    """Turns count only while others wait: who was alone for long has not had its row."""
    slots = Slots(1)
    for turn in range(9):
        serve(slots, "a", turn, tokens=KEEP_TOKENS)
    for turn in range(ROW_MAX):
        assert ready(slots) == {"a"}
        serve(slots, "a", 10 + turn, tokens=KEEP_TOKENS, contended=True)
    assert ready(slots) == set()
    assert slots.open(14.0) == 1  # and it is not kept either
    serve(slots, "b", 20, contended=True)
    assert ready(slots) == {"b"}


def test_an_answer_that_was_cut_short_leaves_its_prompt_in_the_slot_that_settles() -> None:
    slots = Slots(2)
    serve(slots, "a", 1.0, tokens=50, clean=False)
    assert (slots.free, ready(slots)) == (1, set())
    assert serve(slots, "b", 2.0) == 1
    assert slots.settled(0)
    assert ready(slots) == {"a", "b"}


def test_of_several_that_settle_those_closed_last_are_likeliest_still_busy() -> None:
    slots = Slots(3)
    for at, name in enumerate("abc"):
        slots.take(name, session=name, now_s=at)
        slots.give_back(name, clean=False, now_s=at)
    assert slots.settled(1)
    assert slots.settling == {2: 2}


def test_a_new_runtime_has_nothing_cached() -> None:
    slots = Slots(2)
    serve(slots, "a", 1.0)
    slots.restarted()
    assert slots.told() == {}


def test_a_probe_finds_a_slot_that_costs_nobody_anything() -> None:
    slots = Slots(2)
    serve(slots, "a", 100.0)
    assert slots.spare(50.0)
    serve(slots, "b", 100.0)
    assert not slots.spare(50.0)
    assert slots.spare(100.5)


def test_a_claim_that_was_lost_leaves_the_slot_as_it_was() -> None:
    """Another host was first: its session is not cached here, and what was here still is."""
    slots = Slots(1)
    serve(slots, "a", 1.0, tokens=7)
    slots.take("lost", session="b", now_s=2.0)
    slots.give_back("lost", clean=True, now_s=2.1, served=False)
    assert (ready(slots), slots.told()) == ({"a"}, {0: ("a", 7)})


def test_fewer_slots_are_offered_and_what_runs_beyond_them_ends() -> None:
    """A runtime that runs fewer at once than the policy says gets no more; nobody's slot is taken away."""
    slots = Slots(3)
    for user in ("a", "b", "c"):
        slots.take(user, session=user)
    slots.offer(1)
    assert slots.free == 0
    for user in ("a", "b"):
        slots.give_back(user, clean=True, now_s=1.0)
    assert slots.free == 0, "c still runs, and that is as many as there are"
    slots.give_back("c", clean=True, now_s=1.0)
    assert (slots.free, list(slots.told())) == (1, [0])
    assert slots.take("d", session="c") == 0


def test_quiet_means_that_nobody_would_miss_a_cached_prompt() -> None:
    slots = Slots(2)
    assert slots.quiet(0.0)
    slots.take("a", session="s", now_s=5.0)
    slots.give_back("a", clean=True, now_s=6.0, tokens=9)
    assert not slots.quiet(6.0) and slots.quiet(6.1)


def test_how_long_a_cached_prompt_is_by_the_apis_estimate() -> None:
    """Kept while the session's next turn runs; the longest where two slots have it; gone with the runtime."""
    slots = Slots(2)
    slots.take("u1", session="a", now_s=1)
    slots.take("u2", session="a", now_s=1)
    slots.give_back("u1", clean=True, now_s=2, tokens=1_000, estimate=900)
    slots.give_back("u2", clean=True, now_s=2, tokens=500, estimate=400)
    assert slots.estimates() == {"a": 900}
    slots.take("u3", session="a", now_s=3)
    assert slots.estimates() == {"a": 900}
    slots.give_back("u3", clean=True, now_s=4, tokens=1_100, estimate=950)
    slots.take("u4", session="b", now_s=5)
    slots.give_back("u4", clean=True, now_s=6)  # how long, nobody said
    assert slots.estimates() == {"a": 950}
    slots.restarted()
    assert slots.estimates() == {}
