"""Keeps the books of who was served how much by the models of this host, for the order in which jobs are taken.

Each host is fair by itself, and hosts that are fair each are fair together. So the books stay in this process: choosing
costs no round trip, and a restart forgets them, which a caller cannot make happen.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from broker.fairness import Levels, Served
from broker.records import Waiting
from workers.picture import LanePicture


@dataclass(frozen=True)
class Charge:
    """What a caller was charged for an attempt that runs."""

    served: Served
    caller: str
    tokens: float

    def settle(self, usage: Mapping[str, int] | None) -> None:
        """Puts the runtime's own figures in its place; where it told none, the estimate stands."""
        if usage and "prompt_tokens" in usage:
            read = usage["prompt_tokens"] - usage.get("cached_tokens", 0)
            self.served.settle(self.caller, self.tokens, prompt=read, written=usage.get("completion_tokens", 0))

    def give_back(self) -> None:
        """Takes it back: the job was another's, or waits again."""
        self.served.give_back(self.caller, self.tokens)


class Shares:
    """The books of one host: by model and priority."""

    def __init__(self, picture: LanePicture) -> None:
        self._picture = picture
        self._served: dict[tuple[str, str], Served] = {}

    def levels(self, model: str, lanes: Iterable[str], *, but: Collection[str] = ()) -> dict[str, Levels]:
        """How far the callers have been served whose jobs wait in these lanes of a model, by priority; `but` those who
        may have nothing now."""
        found = {}
        for priority, callers in self._picture.callers(lanes).items():
            levels = self._of(model, priority).look(callers.difference(but) if but else callers)
            if levels is not None:
                found[priority] = levels
        return found

    def charge(self, model: str, job: Waiting, *, cached: int) -> Charge:
        """Charges a job's caller for what it will cost; `cached` of its prompt tokens are in its slot already."""
        served = self._of(model, job.priority)
        charge = Charge(served, job.caller, served.estimate(job.caller, prompt=job.tokens - cached))
        served.charge(charge.caller, charge.tokens)
        return charge

    def may_wait(self, model: str, job: Waiting, lanes: Iterable[str]) -> bool:
        """Whether a slot may wait a moment for the next job of this one's session: not for a caller that has had more
        than others that wait."""
        callers = self._picture.callers(lanes).get(job.priority, set()) | {job.caller}
        levels = self._of(model, job.priority).levels(callers)
        return levels is None or levels.of[job.caller] <= levels.ahead_above

    def _of(self, model: str, priority: str) -> Served:
        served = self._served.get((model, priority))
        if served is None:
            served = self._served[model, priority] = Served()
        return served
