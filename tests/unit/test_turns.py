"""Who gives memory to whom where models do not fit together."""

from dataclasses import replace
from typing import Any

import pytest

from workers.turns import Asked, Asker, Seat, Turn, Wish, asked_on, held_up_by, may_take, room_in_ms, take_turns

NOW = 1_000_000
ASKED = Wish(wanted_until=NOW + 30_000)
WAITED_FOR = Wish(waited_for=True, wanted_until=NOW + 60_000)
KEPT = Wish(kept=True)
NOBODY = Wish()


@pytest.mark.parametrize(
    ("why", "mine", "theirs", "others_wait", "taken"),
    [
        ("who is waited for takes from whom nobody asks for", WAITED_FOR, NOBODY, False, True),
        ("and from who was only asked for", WAITED_FOR, Wish(wanted_until=NOW + 70_000), False, True),
        ("and from who is only kept warm", WAITED_FOR, KEPT, False, True),
        ("whoever else waits", WAITED_FOR, KEPT, True, True),
        ("but jobs that wait for the other are served first", WAITED_FOR, WAITED_FOR, False, False),
        ("who was asked for last stays", ASKED, Wish(wanted_until=NOW + 40_000), False, False),
        ("and who was asked for earlier goes", ASKED, Wish(wanted_until=NOW + 20_000), False, True),
        ("a request is more than being kept warm", ASKED, KEPT, False, True),
        ("who is kept warm comes back when nobody wants the other", KEPT, NOBODY, False, True),
        ("or wanted it long ago", KEPT, Wish(wanted_until=NOW), False, True),
        ("not while the other is in use", KEPT, ASKED, False, False),
        ("not while somebody waits for a third", KEPT, NOBODY, True, False),
        ("two that are only kept warm leave each other alone", KEPT, KEPT, False, False),
        ("unless one is worth more", Wish(kept=True, weight=2), KEPT, False, True),
        ("it is not the one that is worth less", Wish(kept=True, weight=0.5), KEPT, False, False),
        ("kept warm outside its hours is not kept warm", KEPT, Wish(kept=False, weight=9), False, True),
    ],
)
def test_the_stronger_wish_gets_the_memory(why: str, mine: Wish, theirs: Wish, others_wait: bool, taken: bool) -> None:
    assert may_take(mine, theirs, now_ms=NOW, others_wait=others_wait) is taken, why


@pytest.mark.parametrize("one", [WAITED_FOR, ASKED, KEPT, Wish(kept=True, weight=2), NOBODY])
@pytest.mark.parametrize("other", [WAITED_FOR, Wish(wanted_until=NOW + 10_000), KEPT, NOBODY])
def test_no_two_wishes_take_from_each_other_in_turn(one: Wish, other: Wish) -> None:
    """That would be a swap for ever with nobody asking anew."""
    wants = [w for w in (one, other) if w.waited_for or w.wanted_until > NOW or w.kept]
    if len(wants) == 2:
        both = [may_take(*pair, now_ms=NOW, others_wait=False) for pair in ((one, other), (other, one))]
        assert both != [True, True]


GB = 1 << 30
BIG = Seat("big", 21 * GB, 61_000, 60_000, 2, busy=True, waited_for=True, service_ms=4_000, worth=60_000)
SMALL = Seat("small", 6 * GB, 61_000, 60_000, 4, busy=True, waited_for=True, service_ms=1_000, worth=8_000)
BUSY = Turn("other", begun_ms=NOW - 5_000, started=3)


def asks(**changes: Any) -> Asker:
    return replace(Asker("other", 6 * GB, NOW - 9_000, load_ms=10_000), **changes)


def is_asked(**changes: Any) -> Asker:
    """One whose requests keep coming, and are all promoted away."""
    return replace(asks(waits=False, asked_for_ms=300_000), **changes)


LONG = replace(BIG, stayed_ms=300_000)
ASKED_BUSY = replace(BUSY, asked_only=True)
NOT_YET = Turn("other", asked_only=True)


@pytest.mark.parametrize(
    ("why", "before", "seat", "asker", "after"),
    [
        ("within its minimum stay nothing is asked of it", None, replace(BIG, stayed_ms=59_999), asks(), Turn("other")),
        ("then a last batch begins", None, BIG, asks(), Turn("other", begun_ms=NOW)),
        ("and goes on", BUSY, BIG, asks(), BUSY),
        ("until so many jobs were started", replace(BUSY, started=8), BIG, asks(), replace(BUSY, started=8, over=True)),
        ("not one before", replace(BUSY, started=7), BIG, asks(), replace(BUSY, started=7)),
        ("or so long went by", Turn("other", begun_ms=NOW - 20_000), BIG, asks(),
         Turn("other", begun_ms=NOW - 20_000, over=True)),
        ("or somebody who waits would be late: 4 s to drain, 10 s to load", BUSY, BIG,
         asks(deadlines=(NOW + 15_000,)), replace(BUSY, over=True)),
        ("not while there is time", BUSY, BIG, asks(deadlines=(NOW + 16_001,)), BUSY),
        ("nor when it is too late for them", BUSY, BIG, asks(deadlines=(NOW + 13_999, NOW - 1)), BUSY),
        ("nor where nobody knows how long it loads", BUSY, BIG, asks(deadlines=(NOW + 15_000,), load_ms=0), BUSY),
        ("a deadline does not shorten the minimum stay", None, replace(BIG, stayed_ms=9),
         asks(deadlines=(NOW + 15_000,)), Turn("other")),
        ("once over it stays over", replace(BUSY, over=True), BIG, asks(), replace(BUSY, over=True)),
        ("and it is noted when it has drained", replace(BUSY, over=True), replace(BIG, busy=False), asks(),
         replace(BUSY, over=True, drained_ms=NOW)),
        ("the other has a while to come", replace(BUSY, over=True, drained_ms=NOW - 29_999), replace(BIG, busy=False),
         asks(), replace(BUSY, over=True, drained_ms=NOW - 29_999)),
        ("then it goes on for another batch", replace(BUSY, over=True, drained_ms=NOW - 30_000),
         replace(BIG, busy=False), asks(), Turn("other", begun_ms=NOW)),
        ("and two minutes at least", None, replace(BIG, stayed_ms=119_999, min_stay_ms=10), is_asked(), NOT_YET),
        ("who was only asked for waits for longer", None, BIG, is_asked(), NOT_YET),
        ("but not for ever", None, LONG, is_asked(), replace(NOT_YET, begun_ms=NOW)),
        ("where it was asked for all that time", None, LONG, is_asked(asked_for_ms=299_999), NOT_YET),
        ("and still is", None, LONG, is_asked(asked_ago_ms=15_001), NOT_YET),
        ("whose requests stop during the batch has it no more", ASKED_BUSY, LONG, is_asked(asked_ago_ms=15_001),
         NOT_YET),
        ("a gap while the other drains ends nothing", replace(ASKED_BUSY, over=True), LONG,
         is_asked(asked_ago_ms=40_000), replace(ASKED_BUSY, over=True)),
        ("one burst that was promoted away has no turn, though room was about to be made for it",
         replace(BUSY, over=True), LONG, is_asked(asked_for_ms=30_000), NOT_YET),
        ("nor has one whose jobs went elsewhere within the longer stay", replace(BUSY, over=True), BIG, is_asked(),
         NOT_YET),
        ("a load that goes on gets what it was given", replace(ASKED_BUSY, over=True), BIG,
         is_asked(asked_for_ms=0, loading=True), replace(ASKED_BUSY, over=True)),
        ("a batch for somebody else does not count", replace(BUSY, to="third", started=8), BIG, asks(),
         Turn("other", begun_ms=NOW)),
        ("nobody makes room for what still would not fit", BUSY, BIG, asks(need=40 * GB), None),
        ("nor who is pinned", None, replace(BIG, pinned=True), asks(), None),
        ("nor for what fits as it is", BUSY, BIG, asks(need=2 * GB), None),
    ],
)  # fmt: skip
def test_a_model_in_memory_gets_its_turn_and_no_more(
    why: str, before: Turn | None, seat: Seat, asker: Asker, after: Turn | None
) -> None:
    told = {} if before is None else {seat.name: before}
    assert take_turns(told, [seat], [asker], headroom=3 * GB, now_ms=NOW).get(seat.name) == after, why


def test_requests_count_from_the_first_that_was_not_forgotten_before_the_next() -> None:
    first = asked_on(None, noted_at=NOW, forgotten_at=NOW + 75_000)
    again = asked_on(first, noted_at=NOW + 75_000, forgotten_at=NOW + 150_000)
    later = asked_on(again, noted_at=NOW + 150_001, forgotten_at=NOW + 225_001)
    assert [one.since for one in (first, again, later)] == [NOW, NOW, NOW + 150_001]
    assert asked_on(first, noted_at=NOW, forgotten_at=NOW + 75_000) == Asked(NOW, NOW + 75_000)


def test_nobody_who_is_not_asked_makes_room() -> None:
    assert take_turns({"big": replace(BUSY, over=True)}, [BIG], [], headroom=0, now_ms=NOW) == {}


@pytest.mark.parametrize(
    ("why", "need", "before", "idle", "going"),
    [
        ("the one that is worth the least", 5, {}, set(), {"small"}),
        ("one with nothing to do before one that works", 5, {}, {"big"}, {"big"}),
        ("whose memory is not enough stays", 15, {}, set(), {"big"}),
        ("both where it takes both", 25, {}, set(), {"big", "small"}),
        ("who has begun to make room goes on with it", 5, {"big": BUSY}, set(), {"big"}),
    ],
)
def test_who_makes_room(why: str, need: int, before: dict[str, Turn], idle: set[str], going: set[str]) -> None:
    seats = [replace(seat, busy=seat.name not in idle, waited_for=seat.name not in idle) for seat in (BIG, SMALL)]
    assert set(take_turns(before, seats, [asks(need=need * GB)], headroom=0, now_ms=NOW)) == going, why


def test_two_who_ask_do_not_get_the_same_memory() -> None:
    """The one whose job has waited longest is first; for the second the other must go."""
    later, earlier = asks(), asks(name="earlier", since_ms=NOW - 10_000)
    found = take_turns({}, [BIG, SMALL], [later, earlier], headroom=GB, now_ms=NOW)
    assert {seat: turn.to for seat, turn in found.items()} == {"small": "earlier", "big": "other"}


def test_who_loads_already_asks_for_no_more() -> None:
    """What it made free has been promised to it, so the headroom does not show it any more."""
    before = {"small": replace(BUSY, over=True)}
    found = take_turns(before, [BIG, SMALL], [asks(need=6 * GB, loading=True)], headroom=0, now_ms=NOW)
    assert set(found) == {"small"}
    assert take_turns({}, [BIG], [asks(loading=True)], headroom=0, now_ms=NOW) == {}


@pytest.mark.parametrize(
    ("why", "seat", "turn", "held_up"),
    [
        ("it works", BIG, replace(BUSY, over=True), True),
        ("jobs wait for it, and its batch goes on", replace(BIG, busy=False), BUSY, True),
        ("it has had its turn and has drained", replace(BIG, busy=False), replace(BUSY, over=True), False),
        ("nobody wants it", replace(BIG, busy=False, waited_for=False), BUSY, False),
        ("it was only asked for: it may try", BIG, NOT_YET, False),
        ("until room is made for it", LONG, replace(ASKED_BUSY, over=True), True),
        ("and again when the other has drained", replace(LONG, busy=False), replace(ASKED_BUSY, over=True), False),
        ("within its minimum stay", replace(BIG, busy=False, waited_for=False, stayed_ms=1), Turn("other"), True),
    ],
)
def test_what_one_that_asks_has_to_wait_for(why: str, seat: Seat, turn: Turn, held_up: bool) -> None:
    assert bool(held_up_by("other", [seat], {"big": turn})) is held_up, why
    assert held_up_by("third", [seat], {"big": turn}) == []


@pytest.mark.parametrize(
    ("seat", "turn", "room_ms"),
    [
        (replace(BIG, stayed_ms=20_000), Turn("other"), 44_000),
        (BIG, BUSY, 4_000),
        (replace(BIG, busy=False, stayed_ms=59_000), Turn("other"), 1_000),
        (replace(BIG, busy=False), replace(BUSY, over=True), 0),
        (BIG, replace(BUSY, to="third"), 0),
    ],
)
def test_the_least_time_until_there_is_room(seat: Seat, turn: Turn, room_ms: float) -> None:
    """What is left of its minimum stay, and of what runs on it; its batch may end early for who would be late."""
    assert room_in_ms("other", [seat], {"big": turn}) == room_ms
