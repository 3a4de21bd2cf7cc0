"""A slot is free only when the runtime is known to have stopped."""

from workers.slots import Slots


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
    assert (slots.free, slots.settling) == (1, [])
    assert slots.settled(2) is False


def test_what_others_run_in_the_runtime_frees_nothing_and_takes_nothing() -> None:
    slots = Slots(4)
    slots.take("a")
    slots.take("b")
    slots.give_back("b", clean=False, now_s=1)
    assert slots.settled(9) is False
    assert slots.settling == [1]


def test_where_the_runtime_cannot_tell_each_slot_settles_for_the_whole_time() -> None:
    """One that has just been closed is not freed because an older one's time is over."""
    slots = Slots(3)
    for name, at in (("a", 10), ("b", 25)):
        slots.take(name)
        slots.give_back(name, clean=False, now_s=at)
    assert slots.expire(5) is False
    assert slots.expire(12) is True
    assert (slots.settling, slots.free) == ([25], 2)
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
    slots = Slots(1, settling=[1, 2])
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
