"""Who goes before whom among those who wait for a model, over all of its lanes: they share its slots. Pure.

The order is that of `dispatch.choose` as far as anybody but a worker can know it: people before batch work, then age.
"""

import bisect
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

from broker.records import Waiting


class Waiter(NamedTuple):
    """A job that waits, in the order of age."""

    submitted: int
    job: str
    caller: str
    batch: bool

    @classmethod
    def of(cls, entry: Waiting) -> Self:
        """Reads it off its entry."""
        return cls(entry.submitted, entry.job, entry.caller, entry.priority == "batch")


@dataclass(frozen=True)
class LaneSeen:
    """A lane as it was looked at: those seen to wait, and how many more do, taken to be younger and of its kind."""

    seen: list[Waiter]
    more: int = 0
    batch: bool = False


@dataclass(frozen=True)
class Before:
    """Who goes before a job: people's jobs, and so much batch work, None = the job is a person's itself. `own` of them
    are its caller's; `exact` = nobody was left out who may go before it too."""

    ahead: int
    batch_ahead: int | None = None
    own: int = 0
    exact: bool = False

    @property
    def all(self) -> int:
        """How many they are."""
        return self.ahead + (self.batch_ahead or 0)


class Precedence:
    """The order of those who wait for one model."""

    def __init__(self, lanes: Iterable[LaneSeen]) -> None:
        lanes = list(lanes)
        seen = [waiter for lane in lanes for waiter in lane.seen]
        self._people, self._batch = (sorted(w for w in seen if w.batch is kind) for kind in (False, True))
        self._more = sum(lane.more for lane in lanes if not lane.batch)
        self._known = {kind: _known_until(lane for lane in lanes if lane.batch is kind) for kind in (False, True)}
        self._own: dict[str, int] = {}
        self._of: Counter[str] = Counter()
        for waiter in [*self._people, *self._batch]:
            self._own[waiter.job] = self._of[waiter.caller]
            self._of[waiter.caller] += 1

    def before(self, waiter: Waiter) -> Before:
        """Says who goes before this one, which need not be one of those seen."""
        own = self._own.get(waiter.job, self._of[waiter.caller])
        exact = waiter.submitted <= self._known[waiter.batch]
        if not waiter.batch:
            return Before(bisect.bisect_left(self._people, waiter), None, own, exact)
        return Before(len(self._people) + self._more, bisect.bisect_left(self._batch, waiter), own, exact)

    def leaves(self, waiter: Waiter) -> None:
        """Notes that one of those seen waits no more."""
        line = self._batch if waiter.batch else self._people
        place = bisect.bisect_left(line, waiter)
        if place < len(line) and line[place] == waiter:
            del line[place]


def _known_until(lanes: Iterable[LaneSeen]) -> float:
    """Who is younger than this may have others before it that were not looked at."""
    return min((max((w.submitted for w in lane.seen), default=0) for lane in lanes if lane.more > 0), default=math.inf)
