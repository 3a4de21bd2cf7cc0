"""Puts running batch work back where people would miss their deadline: its slot is theirs, and it starts again later.

The job goes back to its lane first and its attempt is stopped after: whatever the script refuses (it has ended, or its
client has seen a part of the answer, or it was put back often enough) runs on undisturbed.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

from broker import dispatch, errors, jobs
from broker.policies import Active
from broker.records import Waiting
from broker.store import Store
from workers.attempt import Attempt
from workers.model_here import ModelHere

log = logging.getLogger("warmlane.put_back")

Held = tuple[str, int]

LOOK_AGAIN_S = 0.5
"""Where a slot would do nothing for those in need, because their callers run as much as they may, it is looked again
after this long."""


class PutBacks:
    """Makes way for interactive work on one host, one slot for each job that needs one."""

    def __init__(
        self,
        store: Store,
        attempts: Mapping[Held, Attempt],
        *,
        tasks: asyncio.TaskGroup,
        now_ms: Callable[[], int],
        again: Callable[[], None],
        busy: Callable[[str], None],
    ) -> None:
        """`attempts` are those that run, in the order in which they began; `again` has everything looked at anew, and
        `busy` hears of callers that run as many jobs as they may."""
        self._store = store
        self._attempts = attempts
        self._tasks = tasks
        self._now_ms = now_ms
        self._again = again
        self._busy = busy
        self._going: set[Held] = set()  # being put back, or stopped and not over yet
        self._refused: set[Held] = set()
        self._timer: asyncio.TimerHandle | None = None

    def look(
        self, model: ModelHere, waiting: Iterable[Waiting], active: Active, *, first_token_ms: float, prefill_tps: float
    ) -> None:
        """Makes way on a model that has no free slot, if one of these jobs is in need; else comes back when one is."""
        yielding = self._yielding(model.name)
        if not yielding:
            return
        now_ms = self._now_ms()
        lanes = active.lanes()
        need, next_at = dispatch.in_need(
            waiting,
            now_ms=now_ms,
            budgets_ms={name: lane.cold_start_budget_ms for name, lane in lanes.items()},
            first_token_ms=first_token_ms,
            prefill_tps=prefill_tps,
        )
        under_way = len(model.slots.settling) + self._under_way(model.name)
        for held, job in zip(yielding, need[under_way:], strict=False):
            self._going.add(held)
            self._tasks.create_task(self._put_back(held, self._attempts[held], job), name=f"put back {held[0]}")
        if next_at is not None:
            self._look_at(asyncio.get_running_loop().time() + (next_at - now_ms) / 1000)

    def count(self, model: str) -> int:
        """How many slots of a model are held by work that may be put back, or is about to be."""
        return len(self._yielding(model)) + self._under_way(model)

    def over(self, held: Held) -> bool:
        """Notes that an attempt has ended; True if it was put back."""
        self._refused.discard(held)
        was = held in self._going
        self._going.discard(held)
        return was

    def close(self) -> None:
        """Comes back no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _yielding(self, model: str) -> list[Held]:
        """The attempts that may be stopped, the one that began last first: it loses the least."""
        return [
            held
            for held, attempt in reversed(list(self._attempts.items()))
            if attempt.job.priority == "batch"
            and attempt.job.model == model
            and attempt.job.put_backs < jobs.PUT_BACK_MAX
            and not (attempt.job.stream and attempt.job.mode == "sync" and attempt.delivered)
            and held not in self._going
            and held not in self._refused
        ]

    def _under_way(self, model: str) -> int:
        return sum(self._is_of(held, model) for held in self._going)

    def _is_of(self, held: Held, model: str) -> bool:
        attempt = self._attempts.get(held)
        return attempt is not None and attempt.job.model == model

    async def _put_back(self, held: Held, attempt: Attempt, job: Waiting) -> None:
        try:
            if not await jobs.may_run(self._store, job.job):
                self._going.discard(held)
                self._busy(job.caller)
                self._look_at(asyncio.get_running_loop().time() + LOOK_AGAIN_S)
                return self._again()
            await jobs.put_back(self._store, attempt.held)
        except (errors.Lost, errors.NoSuchJob, errors.BadTransition, errors.BrokerUnavailable) as e:
            log.debug("event=not_put_back job=%s attempt=%d reason=%s", *held, e)
            self._going.discard(held)
            if held in self._attempts:
                self._refused.add(held)
            self._again()
            return
        attempt.stop(errors.StaleAttempt("put back for interactive work"))

    def _look_at(self, at_s: float) -> None:
        if self._timer is not None and not self._timer.cancelled():
            if self._timer.when() <= at_s:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at_s + 0.001, self._due)

    def _due(self) -> None:
        self._timer = None
        self._again()
