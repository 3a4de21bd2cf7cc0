"""One model on this host moves from state to state, and this is what moves it.

    cold → waking → warm ⇄ degraded → unloading → cold;  waking → quarantined after a failed load

Nothing is called warm before it has given a first token to our own probe; no port, no health page counts.
"""

import asyncio
import logging
from pathlib import Path

from broker import errors, hosts
from broker.operator import UNLOADED_FOR_MS
from broker.policy import Model
from broker.store import Store
from broker.wake import WakeLock
from workers import wake
from workers.attempt import Refusal
from workers.demand import Demand
from workers.learned import RUNS_BY
from workers.model_here import ModelHere
from workers.quarantine import Quarantine
from workers.room import NoRoom
from workers.runtimes import runtime_for
from workers.runtimes.base import RuntimeProblem
from workers.surroundings import Surroundings
from workers.upkeep import Upkeep
from workers.wake import NotWoken, Wake, Woken

log = logging.getLogger("warmlane.waker")

STEP_EVERY_S = 0.5
NO_ROOM_PAUSE_S = 5.0


class Waker(ModelHere):
    """Moves one model from state to state, and keeps its runtime."""

    def __init__(
        self, store: Store, name: str, model: Model, *, host: str, boot: str, state_dir: Path, around: Surroundings
    ) -> None:
        runtime = runtime_for(name, model, state_dir=state_dir)
        super().__init__(name, model, runtime, learned=around.learned)
        self._store = store
        self._host = host
        self._boot = boot
        self._state_dir = state_dir
        self._around = around
        self._kick = asyncio.Event()
        self.upkeep = self._upkeep_of_runtime()
        now_ms, facts = around.now_ms, lambda: around.facts(name)
        self._demand = Demand(now_ms=now_ms, facts=facts, waited_for=lambda: around.waited_for(name))
        self._quarantine = Quarantine(name, now_ms=now_ms, facts=facts, learn=around.learn)
        self._left_behind = False  # whether it may have left something in memory that nobody looks after
        self._aside = ""  # why only a person can mend it
        self._no_room_until_s = 0.0
        self._short = ""  # what it said last of memory that it waits for

    @property
    def willing(self) -> bool:
        """Whether it takes jobs, if it has a slot for them."""
        leads_elsewhere = _leads(self.wanted_model) != _leads(self.model)  # it waits for the one that the policy means
        return self.resident and not self.upkeep.suspected and not self.going and not leads_elsewhere

    @property
    def claimable(self) -> bool:
        """Whether jobs may be claimed for it now."""
        return self.willing and self.slots.free > 0

    @property
    def _says_short(self) -> bool:
        return bool(self._short) and self.reason == self._short

    def kick(self) -> None:
        """Has the state looked at now."""
        self._kick.set()

    def waits(self, words: str) -> None:
        """Says what a wake waits for before its load can begin, "" = for nothing any more."""
        if self.state == "waking" and self.reason != words:
            self.reason = words
            self._around.changed()

    def told_anew(self) -> None:
        """Has everybody hear what the host says of it now."""
        self._around.changed()

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
                    async with asyncio.timeout(self._pause_s()):
                        await self._kick.wait()
                except TimeoutError:
                    continue
        finally:
            await asyncio.shield(self.runtime.close())

    def _pause_s(self) -> float:
        """How long the state may be left alone: only a resident model's runtime is to be asked sooner than that."""
        return min(STEP_EVERY_S, max(0.01, self.upkeep.ask_within_s())) if self.resident else STEP_EVERY_S

    async def _broken(self, error: Exception) -> None:
        """Sets a model aside for a while whose runtime we do not understand; what it holds in memory goes later."""
        self._left_behind = True
        cause = wake.first_of(error)
        try:
            await self._set_aside(f"its runtime is not understood: {type(cause).__name__}: {cause}")
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
        if not self.resident or not self.slots.idle or not self.runtime.manageable:
            return
        until = await self._around.now_ms() + UNLOADED_FOR_MS
        await self._around.learn(self.name, unloaded_until=until, wanted_until=0)
        if self.resident and self.slots.idle:  # a job may have been claimed while we wrote
            await self.unload("unloaded by hand")
        else:
            await self._around.learn(self.name, unloaded_until=0)

    def refused(self, refusal: Refusal) -> None:
        """Hears that the runtime wants none of our requests: none is claimed for it until its pause is over, or, where
        only a person can mend it, it is quarantined."""
        if refusal.reason:
            self.upkeep.suspected, self._aside = True, refusal.reason
            self.kick()
        else:
            self.upkeep.suspect(pause_s=refusal.pause_s)

    def released(
        self, user: str, *, clean: bool, tokens: int = 0, estimate: int = 0, served: bool = True, keep: bool = True
    ) -> None:
        """Takes a slot back from a job that ended; `tokens` = what the slot's cache should hold now, `estimate` the
        same with the prompt in the api's estimate; `keep` = it may wait a moment for its session."""
        now = self._loop.time()
        self.slots.give_back(user, clean=clean, now_s=now, tokens=tokens, estimate=estimate, served=served, keep=keep)
        if not self.slots.using:
            self._idle_since_s = self._loop.time()
        if not clean:
            self.upkeep.settles()

    async def _step(self) -> None:
        if self.state == "unloading":
            return  # whoever takes its memory says when it is done
        if self._left_behind and not self.slots.using:  # who still streams from it may end
            await self._clear_up()
        if self.wanted_model is not self.model:
            await self._take_over()
        if self._aside and self.resident:
            reason, self._aside = self._aside, ""
            await self._set_aside(reason)
        if self.resident:
            await self._look_after()
            return
        away = self.leaving or self._around.drained()
        if away or not await self._demand.wants(self.warmth) or self._around.warm_elsewhere(self.name):
            await self._waits_no_more()
            return
        if self.unfit:
            await self._waits_no_more()
            return  # whoever sees memory come back kicks
        if self._loop.time() < self._no_room_until_s and not self._comes_first():
            return
        holder, self.room_at = self._around.held_up(self.name)
        if holder:
            self._short = holder
            if self.reason != holder or self.state != "cold":
                await self._become("cold", holder)
            return
        if await self._quarantine.goes_on():
            if self.state != "quarantined":
                await self._become("quarantined", self._quarantine.words)
            return
        if not await self._is_short():
            await self._wake()

    async def _waits_no_more(self) -> None:
        """Says nothing any more of what it waited for."""
        self.room_at = 0
        if self.state == "quarantined" or self._says_short:
            await self._become("cold", "")

    async def _is_short(self) -> bool:
        """Whether memory is short for one that nobody waits for. It is asked without the wake lock, of which it needs
        none to stay cold; where jobs wait, who has no room sends them elsewhere, and only the holder may do that."""
        if self._around.waited_for(self.name):
            return False
        words = await self._around.lacks_room(self.name, await self._demand.asked_for())
        if not words or self._around.waited_for(self.name):
            return False
        await self._wait_for_room(NoRoom(words))
        return True

    def _comes_first(self) -> bool:
        """Whether it need not pause before it looks for room again: jobs wait for it, or room is made for it."""
        return self._around.waited_for(self.name) or self._around.given_room(self.name)

    async def _take_over(self) -> None:
        """Follows a changed definition; only what the runtime runs by needs a reload."""
        old, new = self.model, self.wanted_model
        if all(getattr(old, f) == getattr(new, f) for f in RUNS_BY):
            self.follow(new)
            return
        if not self.slots.idle:
            return
        if self.resident:
            await self.unload("its definition changed")
        self.follow(new)
        await self.runtime.close()
        self.serve_by(runtime_for(self.name, new, state_dir=self._state_dir))
        self.upkeep = self._upkeep_of_runtime()
        await self._become("cold", "")
        await self._quarantine.forget()

    def _upkeep_of_runtime(self) -> Upkeep:
        return Upkeep(
            self.name,
            self.runtime,
            self.slots,
            self.overlap,
            self.readiness,
            resident=lambda: self.resident,
            leaving=lambda: self.leaving,
            waited_for=lambda: self._around.waited_for(self.name),
            weigh=self._weigh,
            kick=self.kick,
            changed=self._around.changed,
        )

    async def _wake(self) -> None:
        """Wakes the model under its lock, unless somebody else does or has just done."""
        around, host, boot = self._around, self._host, self._boot
        async with wake.locked(self._store, self.name, host=host, boot=boot, tell=around.tell) as lock:
            if lock is None:
                return
            await around.look()  # the picture may be older than the lock
            if around.warm_elsewhere(self.name) or await self._quarantine.goes_on():
                return  # somebody else has just loaded it, or failed to
            if not await self._demand.wants(self.warmth):
                return
            await self._become("waking", "")
            try:
                await self._wake_under(lock)
            except asyncio.CancelledError:
                if self.leaving:  # removed from the policy: some runtimes go on loading without us
                    await self._clear_up()
                raise
            finally:
                self.progress = -1.0
                if not self.resident:
                    self.memory_bytes = 0  # what a failed load leaves is taken out again
                if self.state == "waking":
                    await self._become("cold", "")

    async def _wake_under(self, lock: WakeLock) -> None:
        room = self._around.room_for(self.name, await self._demand.asked_for())
        model, runtime = self.model, self.runtime
        one = Wake(
            self._store,
            lock,
            model,
            runtime,
            room=room,
            waits=self.waits,
            begins=self._begins,
            in_memory=self._in_memory,
            progressed=self._progressed,
        )
        try:
            woken = await one.run()
        except errors.LockHeld as e:
            await self._become("cold", str(e))
        except NoRoom as e:
            await self._wait_for_room(e)
        except NotWoken as e:
            await self._around.count(self.name, **{"wakes_failed" if e.tried else "wakes_unreachable": 1})
            await self._set_aside(str(e), tried=e.tried)
        else:
            await self._woken(woken)

    async def _woken(self, woken: Woken) -> None:
        self.upkeep.woken()
        self.last_load_ms = woken.load_ms or self.last_load_ms
        self.slots.restarted()
        self.slots.offer(self.overlap.slots)
        self._warm_since_s = self._idle_since_s = self._loop.time()
        self.readiness.woke(woken.first_token_ms, budget_ms=self.model.first_token_budget_ms)
        try:
            await self._around.loaded(self.name, woken.load_ms, self.memory_bytes)
            await self._around.learn(self.name, **hosts.NOT_FAILED, unloaded_until=0)
        except errors.BrokerUnavailable as e:  # it is there all the same: called cold, nobody would ever unload it
            log.warning("event=load_unlearned model=%s reason=%s", self.name, e)
        await self._note_woken()
        await self._become(self.readiness.verdict("warm"), self.readiness.words)
        log.info(
            "event=warm model=%s load_ms=%.0f first_token_ms=%.0f state=%s",
            self.name, woken.load_ms, woken.first_token_ms, self.state,
        )  # fmt: skip
        await self._around.count(self.name, wakes=1, loads=int(woken.load_ms > 0), loads_ms=round(woken.load_ms))

    async def _note_woken(self) -> None:
        """Notes when this wake began and that it is over: before anybody can claim by it."""
        try:
            self.woken_ms = self.since_ms, await self._around.now_ms()
        except errors.BrokerUnavailable:
            log.debug("event=woken_time model=%s reason=redis away", self.name)

    async def _begins(self) -> None:
        """Has the time of a load that had to wait count from now."""
        self.waits("")
        try:
            self.since_ms = await self._around.now_ms()
        except errors.BrokerUnavailable:
            log.debug("event=load_begins model=%s reason=redis away", self.name)

    async def _in_memory(self) -> None:
        self.overlap.told(self.runtime.endpoint().slots)
        self.memory_bytes = await self._around.occupied(self.name)

    async def _weigh(self) -> None:
        self.memory_bytes = await self._around.occupied(self.name) or self.memory_bytes

    def _progressed(self, part: float) -> None:
        self.progress = part
        self._around.changed()

    async def _set_aside(self, words: str, *, tried: bool = True) -> None:
        await self._quarantine.begin(words, tried=tried)
        await self._become("quarantined", words)

    async def _wait_for_room(self, error: NoRoom) -> None:
        """Tries again soon. Where requests wait, they are sent elsewhere meanwhile, unless the model is in line for
        somebody's memory; without any, the next one may still ask for an eviction, so the model only stays cold."""
        self._no_room_until_s = self._loop.time() + NO_ROOM_PAUSE_S
        if not self._says_short:
            log.info("event=no_room model=%s reason=%s", self.name, error)
        changed = self._is_now("cold", str(error))
        waited_for = not self.unfit and self._around.waited_for(self.name)
        holder = ""
        if waited_for:  # asked with no await before: who had the room a moment ago has it still
            holder, self.room_at = self._around.held_up(self.name)
            self.reason = holder or self.reason
        self._short = self.reason
        await self._note_since(changed)
        if waited_for and not holder:
            await self._quarantine.pause(str(error), for_s=NO_ROOM_PAUSE_S)
            await self._become("quarantined", str(error))

    async def _look_after(self) -> None:
        """A resident model: still there? settled? slow? idle for long?"""
        if self.model.shared and self._around.outdone(self.name):
            # we were silent for so long that another host took it: its slots are offered once, and the runtime is its
            await self._become("cold", "another host has it now")
            return
        if self.upkeep.ask_within_s() <= 0:
            gone = await self.upkeep.ask(settle_s=self.model.settle_ms / 1000)
            if gone:
                await self._gone(gone)
            if not self.resident:
                return
        if self.state == "warm" and not self.makes_room_for and self.upkeep.overlap_due(self.model):
            await self.upkeep.measure_overlap()
        if self.runtime.endpoint().metered:  # nobody pays for a probe until it is asked for
            if self.state == "degraded" and self.slots.idle and self.upkeep.long_unprobed():
                await self.unload("it was slow; its next request tries it anew")
                return
        elif self.slots.idle and not self.going:
            if self.upkeep.probe_due(degraded=self.state == "degraded", idle_since=self._idle_since_s):
                await self.upkeep.probe(self.model.first_token_budget_ms)
        if self.runtime.manageable and await self._idle_too_long() and self.slots.idle:  # one may have come meanwhile
            await self.unload("idle")
        if self.upkeep.wedged(settle_s=self.model.settle_ms / 1000):
            self.readiness.stuck()
        verdict = self.readiness.verdict(self.state)
        if verdict != self.state:
            await self._become(verdict, self.readiness.words)

    async def _gone(self, reason: str) -> None:
        self.slots.restarted()
        self.memory_bytes = 0
        await self._become("cold", reason)
        self.kick()

    async def _idle_too_long(self) -> bool:
        idle_ms = self.idle_ms
        if idle_ms <= self.model.idle_unload_ms:
            return False  # most of the time, and it needs no clock but ours
        return await self._demand.lets_go(self.warmth, idle_ms=idle_ms)

    async def _become(self, state: str, reason: str) -> None:
        """Changes the state, and notes since when it is in it."""
        await self._note_since(self._is_now(state, reason))

    def _is_now(self, state: str, reason: str) -> bool:
        """The one place where the state changes: at once, as no claim may slip in before an unload. True if it did."""
        before, self.state, self.reason = self.state, state, reason
        if state != before:
            log.info("event=model_state model=%s from=%s to=%s reason=%s", self.name, before, state, reason or "-")
        return state != before

    async def _note_since(self, changed: bool) -> None:
        """Tells everybody what the host says of it now; where its state changed, with the instant."""
        if changed:
            try:
                self.since_ms = await self._around.now_ms()
            except errors.BrokerUnavailable:
                log.debug("event=model_state_time model=%s reason=redis away", self.name)
        self._around.changed()


def _leads(model: Model) -> tuple[str | None, ...]:
    """Where the prompts for a model go, as far as it matters which remote one that is."""
    return (model.trust, model.backend, model.url, model.model) if model.trust == "remote" else (model.trust,)
