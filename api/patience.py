"""How long a client's command goes on while the gateway is away or takes nothing: to a limit that has a name."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar

from api.client import REMEDY, gateway_url
from api.exit_codes import BUSY, UNREACHABLE, Failed
from api.jobs_client import POLL_S, Away, Busy, JobsClient
from broker.lifecycle import ENDED

AWAY_S_MAX: Final = 900.0
"""How long a gateway may be away, or take nothing, before a command gives up, where it does not say otherwise."""

PAUSE_S_MIN, PAUSE_S_MAX = 0.5, 15.0
"""Between two tries at a gateway that is away: doubled each time, with jitter, so that many do not come at once."""

T = TypeVar("T")


class GaveUp(Failed):
    """Patience is over."""


class Patience:
    """Counts from the last good answer, to whichever call: while others of a run get on, nothing is lost."""

    def __init__(
        self,
        limit_s: float = AWAY_S_MAX,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.waits_for = ""
        """Why the last call that failed has to wait, "" once one was answered."""
        self._limit_s = limit_s
        self._clock, self._sleep = clock, sleep
        self._answered_at = clock()

    async def answered(self, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call until it is answered; raises GaveUp, and what else the call raises."""
        tries = 0
        while True:
            try:
                answer = await call()
            except (Away, Busy) as why:
                await self.pause(why, tries)
                tries += 1
            else:
                self.progress()
                return answer

    async def until_ended(self, jobs: JobsClient, job: dict[str, Any]) -> dict[str, Any]:
        """Looks at a job until it has ended; gives it as it is then."""
        while job["state"] not in ENDED:
            looked_at = self._clock()
            job = await self.answered(partial(jobs.look, job["id"], wait_s=POLL_S))
            if job["state"] not in ENDED and self._clock() - looked_at < PAUSE_S_MIN:
                await self._sleep(PAUSE_S_MIN)  # it did not wait for us
        return job

    def progress(self) -> None:
        """Notes that the gateway did what it was asked."""
        self._answered_at, self.waits_for = self._clock(), ""

    async def pause(self, why: Away | Busy, tries: int) -> None:
        """Waits before the next try; raises GaveUp where that would be too late."""
        length_s = why.retry_after_s if isinstance(why, Busy) else min(PAUSE_S_MAX, PAUSE_S_MIN * 2 ** min(tries, 9))
        length_s *= 1 + random.random() / 4
        if self._clock() + length_s - self._answered_at > self._limit_s:
            raise self._gave_up(why)
        self.waits_for = str(why)
        await self._sleep(length_s)

    def _gave_up(self, why: Away | Busy) -> GaveUp:
        if isinstance(why, Busy):
            return GaveUp(f"The gateway takes nothing now ({why}): try again in {why.retry_after_s:.0f} s.", BUSY)
        return GaveUp(f"The gateway at {gateway_url()} can't be reached ({why}): {REMEDY}.", UNREACHABLE)
