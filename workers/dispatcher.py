"""Gives free slots of warm models to waiting jobs, and runs the attempts."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from broker import continuing, dispatch, errors, hosts, jobs, lanes, traces
from broker.hosts import Fleet
from broker.policies import Active, PolicyBook
from broker.records import Claimed, JobRecord, ModelFacts, Waiting
from broker.store import Store
from broker.trust import door
from broker.trust.secrets import CannotScan
from workers.attempt import Attempt, Ended, Limits
from workers.learned import definition_of
from workers.picture import LanePicture
from workers.put_back import PutBacks
from workers.rates import Answer, Rates
from workers.shares import Charge, Shares
from workers.stream_client import StreamClient
from workers.swaps import Swaps
from workers.waker import Waker

log = logging.getLogger("warmlane.dispatcher")

RENEW_EVERY_S = 3.0
RETRY_PAUSE_S = 0.2
FULL_PAUSE_S = 1.0
"""How long nothing is claimed after Redis was found full: the jobs wait in their lanes."""

HELD_BACK_S = 0.25
"""How long the jobs of a caller are passed over that runs as many as it may, unless one of them ends here."""


class Dispatcher:
    """Owns the attempts of one host."""

    def __init__(
        self,
        store: Store,
        book: PolicyBook,
        fleet: Fleet,
        picture: LanePicture,
        wakers: Mapping[str, Waker],
        swaps: Swaps,
        *,
        host: str,
        boot: str,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.attempts: dict[
            tuple[str, int], Attempt
        ] = {}  # by job and attempt: a job may come back before its last ends
        self.claiming = 0
        self.stopped = False
        self._store = store
        self._book = book
        self._fleet = fleet
        self._picture = picture
        self._wakers = wakers
        self._swaps = swaps
        self._host = host
        self._boot = boot
        self._tasks = tasks
        self._client = StreamClient()
        self._interactive_at: dict[str, int] = {}
        self._rates: dict[str, Rates] = {}
        self._unlearned: set[str] = set()
        self._told_early: set[tuple[str, int]] = set()
        self._shares = Shares(picture)
        self._put_backs = PutBacks(
            store,
            self.attempts,
            tasks=tasks,
            now_ms=fleet.now_ms,
            again=lambda: self.dispatch(),
            busy=self._hold_back,
        )
        self._full_until = 0.0
        self._held_back: dict[str, float] = {}  # callers that run as many jobs as they may -> until when
        self._renew_now = asyncio.Event()
        self._end: errors.BrokerError | None = None
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether any job is held or about to be."""
        return bool(self.attempts) or self.claiming > 0

    def dispatch(self) -> None:
        """Starts an attempt for every free slot that a job may have. Called whenever a job, slot or state is new."""
        if self.stopped or not self._book.present or self._book.unreadable is not None:
            return  # a claim by another policy than the active one would be refused
        active = self._book.active
        self._swaps.look()
        if self._loop.time() < self._full_until:
            self._dispatch_at(self._full_until)
            return
        for name, waker in self._wakers.items():
            if waker.state == "cold" and self._picture.anyone_waits(active.lanes_of(name)):
                waker.kick()  # its wake need not wait for the next look
            if not waker.slots.free and self._picture.anyone_waits(active.lanes_of(name)):
                waker.upkeep.give_way()
            while waker.claimable:
                job = self._choose(name, waker, active)
                if job is None:
                    self._look_again(waker, active)
                    break
                self._picture.spend(job)
                self._swaps.started(name)
                session = "" if waker.model.embeddings else job.session  # no vector is made of the one before
                new_session = not waker.slots.knows(session)
                slot = waker.slots.take(
                    _user(job),
                    session=session,
                    contended=self._picture.anyone_waits(active.lanes_of(name)),
                    now_s=self._loop.time(),
                )
                charge = self._shares.charge(name, job, cached=waker.slots.cached_for(_user(job)))
                self.claiming += 1
                serving = self._tasks.create_task(
                    self._serve(waker, job, slot, charge, new_session=new_session), name=f"attempt {job.job}"
                )
                self._serving.add(serving)
                serving.add_done_callback(self._serving.discard)
                self._swaps.look()  # that may have been the last of its batch
            if waker.willing and not waker.slots.free:
                self._make_way(name, waker, active)

    def yielding(self, name: str) -> int:
        """How many slots of a model batch work holds that is put back for people."""
        return self._put_backs.count(name)

    def kept(self, name: str) -> int:
        """How many free slots of a model batch work may not have now."""
        waker, now_ms = self._wakers[name], self._fleet.now_ms()
        if waker.going:
            return 0
        return dispatch.kept_for_people(
            total=waker.slots.total,
            now_ms=now_ms,
            interactive_at=self._interactive_at.get(name, 0),
            active=waker.warmth.active(now_ms),
        )

    def stop_attempts(self, why: errors.BrokerError) -> None:
        """Ends every attempt, those of claims under way too: unseen jobs go back to their lanes, seen ones are told
        `why`."""
        self._end = why
        for attempt in list(self.attempts.values()):
            attempt.stop(why)

    def told(self, message: bytes) -> None:
        """Hears `cancel <job> <attempt>` and `stop <job> <attempt>`: the job is not ours any more."""
        word, job_id, number = message.decode().split(" ")
        attempt = self.attempts.get((job_id, int(number)))
        if attempt is not None:
            log.info("event=told job=%s attempt=%s word=%s", job_id, number, word)
            attempt.stop()
        elif self.claiming:  # its claim's reply is still on the way
            self._told_early.add((job_id, int(number)))

    def renew_now(self) -> None:
        """Asks for every attempt whether its job is still ours: while nobody listened, a cancel may have been said."""
        self._renew_now.set()

    async def keep_renewing(self) -> None:
        """Proves every RENEW_EVERY_S that the jobs are held; an attempt that lost its job is stopped."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_EVERY_S):
                    await self._renew_now.wait()
            self._renew_now.clear()
            await asyncio.gather(*(self._renew(attempt) for attempt in list(self.attempts.values())))

    async def tell_learned(self) -> None:
        """Writes down how long jobs held their slots lately, and how fast they were read and written."""
        for name in list(self._unlearned):
            await hosts.learn(self._store, name, **self._rates[name].told(self._facts(name)))
            self._unlearned.discard(name)

    def abandon(self) -> None:
        """Drops the attempts that cannot end, because Redis is away: their leases will tell."""
        for serving in self._serving:
            serving.cancel()

    def close(self) -> None:
        """Closes idle connections to the runtimes."""
        if self._again is not None:
            self._again.cancel()
        self._put_backs.close()
        self._client.close()

    def _choose(self, name: str, waker: Waker, active: Active) -> Waiting | None:
        now_ms = self._fleet.now_ms()
        waiting = self._eligible(name, waker, active)
        return dispatch.choose(
            waiting,
            free=waker.slots.free,
            total=waker.slots.total,
            now_ms=now_ms,
            service_ms=self._rates[name].service_ms if name in self._rates else 0.0,
            interactive_at=self._interactive_at.get(name, 0),
            active=waker.warmth.active(now_ms),
            cached=waker.slots.ready(),
            open_slots=waker.slots.open(self._loop.time()),
            elsewhere=self._fleet.picture.sessions_elsewhere(name, self._host),
            levels=self._shares.levels(name, active.lanes_of(name), but=self._held_back.keys()),
        )

    def _eligible(self, name: str, waker: Waker, active: Active) -> Iterable[Waiting]:
        """The jobs that wait for a model and may have a slot of it now."""
        waiting: Iterable[Waiting] = self._picture.waiting(active.lanes_of(name))
        if self._held_back:
            now = self._loop.time()
            self._held_back = {caller: until for caller, until in self._held_back.items() if until > now}
            waiting = (w for w in waiting if w.caller not in self._held_back)
        return waiting if waker.state == "warm" else (w for w in waiting if _takes_degraded(w, active))

    def _hold_back(self, caller: str) -> None:
        self._held_back[caller] = self._loop.time() + HELD_BACK_S

    def _make_way(self, name: str, waker: Waker, active: Active) -> None:
        if not self._put_backs.count(name):
            return
        rates = self._rates_of(waker)
        self._put_backs.look(
            waker,
            self._eligible(name, waker, active),
            active,
            first_token_ms=waker.readiness.first_token_ewma_ms,
            prefill_tps=rates.prefill_tps,
        )

    def _look_again(self, waker: Waker, active: Active) -> None:
        """Jobs wait although a slot is free: it is kept for its session, or they are left to another host for a
        moment. When that is over, nothing else would tell."""
        if self._again is not None or not self._picture.anyone_waits(active.lanes_of(waker.name)):
            return
        now = self._loop.time()
        at = waker.slots.next_open_s(now)
        if self._held_back:
            at = min([*self._held_back.values(), *([at] if at is not None else [])])
        if at is None and self._fleet.picture.sessions_elsewhere(waker.name, self._host):
            at = now + dispatch.AFFINITY_MS / 1000
        if at is not None:
            self._dispatch_at(at)

    def _dispatch_at(self, at: float) -> None:
        if self._again is None:
            self._again = self._loop.call_at(at + 0.001, self._dispatch_again)

    def _dispatch_again(self) -> None:
        self._again = None
        self.dispatch()

    async def _serve(self, waker: Waker, job: Waiting, slot: int, charge: Charge, *, new_session: bool) -> None:
        clean, tokens, estimate, served, keep = True, 0, 0, False, True
        try:
            try:
                attempt = await self._claim(waker, job, slot)
            finally:
                self.claiming -= 1
            if attempt is None:
                charge.give_back()
                return
            served = True
            if self._end is not None:
                attempt.stop(self._end)
            held = job.job, attempt.held.attempt
            if held in self._told_early:
                attempt.stop()
            if not self.claiming:
                self._told_early.clear()
            self.attempts[held] = attempt
            try:
                ended = await attempt.run()
            finally:
                del self.attempts[held]
                put_back = self._put_backs.over(held)
            if traces.told(attempt.job):
                self._tasks.create_task(self._trace(attempt.job, ended), name=f"trace {job.job}")
            clean, tokens = ended.clean, _cached_tokens(ended)
            estimate = job.tokens + (ended.usage or {}).get("completion_tokens", 0) if tokens else 0
            self._learn(waker, ended, new_session=new_session)
            if put_back or ended.outcome == "released":
                charge.give_back()
            else:
                charge.settle(ended.usage)
                if ended.outcome == "stopped" and attempt.delivered:
                    self._tasks.create_task(self._spend(attempt, round(charge.tokens)), name=f"spend {job.job}")
            keep = self._shares.may_wait(waker.name, job, self._book.active.lanes_of(waker.name))
        finally:
            if served:
                self._held_back.pop(job.caller, None)
            waker.released(_user(job), clean=clean, tokens=tokens, estimate=estimate, served=served, keep=keep)
            self.dispatch()

    async def _trace(self, job: JobRecord, ended: Ended) -> None:
        times = {"first_token_ms": ended.first_token_ms, "total_ms": ended.total_ms}
        await jobs.tell_attempt(self._store, job, ended.outcome, error=ended.code, **times)

    async def _spend(self, attempt: Attempt, tokens: int) -> None:
        """Charges the caller's day for an answer that it cancelled, or hung up on."""
        try:
            await jobs.spend_cancelled(self._store, attempt.held, tokens)
        except errors.BrokerUnavailable as e:
            log.debug("event=spend_lost job=%s reason=%s", attempt.held.job_id, e)

    async def _claim(self, waker: Waker, job: Waiting, slot: int) -> Attempt | None:
        """Takes the job; None when the race was lost or Redis is away."""
        active = self._book.active
        try:
            # the runtime that it holds now: the slot that we took keeps it from another
            claimed = await lanes.claim(
                self._store, active, job, host=self._host, boot=self._boot, runtime=waker.model,
                woke_at=waker.woken_ms[1],
            )  # fmt: skip
        except errors.Unjudged:
            await self._judge(active, job)
            return None
        except errors.StalePolicy:
            self._picture.unspend(job)
            await self._reload()
            return None
        except errors.CallerBusy:
            self._hold_back(job.caller)
            self._picture.unspend(job)
            return None
        except errors.RedisFull as e:
            self._wait_for_room(e)
            self._picture.unspend(job)
            return None
        except errors.BrokerUnavailable as e:
            log.warning("event=claim_retry job=%s reason=%s", job.job, e)
            unheard = await self._claimed_unheard(job)
            if unheard is None:
                return None
            claimed = unheard
        except (errors.Lost, errors.NoSuchJob, errors.BadTransition, errors.TrustZoneRefused) as e:
            log.debug("event=claim_lost job=%s reason=%s", job.job, e)
            return None
        traces.claimed(claimed.record, waking_at=waker.woken_ms[0])
        if waker.model.trust == "remote":
            leaving = await self._leaving(active, claimed)
            if leaving is None:
                return None
            claimed = leaving
        if job.priority != "batch":
            self._interactive_at[waker.name] = claimed.record.claimed_at
        model, max_losses = waker.model, active.policy.max_losses
        limits = Limits(
            model.first_token_timeout_ms,
            model.stall_timeout_ms,
            max_losses,
            go_on_within_ms=continuing.within_ms(active, claimed.record),
        )
        served_by = f"{waker.name}@{self._host}"
        endpoint = waker.runtime.endpoint()
        return Attempt(
            self._store,
            self._client,
            claimed,
            endpoint,
            limits,
            served_by=served_by,
            traceparent=traces.onward(claimed.record) if model.trust == "local" else "",
            slot=slot,
            on_refusal=waker.refused,
        )

    async def _judge(self, active: Active, job: Waiting) -> None:
        """Judges a job by the rules in force, which came after its last verdict; then it may be claimed, or stays."""
        lane = active.lane(job.lane)
        try:
            if lane is not None and await door.judge_anew(
                self._store, active, await jobs.read(self._store, job.job), lane
            ):
                self._picture.unspend(job)
            else:
                log.info("event=stays job=%s lane=%s reason=it does not pass the rules in force", job.job, job.lane)
        except errors.StalePolicy:
            self._picture.unspend(job)
            await self._reload()
        except (errors.Lost, errors.NoSuchJob, errors.BrokerUnavailable, CannotScan) as e:
            log.info("event=judge_later job=%s reason=%s", job.job, e)  # the next look at the lane brings it back

    async def _leaving(self, active: Active, claimed: Claimed) -> Claimed | None:
        """Puts the copy that leaves in the place of the body; None where that is not what was judged."""
        record = claimed.record
        try:
            copy = await door.copy_that_leaves(claimed.body, active.policy.remote, record.leaves)
        except errors.TrustZoneRefused as e:
            log.error("event=stays job=%s attempt=%d reason=%s", record.id, claimed.attempt, e)
            held = jobs.Holding(record.id, record.lane, claimed.attempt, record.boot)
            try:
                await jobs.end(self._store, held, "fail", error=e)
                await jobs.tell_attempt(self._store, record, "failed", first_token_ms=0, total_ms=0, error=e.code)
            except (errors.Lost, errors.NoSuchJob, errors.BrokerUnavailable) as lost:
                log.info("event=stop job=%s attempt=%d reason=%s", record.id, claimed.attempt, lost)
            return None
        return replace(claimed, body=copy)

    async def _claimed_unheard(self, job: Waiting) -> Claimed | None:
        """Waits for Redis and asks whether the claim was made, only its reply lost: nobody else would start the job
        before our lease on it ends. None = it was not."""
        while not self.stopped:
            await asyncio.sleep(RETRY_PAUSE_S)
            try:
                claimed = await lanes.claimed(self._store, job, host=self._host, boot=self._boot)
            except errors.BrokerUnavailable:
                continue
            if claimed is None:
                self._picture.unspend(job)
            return claimed
        return None

    def _wait_for_room(self, full: errors.RedisFull) -> None:
        now = self._loop.time()
        if now - self._full_until > FULL_PAUSE_S:  # else it was told
            log.warning("event=claims_wait reason=%s", full)
        self._full_until = now + FULL_PAUSE_S

    async def _reload(self) -> None:
        try:
            await self._book.catch_up()
        except errors.BrokerUnavailable as e:
            log.debug("event=reload_retry reason=%s", e)

    async def _renew(self, attempt: Attempt) -> None:
        try:
            await jobs.renew(self._store, attempt.held, lease_ms=lanes.JOB_LEASE_MS)
        except (errors.Lost, errors.NoSuchJob) as e:
            attempt.stop(e)
        except errors.BrokerUnavailable as e:
            log.debug("event=renew_retry job=%s reason=%s", attempt.held.job_id, e)

    def _learn(self, waker: Waker, ended: Ended, *, new_session: bool) -> None:
        if ended.suspect:
            waker.upkeep.suspect()
        if ended.outcome != "done" or not ended.whole:
            return
        usage = ended.usage or {}
        rates = self._rates_of(waker)
        rates.note(
            Answer(
                usage=usage,
                timings=ended.timings or {},
                first_token_ms=ended.first_token_ms,
                total_ms=ended.total_ms,
                usual_ms=waker.readiness.first_token_ewma_ms,
                new_session=new_session,
            )
        )
        self._unlearned.add(waker.name)
        waker.upkeep.note_first_token(
            ended.first_token_ms,
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_tokens=usage.get("cached_tokens", 0),
            prefill_tps=rates.prefill_tps,
            budget_ms=waker.model.first_token_budget_ms,
        )

    def _rates_of(self, waker: Waker) -> Rates:
        definition, rates = definition_of(waker.model), self._rates.get(waker.name)
        if rates is None or rates.rates_of != definition:
            rates = self._rates[waker.name] = Rates.known(self._facts(waker.name), definition)
        return rates

    def _facts(self, name: str) -> ModelFacts:
        return self._fleet.picture.facts.get(name, ModelFacts())


def _cached_tokens(ended: Ended) -> int:
    """What the slot's cache holds after an answer: its prompt and what was made. 0 = not known."""
    usage = ended.usage or {}
    return usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)


def _user(job: Waiting) -> str:
    return f"{job.job} {job.entry}"


def _takes_degraded(job: Waiting, active: Active) -> bool:
    """Batch may use a slow model; a person's job too where there is nothing else for it."""
    lane = active.lane(job.lane)
    return job.priority == "batch" or lane is None or lane.fallback is None
