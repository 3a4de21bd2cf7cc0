"""What loads on this host have shown of each model: its footprint and how long it takes to load. Kept in Redis."""

import hashlib

from broker import hosts
from broker.policy import Model
from broker.records import Learned, ModelFacts
from broker.store import Store

EWMA = 0.3
GREW = 1.05
"""A resident model that occupies this many times what was learned has grown, and that is learned too."""

RUNS_BY = "backend model url api_key_env embeddings trust command options context_tokens max_concurrent".split()
"""What of its definition a runtime runs by, or is trusted by: a change takes effect when nothing runs, and what was
learned no longer holds."""


def definition_of(model: Model) -> str:
    """Names what a runtime would load, as a short digest."""
    said = repr([getattr(model, field) for field in RUNS_BY])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


class LearnedHere:
    """What was learned of the models of one host, read from Redis once and written with each load."""

    def __init__(self, store: Store, host: str) -> None:
        self._store = store
        self._host = host
        self._known: dict[str, Learned] = {}

    def of(self, name: str, model: Model) -> Learned:
        """What is known of a model as it is defined now."""
        known = self._known.get(name, Learned())
        return known if known.definition == definition_of(model) else Learned()

    def elsewhere(self, facts: ModelFacts, model: Model) -> int:
        """The footprint (bytes) that it was last seen to have on some host, 0 = none."""
        return facts.footprint_bytes if facts.definition == definition_of(model) else 0

    async def recall(self, name: str) -> None:
        """Reads what an earlier life of this host has learned; raises BrokerUnavailable."""
        if name not in self._known:
            self._known[name] = await hosts.learned_here(self._store, name, self._host)

    async def note_load(self, name: str, model: Model, *, load_ms: float, footprint_bytes: int) -> None:
        """Learns from a load; 0 bytes = the runtime could not tell, 0 ms = it was in memory already."""
        known = self.of(name, model)
        mean_ms = known.load_ms + EWMA * (load_ms - known.load_ms) if known.load_ms and load_ms else load_ms
        await self._note(
            name,
            Learned(
                footprint_bytes=footprint_bytes or known.footprint_bytes,
                load_ms=round(mean_ms, 1) or known.load_ms,
                definition=definition_of(model),
            ),
        )

    async def note_size(self, name: str, model: Model, memory_bytes: int) -> None:
        """Learns that a resident model has grown since its load: buffers and weights that are touched later."""
        known = self.of(name, model)
        if known.definition and memory_bytes > known.footprint_bytes * GREW:
            await self._note(
                name,
                Learned(footprint_bytes=memory_bytes, load_ms=known.load_ms, definition=known.definition),
            )

    async def _note(self, name: str, learned: Learned) -> None:
        self._known[name] = learned
        await hosts.learn_here(self._store, name, self._host, learned)
