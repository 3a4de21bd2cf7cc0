"""How the wait of a job goes: who is before it, how its model does, when its first token should come.

What a heartbeat says in words and `GET /v1/jobs/<id>` in figures is the same look.
"""

import asyncio
import bisect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from broker.hosts import Fleet
from broker.lanes import held_entries, waiting_entries
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.precedence import LaneSeen, Precedence, Waiter
from broker.records import JobRecord
from broker.store import Store

PLACES_MAX = 1024
PLACES_AGE_S = 2.0


@dataclass(frozen=True)
class Wait:
    """A wait as it stands."""

    lane: str
    ahead: int  # jobs of the lane that wait and came before it, PLACES_MAX at most
    model: str
    model_state: str  # warm | degraded | waking | cold | unavailable
    reason: str  # why it is in that state, where there is one
    first_token_in_ms: int | None  # None = nothing was measured that could tell

    def words(self) -> str:
        """Says it in one line."""
        said = f"waiting in lane {self.lane} behind {self.ahead}, {self.model} is {self.model_state}"
        if self.reason:
            said += f" ({self.reason})"
        if self.first_token_in_ms is not None:
            said += f", about {max(1, round(self.first_token_in_ms / 1000))} s to the first token"
        return said

    def as_json(self) -> dict[str, Any]:
        """Gives it to a client."""
        return asdict(self)


@dataclass(frozen=True)
class _Seen:
    """Who waits for a model: the places in each of its lanes, and who goes before whom."""

    at_s: float
    places: Mapping[str, list[tuple[int, int]]]
    order: Precedence


class Waits:
    """Tells of the jobs that wait. One look at the lanes of a model serves everybody who waits for it for a moment."""

    def __init__(self, store: Store, book: PolicyBook, fleet: Fleet) -> None:
        self._store = store
        self._book = book
        self._fleet = fleet
        self._seen: dict[str, _Seen] = {}

    async def of(self, job: JobRecord) -> Wait | None:
        """Tells how a job's wait goes; None where it does not wait in a lane."""
        if job.state is not State.QUEUED or not job.entry:
            return None
        fleet, lane = self._fleet, self._book.active.lane(job.lane)
        seen, may_start = await self._look(lane.model if lane is not None else job.model), await self._may_start(job)
        ahead = bisect.bisect_left(seen.places.get(job.lane, []), _entry_id(job.entry))
        fresh = fleet.fresh_tokens(job.model, session=job.session, tokens=job.tokens)
        before = seen.order.before(Waiter(job.submitted_at, job.id, job.caller, job.priority == "batch"))
        left = fleet.foretold_ms(job.lane, before, fresh_tokens=fresh, may_start=may_start)
        view = fleet.view(job.lane)
        return Wait(job.lane, ahead, job.model, view.availability, view.reason, left)

    async def _look(self, model: str) -> _Seen:
        """Looks at PLACES_MAX jobs of each lane of the model."""
        now, active = asyncio.get_running_loop().time(), self._book.active
        seen = self._seen.get(model)
        if seen is None or now - seen.at_s > PLACES_AGE_S:
            places, found = {}, []
            for name in active.lanes_of(model):
                held = set(await held_entries(self._store, name, limit=PLACES_MAX))
                entries = [one async for one in waiting_entries(self._store, name, limit=PLACES_MAX)]
                waits = [one for one in entries if one.entry not in held]
                more = self._fleet.picture.waiting.get(name, 0) - len(waits) if len(entries) == PLACES_MAX else 0
                batch = active.lanes()[name].priority == "batch"
                places[name] = [_entry_id(one.entry) for one in waits]
                found.append(LaneSeen([Waiter.of(one) for one in waits], more, batch))
            seen = self._seen[model] = _Seen(now, places, Precedence(found))
        return seen

    async def _may_start(self, job: JobRecord) -> int:
        """How many more jobs of its caller may run, -1 = any number."""
        if not job.max_running:
            return -1
        return max(0, job.max_running - int(await self._store.command("ZCARD", self._store.keys.runs(job.caller))))


def _entry_id(entry: str) -> tuple[int, int]:
    ms, _, number = entry.partition("-")
    return int(ms), int(number or 0)
