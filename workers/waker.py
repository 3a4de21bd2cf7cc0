"""One model on this host: whether it is warm, and what it takes to make it so.

    cold → waking → warm ⇄ degraded → unloading → cold;  waking → quarantined after a failed load

Nothing is called warm before it has given a first token to our own probe; no port, no health page counts. A wake holds
the model's wake lock for as long as it goes on, on a connection or a subprocess of ours, so that no client's hang-up
ends it.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from broker import errors, hosts, wake
from broker.operator import UNLOADED_FOR_MS
from broker.policy import Model
from broker.records import Learned, ModelFacts, ModelOnHost
from broker.store import Store
from workers import progress
from workers.attempt import Refusal
from workers.learned import RUNS_BY
from workers.overlap import Overlap
from workers.probes import passive_probe_ms
from workers.quarantine import PER_HOUR, failed_within_hour, pause_ms
from workers.room import Claim, NoRoom
from workers.runtimes import runtime_for
from workers.runtimes.base import LoadFailed, ProbeFailed, Runtime, RuntimeProblem
from workers.slots import Slots
from workers.warmth import Warmth

log = logging.getLogger("warmlane.waker")

LOOK_EVERY_S = 2.0
"""How often a runtime is asked for its state and its busy slots, at most."""

FIRST_SETTLE_LOOK_S = 0.25
STEP_EVERY_S = 0.5
PROBE_IDLE_EVERY_S = 30.0
PROBE_DEGRADED_EVERY_S = 5.0
CACHED_PROMPT_S = 600.0
"""A prompt in a cache that was used within this is worth more than a probe."""

PROBE_PATIENCE = 3.0
"""A probe may take this many first-token budgets before it counts as failed rather than slow."""

PROBE_LEAST_S = 10.0
PROBE_GIVES_WAY_S = 1.0
"""A probe that has a slot for which a user waits ends within this, by itself or by us."""

SLOW_IN_A_ROW = 2
SUSPECT_MEMORY_S = 10.0
SUSPECT_PAUSE_S = 1.0
QUARANTINE_S = 5.0
QUARANTINE_MAX_S = 900.0
UNREACHABLE_MAX_S = 30.0
"""The longest pause where no load was tried, because nobody was there to load it: looking again costs nothing."""

NO_ROOM_PAUSE_S = 5.0
EWMA = 0.3


@dataclass
class Surroundings:
    """What a waker must know beyond its own model, asked for anew at each step."""

    now_ms: Callable[[], Awaitable[int]]
    facts: Callable[[str], ModelFacts]
    look: Callable[[], Awaitable[object]]  # makes the facts and the picture of other hosts fresh
    warm_elsewhere: Callable[[str], bool]
    waited_for: Callable[[str], bool]  # whether jobs wait for the model now
    drained: Callable[[], bool]  # whether an operator has set this host aside
    room_for: Callable[[str, bool], AbstractAsyncContextManager[Claim]]  # raises NoRoom; True = a request waits for it
    occupied: Callable[[str], Awaitable[int]]  # bytes of this host's memory that the model holds, 0 = nobody can tell
    loaded: Callable[[str, float, int], Awaitable[None]]  # learns from a load: ms, bytes
    learned: Callable[[str], Learned]  # what loads on this host have shown
    held_up: Callable[[str], tuple[str, int]]  # whose memory it must wait for ("" = nobody's), until when at least
    learn: Callable[..., Awaitable[None]]
    tell: Callable[[], Awaitable[None]]  # a heartbeat now
    changed: Callable[[], None]
    outdone: Callable[[str], bool] = lambda _model: False  # whether another host has become warm after this one


class Waker:
    """Owns one model's runtime, state and slots."""

    def __init__(
        self, store: Store, name: str, model: Model, *, host: str, boot: str, state_dir: Path, around: Surroundings
    ) -> None:
        self.name = name
        self.model = model
        self.warmth = Warmth(model)
        self.slots = Slots(model.max_concurrent)
        self.overlap = Overlap(model.max_concurrent)
        self.state = "cold"
        self.reason = ""
        self.since_ms = 0
        self.memory_bytes = 0
        self.first_token_ms = 0.0
        self.first_token_ewma_ms = 0.0
        self.last_load_ms = 0.0
        self.progress = -1.0  # 0..1 of the load that goes on, -1 = nothing is known of it
        self.unfit = ""  # why it cannot fit on this host whatever our other models leave, "" = it can
        self.wanted_model = model  # what the policy says now; taken over when idle
        self.leaving = False
        self.makes_room_for = ""  # the model that gets its memory once it has drained
        self.room_at = 0  # the earliest instant at which it gets the memory that it waits for, 0 = it waits for none
        self.runtime: Runtime = runtime_for(name, model, state_dir=state_dir)
        self._store = store
        self._host = host
        self._boot = boot
        self._state_dir = state_dir
        self._around = around
        self._kick = asyncio.Event()
        self._slow = 0
        self._unreachable = 0
        self._suspected = False
        self._left_behind = False
        self._probing: asyncio.Task[float] | None = None
        self._gives_way: asyncio.TimerHandle | None = None
        self._aside = ""
        self._busy_asked = 0.0
        self._no_room_until = 0.0
        self._loop = asyncio.get_running_loop()
        self._suspected_at = -SUSPECT_MEMORY_S
        self._warm_since = self._idle_since = self._asked = self._probed = 0.0
        self._ask_at = self._loop.time()

    @property
    def claimable(self) -> bool:
        """Whether jobs may be claimed for it now."""
        resident = self.state in ("warm", "degraded") and not self._suspected
        leads_elsewhere = self.wanted_model.trust != self.model.trust  # it waits for the runtime that the policy means
        going = self.leaving or leads_elsewhere or bool(self.makes_room_for)
        return resident and not going and self.slots.free > 0

    @property
    def idle_ms(self) -> float:
        """For how long nothing ran; 0 while busy."""
        return (self._loop.time() - self._idle_since) * 1000 if self.slots.idle else 0.0

    @property
    def stayed_ms(self) -> float:
        """For how long it has been resident."""
        return (self._loop.time() - self._warm_since) * 1000

    def kick(self) -> None:
        """Has the state looked at now."""
        self._kick.set()

    def give_way(self) -> None:
        """Says that a user waits: a probe that has the slot ends in a moment."""
        if self._probing is not None and self._gives_way is None:
            self._gives_way = self._loop.call_later(PROBE_GIVES_WAY_S, self._probing.cancel)

    def told_anew(self) -> None:
        """Has everybody hear what the host says of it now."""
        self._around.changed()

    def told(self, version: int) -> ModelOnHost:
        """What the host says of it."""
        learned = self._around.learned(self.name)
        return ModelOnHost(
            state=self.state,
            reason=self._told_reason(),
            unfit=bool(self.unfit) and self.state == "cold",
            runtime=self.runtime.kind,
            slots_total=self.slots.taken if self.makes_room_for else self.slots.total,
            slots_used=len(self.slots.using),
            slots_settling=len(self.slots.settling),
            memory_bytes=self.memory_bytes,
            room_at=self.room_at if self.state == "cold" else 0,
            footprint_bytes=learned.footprint_bytes,
            load_ms=learned.load_ms,
            first_token_ms=round(self.first_token_ms, 1),
            first_token_ewma_ms=round(self.first_token_ewma_ms, 1),
            parallel=self.overlap.parallel,
            last_load_ms=round(self.last_load_ms, 1),
            progress=round(self.progress, 2),
            manageable=self.runtime.manageable,
            sessions=json.dumps(cached) if (cached := self.slots.told()) else "",
            prompts=json.dumps(prompts) if (prompts := self.slots.estimates()) else "",
            since=self.since_ms,
            version=version,
        )

    def _told_reason(self) -> str:
        if self.makes_room_for:
            return f"makes room for {self.makes_room_for}"
        return self.unfit if self.unfit and self.state == "cold" else self.reason

    async def run(self) -> None:
        """Looks after the model until cancelled."""
        try:
            while True:
                try:
                    await self._step()
                except errors.BrokerUnavailable as e:
                    log.debug("event=waker_retry model=%s reason=%s", self.name, e)
                except Exception as e:
                    # a runtime that answers what nobody foresaw must not take the other models' streams with it
                    log.exception("event=waker_broken model=%s", self.name)
                    await self._broken(e)
                    await asyncio.sleep(STEP_EVERY_S)  # whatever it kicks: no more often than a step
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    break  # a load failed in the same moment, and the task group of the load raised only that
                self._kick.clear()
                try:
                    async with asyncio.timeout(min(STEP_EVERY_S, max(0.01, self._ask_at - self._loop.time()))):
                        await self._kick.wait()
                except TimeoutError:
                    continue
        finally:
            await asyncio.shield(self.runtime.close())

    async def _broken(self, error: Exception) -> None:
        """Sets a model aside for a while whose runtime we do not understand; what it holds in memory goes later."""
        self._left_behind = True
        cause = _first(error) if isinstance(error, BaseExceptionGroup) else error
        try:
            await self._quarantine(f"its runtime is not understood: {type(cause).__name__}: {cause}")
        except errors.BrokerUnavailable as e:
            log.debug("event=waker_retry model=%s reason=%s", self.name, e)

    async def _clear_up(self) -> None:
        """Unloads what a model that we did not understand left in memory: nothing else would."""
        self._left_behind = False
        try:
            await self.runtime.unload()
        except Exception:
            log.exception("event=unload_failed model=%s", self.name)
        self.memory_bytes = 0
        self.slots.restarted()
        self._around.changed()

    async def unload(self, reason: str) -> None:
        """Takes the model out of memory; the caller has seen that it is idle. From here on it is not claimable."""
        try:
            await self._become("unloading", reason)
            await self.runtime.unload()
        except RuntimeProblem as e:
            log.warning("event=unload_failed model=%s reason=%s", self.name, e)
        finally:
            self.memory_bytes = 0
            self.makes_room_for = ""
            self.slots.restarted()
            await self._become("cold", reason)

    async def unload_by_hand(self) -> None:
        """Unloads it because an operator says so, if it is idle; keep-warm leaves it alone for a while then."""
        if self.state not in ("warm", "degraded") or not self.slots.idle or not self.runtime.manageable:
            return
        until = await self._around.now_ms() + UNLOADED_FOR_MS
        await self._around.learn(self.name, unloaded_until=until, wanted_until=0)
        if self.state in ("warm", "degraded") and self.slots.idle:  # a job may have been claimed while we wrote
            await self.unload("unloaded by hand")
        else:
            await self._around.learn(self.name, unloaded_until=0)

    def note_first_token(self, ms: float, *, prompt_tokens: int, cached_tokens: int, prefill_tps: float = 0.0) -> None:
        """Counts a real first token as a probe, if reading its prompt cannot have been what took long."""
        probe_ms = passive_probe_ms(
            ms, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, prefill_tps=prefill_tps
        )
        if probe_ms is not None:
            self._measured(probe_ms)

    def refused(self, refusal: Refusal) -> None:
        """Hears that the runtime wants none of our requests: none is claimed for it until its pause is over, or, where
        only a person can mend it, it is quarantined."""
        if refusal.reason:
            self._suspected, self._aside = True, refusal.reason
            self.kick()
        else:
            self.suspect(pause_s=refusal.pause_s)

    def suspect(self, *, pause_s: float = 0.0) -> None:
        """Says that an attempt lost its connection: ask the runtime before another job is claimed for it.

        At once the first time; one that says it is fine and fails again gets a pause, or a short trouble of the
        runtime would use up every waiting job's losses. `pause_s` is how long it asked itself to be left alone.
        """
        now = self._loop.time()
        again = now - self._suspected_at < SUSPECT_MEMORY_S
        left_s = self._ask_at - now if self._suspected else 0.0
        self._suspected, self._suspected_at = True, now
        self._ask_at = now + max(pause_s, left_s, SUSPECT_PAUSE_S if again else 0.0)
        self._unreachable = 1
        self.kick()

    def released(self, job_id: str, *, clean: bool, tokens: int = 0, estimate: int = 0, served: bool = True) -> None:
        """Takes a slot back from a job that ended; `tokens` = what the slot's cache should hold now, `estimate` the
        same with the prompt in the api's estimate."""
        now = self._loop.time()
        self.slots.give_back(job_id, clean=clean, now_s=now, tokens=tokens, estimate=estimate, served=served)
        if not self.slots.using:
            self._idle_since = self._loop.time()
        if not clean and not self._suspected:
            self._ask_at = max(self._asked + LOOK_EVERY_S, self._loop.time() + FIRST_SETTLE_LOOK_S)
            self.kick()

    async def _step(self) -> None:
        if self.state == "unloading":
            return  # whoever takes its memory says when it is done
        if self._left_behind and not self.slots.using:  # who still streams from it may end
            await self._clear_up()
        if self.wanted_model is not self.model:
            await self._take_over()
        if self._aside and self.state in ("warm", "degraded"):
            reason, self._aside = self._aside, ""
            await self._quarantine(reason)
        if self.state in ("warm", "degraded"):
            await self._look_after()
            return
        away = self.leaving or self._around.drained()
        if away or not await self._wanted() or self._around.warm_elsewhere(self.name):
            if self.state == "quarantined":
                await self._become("cold", "")
            return
        if self.unfit:
            if self.state == "quarantined":
                await self._become("cold", "")
            return  # whoever sees memory come back kicks
        if self._loop.time() < self._no_room_until and not self._around.waited_for(self.name):
            return
        holder, self.room_at = self._around.held_up(self.name)
        if holder:
            if self.reason != holder or self.state != "cold":
                await self._become("cold", holder)
            return
        if await self._quarantined():
            if self.state != "quarantined":
                await self._become("quarantined", self._around.facts(self.name).failure)
            return
        await self._wake()

    async def _quarantined(self) -> bool:
        until = self._around.facts(self.name).quarantined_until
        return until > 0 and until > await self._around.now_ms()

    async def _wanted(self) -> bool:
        now, waited_for = await self._around.now_ms(), self._around.waited_for(self.name)
        if self._around.facts(self.name).unloaded_until > now:  # an operator took it out: only a request brings it back
            return waited_for or self._wanted_until > now
        return self.warmth.wanted(now, waited_for=waited_for, wanted_until=self._wanted_until)

    async def _demanded(self) -> bool:
        return self._around.waited_for(self.name) or self._wanted_until > await self._around.now_ms()

    @property
    def _wanted_until(self) -> int:
        return self._around.facts(self.name).wanted_until

    async def _idle_too_long(self) -> bool:
        idle_ms = self.idle_ms
        if idle_ms <= self.model.idle_unload_ms or self._around.facts(self.name).pinned:
            return False  # most of the time, and it needs no clock but ours
        now, waited_for = await self._around.now_ms(), self._around.waited_for(self.name)
        return self.warmth.idle_too_long(now, idle_ms=idle_ms, waited_for=waited_for, wanted_until=self._wanted_until)

    async def _take_over(self) -> None:
        """Follows a changed definition; only what the runtime runs by needs a reload."""
        old, new = self.model, self.wanted_model
        if all(getattr(old, f) == getattr(new, f) for f in RUNS_BY):
            self.model, self.warmth = new, Warmth(new)
            return
        if not self.slots.idle:
            return
        if self.state in ("warm", "degraded"):
            await self.unload("its definition changed")
        self.model, self.warmth = new, Warmth(new)
        await self.runtime.close()
        self.runtime = runtime_for(self.name, new, state_dir=self._state_dir)
        self.slots = Slots(new.max_concurrent)
        self.overlap = Overlap(new.max_concurrent)
        await self._become("cold", "")
        if self._around.facts(self.name).failure:  # what failed was the old definition
            await self._around.learn(self.name, **hosts.NOT_FAILED)

    async def _wake(self) -> None:
        """Wakes the model under its lock; nobody else on any host wakes it meanwhile."""
        lock = await wake.take(self._store, self.name, host=self._host, boot=self._boot)
        if lock is None:
            return
        try:
            await self._around.look()  # the picture may be older than the lock
            if self._around.warm_elsewhere(self.name) or await self._quarantined() or not await self._wanted():
                return  # somebody else has just loaded it, or failed to, or nobody wants it any more
            await self._become("waking", "")
            await self._load_and_probe(lock)
        finally:
            self.progress = -1.0
            if self.state == "waking":
                await self._become("cold", self.reason)
            try:
                await self._around.tell()  # before the lock is free: whoever takes it next must see that it is warm
                await wake.drop(self._store, lock)
            except errors.BrokerUnavailable:
                log.warning("event=wake_drop model=%s reason=redis away, the lock runs out by itself", self.name)

    async def _load_and_probe(self, lock: wake.WakeLock) -> None:
        timeout_s = self.model.wake_timeout_ms / 1000
        demanded = await self._demanded()
        failed: Exception | None = None
        began = reached = False
        load_ms = first_ms = 0.0
        try:
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep_lock(lock), name=f"wake-lock {self.name}")
                shown = group.create_task(progress.follow(self.runtime, self._progressed), name=f"load {self.name}")
                async with (
                    self.runtime.turn(),
                    asyncio.timeout(timeout_s),
                    self._around.room_for(self.name, demanded) as room,
                ):
                    began, reached = True, await self.runtime.state() != "unreachable"
                    load_ms = await room.load(self.runtime, timeout_s=timeout_s)
                    first_ms = await self._probe()
                    if first_ms > self.model.first_token_budget_ms:  # the first answer after a load may be slow
                        first_ms = await self._probe()
                    self.overlap.told(self.runtime.endpoint().slots)
                    self.memory_bytes = await self._around.occupied(self.name)
                keeper.cancel()
                shown.cancel()
        except* (RuntimeProblem, OSError, errors.LockHeld) as group_error:  # a timeout is an OSError
            failed = _first(group_error)
        if failed is not None:
            await self._wake_failed(failed, timeout_s, began=began, reached=reached)
            return
        self._suspected = False
        self.last_load_ms = load_ms
        self.slots.restarted()
        self.slots.offer(self.overlap.slots)
        self._warm_since = self._idle_since = self._loop.time()
        self._note(first_ms)
        self._slow = SLOW_IN_A_ROW if first_ms > self.model.first_token_budget_ms else 0
        await self._around.loaded(self.name, load_ms, self.memory_bytes)
        await self._around.learn(self.name, **hosts.NOT_FAILED, unloaded_until=0)
        if self._slow:
            await self._become("degraded", self._slow_words(first_ms))
        else:
            await self._become("warm", "")
        log.info(
            "event=warm model=%s load_ms=%.0f first_token_ms=%.0f state=%s", self.name, load_ms, first_ms, self.state
        )

    def _progressed(self, part: float) -> None:
        self.progress = part
        self._around.changed()

    async def _keep_lock(self, lock: wake.WakeLock) -> None:
        while True:
            await asyncio.sleep(wake.WAKE_RENEW_S)
            try:
                if not await wake.keep(self._store, lock):
                    raise errors.LockHeld(f"somebody else wakes {self.name} now")
            except errors.BrokerUnavailable as e:
                log.debug("event=wake_keep_retry model=%s reason=%s", self.name, e)

    async def _wake_failed(self, error: Exception, timeout_s: float, *, began: bool, reached: bool) -> None:
        if isinstance(error, errors.LockHeld):
            await self._abandon_load()
            await self._become("cold", str(error))
            return
        if isinstance(error, NoRoom) and not began:  # one that ran out of memory while it loaded did fail
            await self._wait_for_room(error)
            return
        words = f"it did not answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
        tried = began and (reached or await self.runtime.state() != "unreachable")
        await self._abandon_load()
        await self._quarantine(words, tried=tried)

    async def _quarantine(self, words: str, *, tried: bool = True) -> None:
        facts, now = self._around.facts(self.name), await self._around.now_ms()
        failures, failed_at = facts.failures + 1, failed_within_hour(facts.failed_at, now)
        if tried:
            failed_at.append(now)
        most_s = QUARANTINE_MAX_S if tried else UNREACHABLE_MAX_S
        pause = pause_ms(failed_at, now, failures=failures, first_s=QUARANTINE_S, most_s=most_s)
        pause_s = pause / 1000
        await self._around.learn(
            self.name,
            failures=failures,
            failure=words,
            quarantined_until=now + pause,
            failed_at=json.dumps(failed_at[-PER_HOUR:]),
        )
        log.warning("event=quarantine model=%s failures=%d pause_s=%.0f reason=%s", self.name, failures, pause_s, words)
        await self._become("quarantined", words)

    async def _wait_for_room(self, error: NoRoom) -> None:
        """Tries again soon. Where requests wait, they are sent elsewhere meanwhile; without any, the next one may
        still ask for an eviction, so the model only stays cold."""
        self._no_room_until = self._loop.time() + NO_ROOM_PAUSE_S
        log.info("event=no_room model=%s reason=%s", self.name, error)
        if self.unfit or not self._around.waited_for(self.name):
            await self._become("cold", str(error))
            return
        until = await self._around.now_ms() + int(NO_ROOM_PAUSE_S * 1000)
        await self._around.learn(self.name, failure=str(error), quarantined_until=until)
        await self._become("quarantined", str(error))

    async def _abandon_load(self) -> None:
        try:
            await self.runtime.unload()
        except RuntimeProblem as e:
            log.warning("event=unload_failed model=%s reason=%s", self.name, e)

    async def _probe(self) -> float:
        budget_s = self.model.first_token_budget_ms / 1000
        ms = await self.runtime.probe(timeout_s=max(PROBE_LEAST_S, PROBE_PATIENCE * budget_s))
        self._probed = self._loop.time()
        return ms

    async def _look_after(self) -> None:
        """A resident model: still there? settled? slow? idle for long?"""
        if self.model.shared and self._around.outdone(self.name):
            # we were silent for so long that another host took it: its slots are offered once, and the runtime is its
            await self._become("cold", "another host has it now")
            return
        if self._loop.time() >= self._ask_at:
            await self._ask_runtime()
            if self.state not in ("warm", "degraded"):
                return
        if self._overlap_due() and not self.makes_room_for:
            await self._measure_overlap()
        metered = self.runtime.endpoint().metered
        if metered and self.state == "degraded" and self.slots.idle:
            if self._loop.time() - self._probed > PROBE_IDLE_EVERY_S:  # nobody pays for a probe until it is asked for
                await self.unload("it was slow; its next request tries it anew")
                return
        elif self.slots.idle and not self.leaving and not self.makes_room_for and not metered:
            every_s = PROBE_DEGRADED_EVERY_S if self.state == "degraded" else PROBE_IDLE_EVERY_S
            now = self._loop.time()
            # a probe costs somebody's cached prompt where every slot holds one; what they last answered must do
            free = not self._around.waited_for(self.name) and self.slots.spare(now - CACHED_PROMPT_S)
            spare = self.state == "degraded" or free  # a user's slot is not for probes
            if spare and now - max(self._probed, self._idle_since) > every_s:
                await self._probe_idle()
        if self.runtime.manageable and await self._idle_too_long() and self.slots.idle:  # one may have come meanwhile
            await self.unload("idle")
        if self.slots.wedged(self._loop.time() - self.model.settle_ms / 1000):
            self._slow = max(self._slow, SLOW_IN_A_ROW)
            self.reason = "the runtime still works on answers that were closed long ago"
        await self._judge()

    async def _ask_runtime(self) -> None:
        self._asked = self._loop.time()
        self._ask_at = self._asked + LOOK_EVERY_S
        state = await self.runtime.state()
        if self.state not in ("warm", "degraded"):
            return  # its memory was taken meanwhile
        if state == "loaded":
            self._unreachable = 0
            if self._suspected:
                self._suspected = False
                self._around.changed()
            if self.slots.settling and await self._slots_settled():
                self._around.changed()
            self.memory_bytes = await self._around.occupied(self.name) or self.memory_bytes
            return
        self._unreachable += 1
        if state == "absent" or self._unreachable >= 2:
            self.slots.restarted()
            self.memory_bytes = 0
            await self._become("cold", f"the runtime is {state}")
            self.kick()

    async def _slots_settled(self) -> bool:
        if self._loop.time() - self._busy_asked < 0.9 * LOOK_EVERY_S:
            return False  # asked about for another reason: polling too often hides closed connections from a runtime
        self._busy_asked = self._loop.time()
        busy = await self.runtime.busy_slots()
        if busy is None:  # it cannot tell: the limit is all there is to go by
            return self.slots.expire(self._loop.time() - self.model.settle_ms / 1000)
        return self.slots.settled(busy, asked_s=self._busy_asked)

    async def _probe_idle(self) -> None:
        self.slots.take("probe", now_s=self._loop.time())
        clean = True
        self._probing = asyncio.create_task(self._probe(), name=f"probe {self.name}")
        try:
            self._measured(await self._probing)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            log.info("event=probe_gave_way model=%s", self.name)
            clean = False
        except ProbeFailed as e:
            log.warning("event=probe_failed model=%s reason=%s", self.name, e)
            self._slow += 1
            self.reason = str(e)
            clean = False
        except RuntimeProblem:
            self._ask_at = self._loop.time()
        finally:
            self._probing = None
            if self._gives_way is not None:
                self._gives_way.cancel()
                self._gives_way = None
            self._probed = self._loop.time()
            if not clean:
                self._ask_at = max(self._asked + LOOK_EVERY_S, self._probed + FIRST_SETTLE_LOOK_S)
            self.slots.give_back("probe", clean=clean, now_s=self._loop.time())
            self._around.changed()

    def _overlap_due(self) -> bool:
        """Whether to measure now how many generations really run at once; like a probe, it costs nobody anything."""
        if self.overlap.known or self.leaving or self.state != "warm":
            return False
        if self.model.embeddings or self.runtime.endpoint().metered:  # at once; for money
            return False
        quiet = self.slots.idle and self.slots.quiet(self._loop.time() - CACHED_PROMPT_S)
        return quiet and not self._around.waited_for(self.name)

    async def _measure_overlap(self) -> None:
        """Takes every slot for a moment, so that no user's answer disturbs the picture; who waits ends it."""
        mine = [f"overlap {number}" for number in range(self.slots.total)]
        for user in mine:
            self.slots.take(user, now_s=self._loop.time())
        try:
            await self.overlap.measure(
                self.runtime.endpoint(),
                kind=self.runtime.kind,
                first_token_s=self.first_token_ms / 1000,
                stop=lambda: self._around.waited_for(self.name) or self.leaving,
            )
        finally:
            for user in mine:  # clean: a stream that is closed while it makes tokens ends with its next one
                self.slots.give_back(user, clean=True, now_s=self._loop.time())
            self.slots.offer(self.overlap.slots)
            self._around.changed()

    def _measured(self, ms: float) -> None:
        self._note(ms)
        self._probed = self._loop.time()
        if ms > self.model.first_token_budget_ms:
            self._slow += 1
            self.reason = self._slow_words(ms)
        else:
            self._slow = 0

    async def _judge(self) -> None:
        if self.state == "warm" and self._slow >= SLOW_IN_A_ROW:
            await self._become("degraded", self.reason)
        elif self.state == "degraded" and self._slow == 0:
            await self._become("warm", "")

    def _note(self, ms: float) -> None:
        self.first_token_ms = ms
        before = self.first_token_ewma_ms
        self.first_token_ewma_ms = ms if not before else before + EWMA * (ms - before)

    def _slow_words(self, ms: float) -> str:
        return f"first token after {ms:.0f} ms, budget {self.model.first_token_budget_ms} ms"

    async def _become(self, state: str, reason: str) -> None:
        before, self.state, self.reason = self.state, state, reason  # at once: no claim may slip in before an unload
        if state != before:
            log.info("event=model_state model=%s from=%s to=%s reason=%s", self.name, before, state, reason or "-")
            try:
                self.since_ms = await self._around.now_ms()
            except errors.BrokerUnavailable:
                log.debug("event=model_state_time model=%s reason=redis away", self.name)
        self._around.changed()


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, Exception) else LoadFailed(str(error))
