"""One model on this host as it is now: its state, its runtime and slots, and what the host says of it."""

import asyncio
import json
from collections.abc import Callable

from broker.policy import Model
from broker.records import Learned, ModelOnHost
from workers.overlap import Overlap
from workers.readiness import Readiness
from workers.runtimes.base import Runtime
from workers.slots import Slots
from workers.warmth import Warmth


class ModelHere:
    """What the others on this host may know of a model. Its state, and why, changes only in its waker's hands."""

    def __init__(self, name: str, model: Model, runtime: Runtime, *, learned: Callable[[str], Learned]) -> None:
        """`learned` says what loads on this host have shown of a model."""
        self.name = name
        self.model = model
        self.warmth = Warmth(model)
        self.runtime = runtime
        self.slots = Slots(model.max_concurrent)
        self.overlap = Overlap(model.max_concurrent)
        self.readiness = Readiness()
        self.state = "cold"
        self.reason = ""  # of a state other than warm and degraded, where the readiness tells
        self.since_ms = 0
        self.memory_bytes = 0
        self.last_load_ms = 0.0
        self.woken_ms = (0, 0)  # when its last wake began, and when it was warm by it
        self.progress = -1.0  # 0..1 of the load that goes on, -1 = nothing is known of it
        self.unfit = ""  # why it cannot fit on this host whatever our other models leave, "" = it can
        self.wanted_model = model  # what the policy says now; taken over when idle
        self.leaving = False
        self.makes_room_for = ""  # the model that gets its memory once it has drained
        self.room_at = 0  # the earliest instant at which it gets the memory that it waits for, 0 = it waits for none
        self._warm_since_s = self._idle_since_s = 0.0
        self._learned = learned
        self._loop = asyncio.get_running_loop()

    @property
    def resident(self) -> bool:
        """Whether it is in memory and answers."""
        return self.state in ("warm", "degraded")

    @property
    def counts(self) -> bool:
        """Whether it may be asked how many tokens a prompt has. Such a prompt has no consent and no verdict, so none of
        them leaves the machine."""
        return bool(self.runtime.endpoint().tokenizer) and self.model.trust == "local"

    @property
    def ours(self) -> bool:
        """Whether a load of it takes this host's memory, and is ours to begin and to end."""
        return self.runtime.local and self.runtime.manageable

    @property
    def going(self) -> bool:
        """Whether it claims no more, because it leaves this host or makes room."""
        return self.leaving or bool(self.makes_room_for)

    @property
    def idle_ms(self) -> float:
        """For how long nothing ran; 0 while busy."""
        return (self._loop.time() - self._idle_since_s) * 1000 if self.slots.idle else 0.0

    @property
    def stayed_ms(self) -> float:
        """For how long it has been resident."""
        return (self._loop.time() - self._warm_since_s) * 1000

    def follow(self, model: Model) -> None:
        """Takes over a definition that the runtime need not hear of."""
        self.model, self.warmth = model, Warmth(model)

    def serve_by(self, runtime: Runtime) -> None:
        """Takes another runtime, of which nothing is known yet."""
        self.runtime = runtime
        self.slots = Slots(self.model.max_concurrent)
        self.overlap = Overlap(self.model.max_concurrent)
        self.readiness = Readiness()
        self.last_load_ms = 0.0

    def told(self, version: int) -> ModelOnHost:
        """What the host says of it."""
        learned = self._learned(self.name)
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
            first_token_ms=round(self.readiness.first_token_ms, 1),
            first_token_ewma_ms=round(self.readiness.first_token_ewma_ms, 1),
            parallel=self.overlap.parallel,
            last_load_ms=round(self.last_load_ms, 1),
            progress=round(self.progress, 2) if self.state == "waking" else -1,
            counts=self.counts,
            manageable=self.runtime.manageable,
            sessions=json.dumps(cached) if (cached := self.slots.told()) else "",
            prompts=json.dumps(prompts) if (prompts := self.slots.estimates()) else "",
            since=self.since_ms,
            woke_at=self.woken_ms[1],
            version=version,
        )

    def _told_reason(self) -> str:
        if self.makes_room_for:
            return f"makes room for {self.makes_room_for}"
        if self.resident:
            return self.readiness.words
        return self.unfit if self.unfit and self.state == "cold" else self.reason
