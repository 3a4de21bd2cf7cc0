"""Who gives memory to whom where models do not fit together."""

import pytest

from workers.turns import Wish, may_take

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
