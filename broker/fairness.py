"""How much has been computed for each caller, and who has had more than the others that wait. Pure: no Redis, no clock.

The service of a caller is counted in tokens: prompt tokens that were read anew, and tokens that were made. Among
callers that wait, the one that was served least goes first; what it had while nobody else wanted anything counts for
nothing (*start-time fair queueing*: a caller that comes begins at the level of the least served that waits).

One that comes back may be behind that level by the largest job of late, and no more. It cannot save up service by being
idle; but a caller of small jobs whose next one is a moment late, while a large one of somebody else takes the slot,
must have what it missed by that, or large jobs would get the more of the model the larger they are.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

EWMA = 0.2
LARGEST_FADES = 0.98
"""Of the largest job of late so much is left with each job that ends."""

KEPT = 256
"""So many callers are remembered before those that have nothing to answer for are dropped."""


@dataclass(frozen=True)
class Levels:
    """How far the callers that wait have been served, as one choice sees it. Tokens."""

    of: Mapping[str, float]
    ahead_above: float
    """Who has more than this is ahead of the least served by more than one mean charge."""


class Served:
    """The service of one model at one priority, by caller."""

    def __init__(self) -> None:
        self.floor = 0.0  # the level of the least served that waited, never falling
        self.mean_charge = 0.0  # of the last jobs of all callers
        self._largest = 0.0
        self._given: dict[str, float] = {}
        self._written: dict[str, float] = {}  # mean answer of a caller
        self._mean_written = 0.0
        self._kept = KEPT

    def level(self, caller: str) -> float:
        """How far a caller has been served: what it was given, or what the least of those had who waited."""
        return max(self._given.get(caller, self.floor), self.floor - self._largest)

    def look(self, waiting: Collection[str]) -> Levels | None:
        """Says how far these callers have been served, for the choice that follows, and lifts the floor to the least of
        them. None where there are not two to choose between."""
        self.floor = max(self.floor, min(map(self.level, waiting), default=0.0))
        return self.levels(waiting)

    def levels(self, callers: Collection[str]) -> Levels | None:
        """Says how far these callers have been served. None where there are not two."""
        if len(callers) < 2:
            return None
        of = {caller: self.level(caller) for caller in callers}
        return Levels(of, min(of.values()) + self.mean_charge)

    def estimate(self, caller: str, *, prompt: int) -> float:
        """What a job will cost that has so many prompt tokens to read: its answer is taken for its caller's mean."""
        return max(0, prompt) + self._written.get(caller, self._mean_written)

    def charge(self, caller: str, tokens: float) -> None:
        """Charges a caller for a job that begins."""
        self._given[caller] = self.level(caller) + tokens
        if not self.mean_charge:
            self.mean_charge = tokens
        if len(self._given) > self._kept:
            self._forget()

    def give_back(self, caller: str, tokens: float) -> None:
        """Takes a charge back: nothing came of the job, by no fault of its caller."""
        self._given[caller] = self._given.get(caller, self.floor) - tokens

    def settle(self, caller: str, charged: float, *, prompt: int, written: int) -> None:
        """Puts the runtime's own figures in the place of what was charged: prompt tokens read anew, tokens made."""
        cost = max(0, prompt) + written
        self._given[caller] = self._given.get(caller, self.floor) + cost - charged
        self.mean_charge = _mean(self.mean_charge, cost)
        self._largest = max(cost, self._largest * LARGEST_FADES)
        self._mean_written = _mean(self._mean_written, written)
        self._written[caller] = _mean(self._written.get(caller, 0.0), written)

    def _forget(self) -> None:
        """Drops who is at the floor: it would begin there anyhow. Who was given more is remembered for that."""
        self._given = {caller: given for caller, given in self._given.items() if given > self.floor}
        self._written = {caller: mean for caller, mean in self._written.items() if caller in self._given}
        self._kept = max(KEPT, 2 * len(self._given))


def _mean(known: float, measured: float) -> float:
    return known + EWMA * (measured - known) if known else float(measured)
