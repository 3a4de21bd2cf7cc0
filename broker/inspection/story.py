"""One job, as far as its record and what stands around it tell: never what it asks or answers."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from broker import errors, jobs
from broker.inspection.timeline import Step, timeline, troubles
from broker.lanes import held_entries
from broker.lifecycle import State
from broker.records import JobRecord, ModelOnHost
from broker.store import Store

PLACES_MAX = 1_024
"""Places of a lane that are counted for one job."""

_NOT_TOLD = frozenset(("error", "usage", "session", "webhook"))
"""What is told in another form, and names that a client chose and that may be a secret of it."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """What is known of a job. `ahead`: jobs that wait before it, PLACES_MAX at most, -1 = it waits in no lane;
    `models`: the state of its model by host, as live hosts told; `kept_ms`: how long the record is kept, -1 = until
    it ends."""

    at_ms: int
    job: JobRecord
    steps: tuple[Step, ...]
    troubles: tuple[str, ...] = ()
    ahead: int = -1
    models: dict[str, str] = field(default_factory=dict)
    error: str = ""
    readers: int = 0
    frames: int = 0
    request_bytes: int = 0
    kept_ms: int = -1

    def as_json(self) -> dict[str, Any]:
        """Gives plain data."""
        job = {name: value for name, value in self.job.public().items() if name not in _NOT_TOLD}
        return {
            "at_ms": self.at_ms,
            "job": job,
            "error": {"code": self.job.error, "message": self.error} if self.job.error else None,
            "usage": self.job.public()["usage"],
            "steps": [vars(step) for step in self.steps],
            "troubles": list(self.troubles),
            "ahead": self.ahead,
            "models": self.models,
            "readers": self.readers,
            "frames": self.frames,
            "request_bytes": self.request_bytes,
            "kept_ms": self.kept_ms,
        }


async def tell(store: Store, job_id: str) -> Story:
    """Reads what is known of a job; raises NoSuchJob."""
    keys = store.keys
    job = await jobs.read(store, job_id)
    now, readers, frames, size, kept, on_host = await asyncio.gather(
        store.now_ms(),
        store.command("ZCARD", keys.readers(job_id)),
        store.command("XLEN", keys.frames(job_id)),
        store.command("STRLEN", keys.request(job_id)),
        store.command("PTTL", keys.job(job_id)),
        _on_hosts(store, job.model),
    )
    woke_at = max((m.woke_at for m in on_host.values() if m.state in ("warm", "degraded")), default=0)
    return Story(
        at_ms=now,
        job=job,
        steps=tuple(timeline(job, now_ms=now, woke_at=woke_at)),
        troubles=tuple(troubles(job)),
        ahead=await _ahead(store, job),
        models={host: model.state for host, model in on_host.items()},
        error=errors.said_without_quotes(job.error, job.error_message),
        readers=int(readers),
        frames=int(frames),
        request_bytes=int(size),
        kept_ms=int(kept),
    )


async def _on_hosts(store: Store, model: str) -> dict[str, ModelOnHost]:
    names = [name.decode() for name in await store.command("ZRANGE", store.keys.hosts, 0, -1)]
    told = await asyncio.gather(*(store.hash(store.keys.model_on_host(model, name)) for name in names))
    return {name: ModelOnHost.from_hash(raw) for name, raw in zip(names, told, strict=True) if raw}


async def _ahead(store: Store, job: JobRecord) -> int:
    if job.state is not State.QUEUED or not job.entry:
        return -1
    held = set(await held_entries(store, job.lane, limit=PLACES_MAX))
    before = await store.command("XRANGE", store.keys.lane(job.lane), "-", f"({job.entry}", "COUNT", PLACES_MAX)
    return sum(entry.decode() not in held for entry, _ in before)
