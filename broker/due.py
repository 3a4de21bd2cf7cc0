"""What a passed instant means for a job. The scheduler asks for every due job; an api may ask for its own.

`look` reads the job and decides; the script that it calls decides again. Asking twice, or from two processes, is
harmless.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from broker import continuing, dispatch, errors, jobs, lanes
from broker.capabilities import cannot_do
from broker.hosts import Fleet
from broker.lifecycle import HELD, State
from broker.policies import PolicyBook
from broker.policy import Lane
from broker.precedence import Before
from broker.records import JobRecord
from broker.store import Store

log = logging.getLogger("warmlane.due")

RETRY_MS = 1_000
"""A job that cannot move at its instant is tried again after this long at most."""

FRESH_S = 0.1
"""How old the picture of the hosts may be when it keeps a late job waiting."""

Outcome = Literal[
    "gone", "not_due", "promoted", "waits", "full", "expired", "abandoned", "recovered", "lost", "started"
]


@dataclass(frozen=True)
class Looked:
    """What `look` found or did: the outcome, the lane that had no room, how late it came."""

    outcome: Outcome
    lane: str = ""
    late_ms: int = 0


class Due:
    """Settles jobs whose instant has come."""

    def __init__(self, store: Store, book: PolicyBook, fleet: Fleet) -> None:
        self._store = store
        self._book = book
        self._fleet = fleet

    async def next(self, *, limit: int, but: Collection[str] = ()) -> tuple[list[str], int | None]:
        """Gives the jobs that are due now, oldest first, and the ms until the next one (None = none waits).

        `but` leaves out jobs that were looked at a moment ago and could not be settled yet: they must not stand in
        front of the others.
        """
        store = self._store
        now = await store.now_ms()
        skipped = len(but)
        due = await store.command("ZRANGEBYSCORE", store.keys.due, "-inf", now, "LIMIT", 0, limit + skipped)
        found = [job for job in (d.decode() for d in due) if job not in but][:limit]
        if found:
            return found, 0
        later = await store.command("ZRANGEBYSCORE", store.keys.due, f"({now}", "+inf", "WITHSCORES", "LIMIT", 0, 1)
        if not later:
            return [], None
        score = later[0][1] if isinstance(later[0], list | tuple) else later[1]
        return [], max(0, int(float(score)) - now)

    async def look(self, job_id: str, *, hasten: bool = False, before: Before | None = None) -> Looked:
        """Settles one job. `hasten` = its model cannot serve it in time: promote before the deadline if that helps.
        `before` = who goes before it, where the caller knows; else it counts as the last."""
        try:
            return await self._look(job_id, hasten=hasten, before=before)
        except (errors.Moved, errors.StaleAttempt, errors.AlreadyEnded, errors.NotDue, errors.StalePolicy) as e:
            if isinstance(e, errors.StalePolicy):
                await self._book.catch_up()
            return Looked("not_due")
        except errors.BadTransition as e:
            # what `look` read was true then: a worker or another scheduler has moved the job since
            log.debug("event=look_raced job=%s reason=%s", job_id, e)
            return Looked("not_due")
        except errors.NoSuchJob:
            await self._store.command("ZREM", self._store.keys.due, job_id)
            return Looked("gone")

    async def _look(self, job_id: str, *, hasten: bool, before: Before | None) -> Looked:
        store = self._store
        job = await jobs.read(store, job_id)
        now = await store.now_ms()
        if not job.live:
            await store.command("ZREM", store.keys.due, job_id)
            return Looked("gone")
        if 0 < job.abandon_at <= now and (self._leases_count() or await self._saw_all_leave(job, now)):
            await jobs.cancel(store, job_id, message="its client went away", only="abandoned")
            return Looked("abandoned", late_ms=now - job.abandon_at)
        if job.state in HELD:
            return await self._held(job, now)
        if job.continue_by:
            return await self._half_told(job, now)
        if job.give_up_at <= now:
            await lanes.expire(store, job, self._reason(job))
            return Looked("expired", late_ms=now - job.give_up_at)
        if job.state is State.SCHEDULED:
            return await self._scheduled(job, now)
        if hasten or 0 < job.promote_at <= now:
            return await self._promote(job, now, before=before)
        return Looked("not_due")

    async def _held(self, job: JobRecord, now: int) -> Looked:
        if job.lease_until > now:
            return Looked("not_due")
        if not self._leases_count():
            return Looked("not_due")
        active = self._book.active
        within_ms = continuing.within_ms(active, job) if job.seen else None
        go_on = await continuing.judge(self._store, job, within_ms=within_ms)
        again = await lanes.recover(self._store, job, max_losses=active.policy.max_losses, go_on=go_on)
        return Looked("recovered" if again else "lost", late_ms=now - job.lease_until)

    async def _half_told(self, job: JobRecord, now: int) -> Looked:
        """A part of its answer is told and it waits to be gone on from: it stays with its model, and not for long."""
        if job.continue_by > now:
            return Looked("not_due")
        words = f"the answer broke off, and {job.model} could not go on with it in time"
        await lanes.expire(self._store, job, errors.WorkerLost(words))
        return Looked("expired", late_ms=now - job.continue_by)

    def _leases_count(self) -> bool:
        """Whether leases may be judged: when Redis or we just came back, nobody has had a chance to renew yet."""
        return self._store.clock is not None or self._store.answering_s * 1000 >= lanes.JOB_LEASE_MS

    async def _saw_all_leave(self, job: JobRecord, now: int) -> bool:
        """Whether its last reader left, rather than fell silent, and did so while we were connected. No lease can be
        renewed then, and Redis has not been away since: it has forgotten no reader who came after that."""
        connected_at = now - self._store.answering_s * 1000
        if job.abandon_at - job.grace_ms < connected_at:
            return False
        return not await self._store.command("EXISTS", self._store.keys.readers(job.id))

    async def _scheduled(self, job: JobRecord, now: int) -> Looked:
        if job.not_before > now:
            return Looked("not_due")
        if self._book.active.lane(job.lane) is None:
            await self._book.reload()  # it may have come back, and nobody here has heard of it
        lane = self._book.active.lane(job.lane)
        if lane is None:
            words = f"lane {job.lane} was removed from the policy before the job could start"
            await lanes.expire(self._store, job, errors.ModelUnavailable(words), early=True)
            return Looked("expired", late_ms=now - job.not_before)
        try:
            await lanes.release_due(self._store, self._book.active, self._fleet, job, lane)
        except (errors.LaneFull, errors.CallerShare):
            await lanes.postpone(self._store, job, after_ms=RETRY_MS)
            return Looked("full", lane=job.lane)
        except errors.CallerLimit:
            await lanes.postpone(self._store, job, after_ms=RETRY_MS)
            return Looked("waits")
        return Looked("started", late_ms=now - job.not_before)

    async def _promote(self, job: JobRecord, now: int, *, before: Before | None) -> Looked:
        active = self._book.active
        here, to = active.lane(job.lane), None
        if here is not None and here.fallback:
            to = active.policy.lane(here.fallback)
        overdue = 0 < job.promote_at <= now
        if here is None or to is None or not self._may_enter(job, to):
            return await self._wait(job, overdue=overdue)
        if not here.retiring and not self._helps(job, here, to, before=before, overdue=overdue, now=now):
            # what it decided by may be half a second old: a job that is late deserves a fresh look
            fresh = overdue and await self._fleet.look_again(older_than_s=FRESH_S)
            if not fresh or not self._helps(job, here, to, before=before, overdue=overdue, now=now):
                return await self._wait(job, overdue=overdue)
        late = now - job.promote_at if overdue else 0
        try:
            await lanes.promote(self._store, active, self._fleet, job, to, late_ms=late)
        except errors.LaneFull:
            waits = await self._wait(job, overdue=overdue)
            return Looked("full", lane=to.name) if waits.outcome == "waits" else waits
        except errors.DowngradesCapped:  # it waits on, until it gives up or others of its model are served by it
            return await self._wait(job, overdue=overdue)
        self._fleet.moved(here.name, to.name)
        return Looked("promoted", lane=to.name, late_ms=late)

    async def _wait(self, job: JobRecord, *, overdue: bool) -> Looked:
        """Leaves the job where it is; only one whose deadline has passed needs another instant to be looked at. Where
        its model does not load, and is not even tried again before it gives up, it is told so now."""
        view = self._fleet.view(job.lane)
        if view.aside_until >= job.give_up_at:
            words = f"{job.model} does not load, and is not tried again in time: {view.reason}"
            await lanes.expire(self._store, job, errors.ColdStartDeadline(words), early=True)
            return Looked("expired")
        if overdue:
            await lanes.postpone(self._store, job, after_ms=RETRY_MS)
        return Looked("waits")

    def _helps(self, job: JobRecord, here: Lane, to: Lane, *, before: Before | None, overdue: bool, now: int) -> bool:
        batch = job.priority == "batch"
        before = before or self._fleet.last_in(here, batch=batch, inside=True, overdue=overdue)
        mine = self._predict(job, here, before, now)
        theirs = self._predict(job, to, self._fleet.last_in(to, batch=batch), now)
        return dispatch.promotion_helps(mine, theirs, there_budget_ms=to.cold_start_budget_ms, overdue=overdue)

    def _predict(self, job: JobRecord, lane: Lane, before: Before, now: int) -> float | None:
        return dispatch.first_token_in_ms(
            self._fleet.view(lane.name),
            ahead=before.ahead,
            batch_ahead=before.batch_ahead,
            now_ms=now,
            fresh_tokens=self._fleet.fresh_tokens(lane.model, session=job.session, tokens=job.tokens),
        )

    def _may_enter(self, job: JobRecord, lane: Lane) -> bool:
        """Whether the model can do the job, as admission asks too. No promotion leads to a remote model: whoever
        allowed a request to leave did not see that this one would. The script asks for that once more."""
        model = self._book.active.model(lane.model)
        if model is None or lane.trust == "remote":
            return False
        return cannot_do(job, lane.model, model) is None

    def _reason(self, job: JobRecord) -> errors.JobEnded:
        waited_s = (job.give_up_at - job.submitted_at) / 1000
        view = self._fleet.view(job.lane)
        if view.availability in ("warm", "degraded"):
            return errors.JobExpired(f"no slot of {job.model} was free within {waited_s:.0f} s")
        why = f": {view.reason}" if view.reason else ""
        return errors.ColdStartDeadline(f"{job.model} was not warm within {waited_s:.0f} s{why}")
