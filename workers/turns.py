"""Who gives memory to whom, and when, where models do not fit together. Pure.

A wish for memory is one of three, the strongest first: jobs wait for the model; it was asked for within the last
minute; it is kept warm.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """How much a model wants to be in memory."""

    waited_for: bool = False
    wanted_until: int = 0  # instant, ms
    kept: bool = False  # kept warm, and within its active hours
    weight: float = 1.0


def may_take(mine: Wish, theirs: Wish, *, now_ms: int, others_wait: bool) -> bool:
    """Whether a model that wants memory may have that of an idle one which has had its minimum stay.

    Otherwise two of them would evict each other for as long as both are wanted. Who is waited for takes from whom
    nobody waits for; of two that were asked for, the one that was asked for last stays. Who is only kept warm comes
    back when the box is idle: nobody waits for anything (`others_wait`), and the other was not asked for lately and is
    not kept warm itself, or is worth less.
    """
    if theirs.waited_for:
        return False
    if mine.waited_for:
        return True
    if mine.wanted_until > now_ms:
        return theirs.wanted_until < mine.wanted_until
    if others_wait or theirs.wanted_until > now_ms:
        return False
    return not theirs.kept or theirs.weight < mine.weight
