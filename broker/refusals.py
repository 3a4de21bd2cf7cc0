"""Requests for a generation that were refused, gathered in one api process and written about every second.

A refusal must be cheap, so it makes no trip to Redis of its own: an api that is killed takes at most the last second of
its refusals with it. While Redis is away they wait here; if only its reply was lost, they are counted twice.
"""

import asyncio
import logging
from collections import Counter

from broker import errors
from broker.figures import NOBODY, By
from broker.policies import PolicyBook
from broker.records import JobRecord
from broker.store import Store

log = logging.getLogger("warmlane.refusals")

EVERY_S = 1.0
PAGE = 500
"""Counters that one script adds to."""


class Refusals:
    """What one api process refused and has not written yet. Names come from the policy and the keys: it stays small."""

    def __init__(self, store: Store, book: PolicyBook) -> None:
        self._store = store
        self._book = book
        self._gathered: Counter[tuple[By, str]] = Counter()

    def note(self, refusal: errors.Refused, *, caller: str, job: JobRecord | None) -> None:
        """Counts a refusal under the lane and the model that were asked for, as far as they were read."""
        lane, model = self._asked(job)
        self._gathered[By(caller or NOBODY, lane, model, model), f"refused/{refusal.code}"] += 1

    async def keep(self) -> None:
        """Writes what has gathered, again and again; for the last time when cancelled."""
        try:
            while True:
                await asyncio.sleep(EVERY_S)
                await self.write()
        finally:
            await self.write()

    async def write(self) -> None:
        """Adds what has gathered to the counters of the day."""
        gathered, self._gathered = list(self._gathered.items()), Counter()
        while gathered:
            page, gathered = gathered[:PAGE], gathered[PAGE:]
            words = [word for (by, figure), number in page for word in (by.spelled, figure, number)]
            try:
                await self._store.run(
                    "count_refusals", [], [self._store.now_arg(), self._store.keys.usage_prefix(), *words]
                )
            except errors.BrokerUnavailable as e:
                self._gathered.update(dict(page + gathered))
                return log.debug("event=refusals_wait reason=%s", e)

    def _asked(self, job: JobRecord | None) -> tuple[str, str]:
        """The lane that a request led to, if it was read as far as that and led to any."""
        if job is None or not self._book.present:
            return NOBODY, NOBODY
        try:
            lane = self._book.active.policy.route(
                job.asked,
                caller=job.caller,
                endpoint=job.endpoint,
                prompt_tokens=job.longest or job.tokens,
                priority="batch" if job.priority == "batch" else "interactive",
            )
        except errors.UnknownModel:
            return NOBODY, NOBODY
        return lane.name, lane.model
