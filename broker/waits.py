"""How the wait of a job goes: who is before it, how its model does, when its first token should come.

What a heartbeat says in words and `GET /v1/jobs/<id>` in figures is the same look.
"""

import asyncio
import bisect
from dataclasses import asdict, dataclass
from typing import Any

from broker import dispatch
from broker.hosts import Fleet
from broker.lanes import held_entries, waiting_entries
from broker.lifecycle import State
from broker.records import JobRecord
from broker.store import Store

PLACES_MAX = 1024
PLACES_AGE_S = 2.0


@dataclass(frozen=True)
class Wait:
    """A wait as it stands."""

    lane: str
    ahead: int  # jobs of the lane that wait and came before it
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


class Waits:
    """Tells of the jobs that wait. One look into a lane serves everybody who waits in it for a moment."""

    def __init__(self, store: Store, fleet: Fleet) -> None:
        self._store = store
        self._fleet = fleet
        self._seen: dict[str, tuple[float, list[tuple[int, int]]]] = {}

    async def of(self, job: JobRecord) -> Wait | None:
        """Tells how a job's wait goes; None where it does not wait in a lane."""
        if job.state is not State.QUEUED or not job.entry:
            return None
        fleet, ahead = self._fleet, await self._ahead(job.lane, job.entry)
        view = fleet.view(job.lane)
        fresh = fleet.fresh_tokens(job.model, session=job.session, tokens=job.tokens)
        left = dispatch.foretold_ms(view, ahead=ahead, now_ms=fleet.picture.at_ms, fresh_tokens=fresh)
        return Wait(job.lane, ahead, job.model, view.availability, view.reason, left)

    async def _ahead(self, lane: str, entry: str) -> int:
        """Counts the jobs that wait before this entry, PLACES_MAX at most."""
        now = asyncio.get_running_loop().time()
        at, line = self._seen.get(lane, (0.0, []))
        if not at or now - at > PLACES_AGE_S:
            held = set(await held_entries(self._store, lane, limit=PLACES_MAX))
            entries = [w.entry async for w in waiting_entries(self._store, lane, limit=PLACES_MAX)]
            line = [_entry_id(entry) for entry in entries if entry not in held]
            self._seen[lane] = (now, line)
        return bisect.bisect_left(line, _entry_id(entry))


def _entry_id(entry: str) -> tuple[int, int]:
    ms, _, number = entry.partition("-")
    return int(ms), int(number or 0)
