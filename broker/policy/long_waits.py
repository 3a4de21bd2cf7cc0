"""Whether a job may be given up before its model has had a chance to load: where two models do not fit together, one
waits until the other has had its minimum stay and a last batch of jobs, and then for its own load. Pure.

Only models without a fallback are in question (the jobs of others are promoted long before), and only those whose
memory is known.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from broker.policy.content import Model
from broker.policy.lanes import Lane

BATCH_MS = 20_000
"""For no longer than this a model that must make room goes on starting jobs, once its minimum stay is over."""

DISK_MB_S = 500
"""A load is expected to read so many MB a second: a SATA disk, which is what a slow load comes from."""


@dataclass(frozen=True)
class LongWait:
    """A lane whose jobs may be given up too soon, and the model that it waits for. MB and ms."""

    lane: str
    model: str
    model_mb: int
    other: str
    other_mb: int
    stay_ms: int
    load_ms: int
    limit_ms: int

    @property
    def wait_ms(self) -> int:
        """How long a job may wait until the model has loaded."""
        return self.stay_ms + BATCH_MS + self.load_ms

    def sentence(self, host_memory_mb: int) -> str:
        """Says it in numbers."""
        return (
            f"a job of '{self.lane}' may be given up after {self.limit_ms} ms, before its turn: '{self.model}' "
            f"({self.model_mb} MB) and '{self.other}' ({self.other_mb} MB) do not fit together into "
            f"{host_memory_mb} MB, and after minStayMs of '{self.other}' ({self.stay_ms} ms), a last batch "
            f"({BATCH_MS} ms) and a load from a slow disk ({self.load_ms} ms) it has waited {self.wait_ms} ms; "
            "give it a fallback or a longer maxWaitMs"
        )


def long_waits(models: dict[str, Model], lanes: Iterable[Lane], host_memory_mb: int) -> Iterator[LongWait]:
    """Finds, for each lane without a fallback, the model that keeps its jobs waiting longest, if that is too long."""
    for lane in lanes:
        model = models[lane.model]
        if lane.fallback is not None or lane.priority == "batch" or not _is_ours(model):
            continue
        found = [
            LongWait(
                lane.name,
                lane.model,
                mine,
                name,
                theirs,
                other.min_stay_ms,
                mine * 1000 // DISK_MB_S,
                lane.max_wait_ms,
            )
            for name, other in models.items()
            if name != lane.model and _is_ours(other) and share_a_host(model, other)
            for mine, theirs in [(model.memory_mb or 0, other.memory_mb or 0)]
            if mine <= host_memory_mb < mine + theirs
        ]
        worst = max(found, key=lambda wait: wait.wait_ms, default=None)
        if worst is not None and worst.wait_ms > worst.limit_ms:
            yield worst


def share_a_host(one: Model, other: Model) -> bool:
    """Whether some host may serve both."""
    return one.hosts is None or other.hosts is None or bool(set(one.hosts) & set(other.hosts))


def _is_ours(model: Model) -> bool:
    """Whether it is known to take so much of a host's memory."""
    return bool(model.memory_mb) and model.trust == "local" and not model.shared
