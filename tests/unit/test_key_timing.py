"""How long it takes to refuse a key says nothing about the keys that there are. Timed side by side."""

import hashlib
import random
import statistics
import time
from collections.abc import Callable

import pytest

from broker.callers import EVERYTHING, Caller, Keyring, Keys, make_key
from broker.errors import Unauthorized

ROUNDS = 4_000
SHOWS_MAX = 0.03
"""Of two microseconds: sixty nanoseconds, some of which one hash or one comparison of texts would take."""

MADE = [make_key(f"bot-{n}", now_ms=1_000, by="ann", expires_at=2_000 if n % 2 else 0) for n in range(64)]
KEYS = [key for key, _ in MADE]
RING = Keyring(
    Keys.parse("ann:correct-horse-battery-staple,bob:another-secret-of-bob"),
    {key.id: key for key in KEYS},
    {key.caller: EVERYTHING for key in KEYS},
)
EMPTY = Keyring(Keys.parse("eve:nothing-of-the-kind,dan:nothing-like-it"), {}, {"eve": EVERYTHING})
SHOWN = [shown for _, shown in MADE]
STRANGER = make_key("nobody", now_ms=0, by="ann")[1]


class Leaky(Keyring):
    """A ring that does a little more where the id is known: one hash."""

    def caller_of(self, authorization: str | None, x_api_key: str | None = None, *, now_ms: int) -> Caller:
        presented = (authorization or "")[7:]
        if presented[3:11] in self.keys:
            hashlib.sha256(presented.encode()).digest()
        return super().caller_of(authorization, now_ms=now_ms)


def refusals_take(ring: Keyring, presented: Callable[[int], str]) -> Callable[[int], int]:
    def once(number: int) -> int:
        authorization = f"Bearer {presented(number)}"
        began = time.perf_counter_ns()
        try:
            ring.caller_of(authorization, now_ms=3_000)
        except Unauthorized:
            return time.perf_counter_ns() - began
        raise AssertionError("it opened")

    return once


def shows(ring: Keyring, one: Callable[[int], str], other: Callable[[int], str]) -> float:
    """How much longer one kind of wrong key takes than another, as a share of a refusal's time.

    A gateway that has none of these keys is asked the same in between, and its difference taken off: what remains is
    what the keys show, and not how the strings lie in memory. Medians, all four ways in turns in a drawn order.
    """
    drawn, ways = random.Random(7), [refusals_take(r, presented) for r in (ring, EMPTY) for presented in (one, other)]
    times: list[list[int]] = [[], [], [], []]
    for number in range(ROUNDS):
        for which in drawn.sample(range(4), 4):
            times[which].append(ways[which](number))
    ours, ours_other, theirs, theirs_other = (statistics.median(found) for found in times)
    return abs((ours - ours_other) - (theirs - theirs_other)) / ours


def of_a_known_id(number: int) -> str:
    return SHOWN[number % 64][:12] + STRANGER[12:]


def of_no_known_id(number: int) -> str:
    return STRANGER[:3] + format(number % 64 + 22_222_222, "08d").replace("0", "a").replace("1", "b") + STRANGER[11:]


def almost_right(number: int) -> str:
    return SHOWN[number % 64][:-1] + "-_"[SHOWN[number % 64].endswith("-")]


def all_wrong(number: int) -> str:
    return SHOWN[number % 64][:12] + "A" * 43


def almost_of_the_environment(number: int) -> str:
    return "correct-horse-battery-stapl" + "fghi"[number % 4]


def nothing_of_the_environment(number: int) -> str:
    return "x" * 27 + "fghi"[number % 4]


PAIRS = {
    "an id that is known": (of_a_known_id, of_no_known_id),
    "a secret that is almost right": (almost_right, all_wrong),
    "a chosen secret that is almost right": (almost_of_the_environment, nothing_of_the_environment),
}


@pytest.mark.parametrize("what", PAIRS)
def test_the_time_of_a_refusal_does_not_show(what: str) -> None:
    one, other = PAIRS[what]
    assert len(one(1)) == len(other(1))
    assert shows(RING, one, other) < SHOWS_MAX


def test_a_leak_would_be_seen() -> None:
    ring = Leaky(RING.environment, RING.keys, RING.rights)
    assert shows(ring, of_a_known_id, of_no_known_id) > 2 * SHOWS_MAX
