"""Looking after a resident model: is it still there, have its slots settled, how fast and how parallel is it?

Nothing here decides what the model is: its waker asks, and says.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from broker.policy import Model
from workers.overlap import Overlap
from workers.probes import passive_probe_ms
from workers.readiness import Readiness, probe_within_s
from workers.runtimes.base import ProbeFailed, Runtime, RuntimeProblem
from workers.slots import Slots

log = logging.getLogger("warmlane.upkeep")

LOOK_EVERY_S = 2.0
"""How often a runtime is asked for its state and its busy slots, at most."""

FIRST_SETTLE_LOOK_S = 0.25
PROBE_IDLE_EVERY_S = 30.0
PROBE_DEGRADED_EVERY_S = 5.0
CACHED_PROMPT_S = 600.0
"""A prompt in a cache that was used within this is worth more than a probe."""

PROBE_GIVES_WAY_S = 1.0
"""A probe that has a slot for which a user waits ends within this, by itself or by us."""

SUSPECT_MEMORY_S = 10.0
SUSPECT_PAUSE_S = 1.0


class Upkeep:
    """Looks after one runtime while its model is in memory. Instants are of the loop's clock, in seconds."""

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        slots: Slots,
        overlap: Overlap,
        readiness: Readiness,
        *,
        resident: Callable[[], bool],
        leaving: Callable[[], bool],
        waited_for: Callable[[], bool],
        weigh: Callable[[], Awaitable[None]],
        kick: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        """`weigh` notes what the model occupies; `kick` has its state looked at now; `changed` tells everybody."""
        self.suspected = False  # whether nothing may be claimed until the runtime was asked
        self._name = name
        self._runtime = runtime
        self._slots = slots
        self._overlap = overlap
        self._readiness = readiness
        self._resident = resident
        self._leaving = leaving
        self._waited_for = waited_for
        self._weigh = weigh
        self._kick = kick
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._asked_at = self._busy_asked_at = self._probed_at = 0.0
        self._ask_at = self._loop.time()
        self._suspected_at = -SUSPECT_MEMORY_S
        self._unreachable = 0
        self._probing: asyncio.Task[float] | None = None
        self._gives_way: asyncio.TimerHandle | None = None

    def woken(self) -> None:
        """Hears that the model has just been loaded and probed."""
        self.suspected = False
        self._probed_at = self._loop.time()

    def suspect(self, *, pause_s: float = 0.0) -> None:
        """Says that an attempt lost its connection: ask the runtime before another job is claimed for it.

        At once the first time; one that says it is fine and fails again gets a pause, or a short trouble of the
        runtime would use up every waiting job's losses. `pause_s` is how long it asked itself to be left alone.
        """
        now = self._loop.time()
        again = now - self._suspected_at < SUSPECT_MEMORY_S
        left_s = self._ask_at - now if self.suspected else 0.0
        self.suspected, self._suspected_at = True, now
        self._ask_at = now + max(pause_s, left_s, SUSPECT_PAUSE_S if again else 0.0)
        self._unreachable = 1
        self._kick()

    def settles(self) -> None:
        """Hears that a slot may still be busy with an answer that was closed early: the runtime is asked soon."""
        if not self.suspected:
            self._ask_soon()
            self._kick()

    def ask_within_s(self) -> float:
        """How long until the runtime is to be asked; 0 or less = now."""
        return self._ask_at - self._loop.time()

    async def ask(self, *, settle_s: float) -> str:
        """Asks the runtime; says why its model is gone, "" = it is there as far as anybody can tell. Slots may settle
        for `settle_s` where the runtime cannot tell which are busy."""
        self._asked_at = self._loop.time()
        self._ask_at = self._asked_at + LOOK_EVERY_S
        state = await self._runtime.state()
        if not self._resident():
            return ""  # its memory was taken meanwhile
        if state == "loaded":
            self._unreachable = 0
            if self.suspected:
                self.suspected = False
                self._changed()
            if self._slots.settling and await self._slots_settled(settle_s):
                self._changed()
            await self._weigh()
            return ""
        self._unreachable += 1
        return f"the runtime is {state}" if state == "absent" or self._unreachable >= 2 else ""

    def wedged(self, *, settle_s: float) -> bool:
        """Whether the runtime itself said, when every slot had been settling for this long, that they are all busy.
        Until it is asked nobody knows, and one that cannot tell is never wedged: its slots are free then."""
        return self._slots.wedged(self._busy_asked_at - settle_s)

    def note_first_token(
        self, ms: float, *, prompt_tokens: int, cached_tokens: int, prefill_tps: float, budget_ms: int
    ) -> None:
        """Counts a real first token as a probe, if reading its prompt cannot have been what took long."""
        probe_ms = passive_probe_ms(
            ms, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, prefill_tps=prefill_tps
        )
        if probe_ms is not None:
            self._readiness.measured(probe_ms, budget_ms=budget_ms)
            self._probed_at = self._loop.time()

    def long_unprobed(self) -> bool:
        """Whether what is known of its speed is old by now."""
        return self._loop.time() - self._probed_at > PROBE_IDLE_EVERY_S

    def give_way(self) -> None:
        """Says that a user waits: a probe that has the slot ends in a moment."""
        if self._probing is not None and self._gives_way is None:
            self._gives_way = self._loop.call_later(PROBE_GIVES_WAY_S, self._probing.cancel)

    def probe_due(self, *, degraded: bool, idle_since: float) -> bool:
        """Whether to probe an idle model now: a user's slot is not for probes, and a probe costs somebody's cached
        prompt where every slot holds one; what they last answered must do. A degraded one is probed all the same."""
        every_s, now = PROBE_DEGRADED_EVERY_S if degraded else PROBE_IDLE_EVERY_S, self._loop.time()
        free = not self._waited_for() and self._slots.spare(now - CACHED_PROMPT_S)
        return (degraded or free) and now - max(self._probed_at, idle_since) > every_s

    async def probe(self, budget_ms: int) -> None:
        """Probes an idle model on one of its slots."""
        slot = self._slots.take("probe", now_s=self._loop.time())
        clean = True
        probe = self._runtime.probe(timeout_s=probe_within_s(budget_ms), slot=slot)
        self._probing = asyncio.create_task(probe, name=f"probe {self._name}")
        try:
            self._readiness.measured(await self._probing, budget_ms=budget_ms)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            log.info("event=probe_gave_way model=%s", self._name)
            clean = False
        except ProbeFailed as e:
            log.warning("event=probe_failed model=%s reason=%s", self._name, e)
            self._readiness.failed(str(e))
            clean = False
        except RuntimeProblem:
            self._ask_at = self._loop.time()
        finally:
            self._probing = None
            if self._gives_way is not None:
                self._gives_way.cancel()
                self._gives_way = None
            self._probed_at = self._loop.time()
            if not clean:
                self._ask_soon()
            self._slots.give_back("probe", clean=clean, now_s=self._loop.time())
            self._changed()

    def overlap_due(self, model: Model) -> bool:
        """Whether to measure now how many generations of a warm model really run at once; like a probe, it costs
        nobody anything."""
        if self._overlap.known or self._leaving():
            return False
        if model.embeddings or self._runtime.endpoint().metered:  # at once; for money
            return False
        quiet = self._slots.idle and self._slots.quiet(self._loop.time() - CACHED_PROMPT_S)
        return quiet and not self._waited_for()

    async def measure_overlap(self) -> None:
        """Takes every slot for a moment, so that no user's answer disturbs the picture; who waits ends it."""
        mine = [f"overlap {number}" for number in range(self._slots.total)]
        for user in mine:
            self._slots.take(user, now_s=self._loop.time())
        try:
            await self._overlap.measure(
                self._runtime.endpoint(),
                kind=self._runtime.kind,
                first_token_s=self._readiness.first_token_ms / 1000,
                stop=lambda: self._waited_for() or self._leaving(),
            )
        finally:
            for user in mine:  # clean: a stream that is closed while it makes tokens ends with its next one
                self._slots.give_back(user, clean=True, now_s=self._loop.time())
            self._slots.offer(self._overlap.slots)
            self._changed()

    def _ask_soon(self) -> None:
        self._ask_at = max(self._asked_at + LOOK_EVERY_S, self._loop.time() + FIRST_SETTLE_LOOK_S)

    async def _slots_settled(self, settle_s: float) -> bool:
        if self._loop.time() - self._busy_asked_at < 0.9 * LOOK_EVERY_S:
            return False  # asked about for another reason: polling too often hides closed connections from a runtime
        self._busy_asked_at = self._loop.time()
        busy = await self._runtime.busy_slots()
        if busy is None:  # it cannot tell: the limit is all there is to go by
            return self._slots.expire(self._loop.time() - settle_s)
        return self._slots.settled(busy, asked_s=self._busy_asked_at)
