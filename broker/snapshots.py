"""The numbered snapshots of one process: what status, the page and the metrics show.

Whoever asks while one is being taken shares the next one: it is never older than the question, equal numbers are equal
figures, and many who look cost no more than a few.
"""

import asyncio
import json
import math
from dataclasses import replace

from broker import usage
from broker.figures import Day
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.status import Snapshot, compose
from broker.store import Store


class Snapshots:
    """Takes snapshots, one at a time, and keeps the last."""

    def __init__(self, store: Store, book: PolicyBook, fleet: Fleet) -> None:
        self._store = store
        self._book = book
        self._fleet = fleet
        self._last = Snapshot()
        self._day: Day = ()
        self._taken_s = self._counted_s = -math.inf  # on the loop's clock
        self._taking = asyncio.Lock()
        self._written_number = 0
        self._written: dict[str | None, bytes] = {}  # of that number, by viewer

    async def latest(self, *, older_than_s: float = 0.0, counted_before_s: float = 0.0) -> Snapshot:
        """Gives a snapshot that was not older than this when it was asked for; its counters of the day may be older by
        `counted_before_s`.

        Raises ModelUnavailable where no policy has been applied yet, BrokerUnavailable.
        """
        loop = asyncio.get_running_loop()
        since_s = loop.time() - older_than_s
        async with self._taking:
            if self._taken_s < since_s or self._counted_s < since_s - counted_before_s:
                began_s = loop.time()
                if self._counted_s < since_s - counted_before_s:
                    self._day = await usage.today(self._store)
                    self._counted_s = began_s
                self._last = await self._take()
                self._taken_s = began_s
            return self._last

    async def as_event(self, viewer: str | None, *, older_than_s: float, counted_before_s: float) -> bytes:
        """The latest one as a server-sent event, written once for all who see the same: `viewer` as for `as_json`."""
        shown = await self.latest(older_than_s=older_than_s, counted_before_s=counted_before_s)
        if self._written_number != shown.number:
            self._written_number, self._written = shown.number, {}
        if viewer not in self._written:
            told = json.dumps(shown.as_json(viewer=viewer), separators=(",", ":"))
            self._written[viewer] = f"id: {shown.number}\nevent: snapshot\ndata: {told}\n\n".encode()
        return self._written[viewer]

    async def _take(self) -> Snapshot:
        active = self._book.active
        note = await self._store.full()
        seen = await self._fleet.look_closely(active)
        number = max(seen.moment, self._last.number + 1)  # clocks may be set back
        told = compose(active, self._fleet, seen, self._day, number=number)
        return replace(told, redis_note=note, policy_unread=self._book.unread)
