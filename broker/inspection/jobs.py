"""Which jobs there are: those of the lanes oldest first, those that start later, and ended ones newest first.

Every look is bounded. Live jobs are found through the lanes and the due set, ended ones in pages of a SCAN; what a
limit left out is counted and told.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace

from broker.lanes import held_entries, waiting_entries
from broker.lifecycle import ENDED, HELD, IN_LANE, LIVE, State
from broker.policies import Active
from broker.records import JobRecord, Waiting
from broker.store import Store

PAGE = 500
LOOKED_AT_MAX = 20_000
"""Live jobs that one look reads in a lane, or in the due set."""

SCANNED_MAX = 500_000
"""Keys that one look for ended jobs passes by."""

_FIELDS = (
    "state lane entry model asked asked_model caller priority mode attempt owner served_by submitted_at claimed_at "
    "first_token_at ended_at promote_at give_up_at lease_until not_before promotions put_backs losses error"
).split()
"""What is read of a record: nothing of it can hold a word of the prompt."""

TOLD = ("id", *(name for name in _FIELDS if name != "entry"))
"""What a list tells of a job."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which jobs are asked for; what is empty or 0 asks for nothing."""

    states: frozenset[State] = LIVE
    lane: str = ""
    caller: str = ""
    model: str = ""
    older_than_ms: int = 0
    limit: int = 50

    def takes(self, job: JobRecord, now: int) -> bool:
        """Whether a job is one of them."""
        return (
            job.state in self.states
            and self.lane in ("", job.lane)
            and self.caller in ("", job.caller)
            and self.model in ("", job.model)
            and self.is_old(job.submitted_at, now)
        )

    def may_be(self, entry: Waiting, now: int) -> bool:
        """Whether an entry may lead to one of them, by what it says itself."""
        return self.caller in ("", entry.caller) and self.is_old(entry.submitted, now)

    def is_old(self, submitted_at: int, now: int) -> bool:
        """Whether a job was submitted long enough ago."""
        return submitted_at <= now - self.older_than_ms


@dataclass(frozen=True, kw_only=True)
class Found:
    """The jobs that were found. `unseen`: so many more were not looked at, since the limit was reached before."""

    at_ms: int
    jobs: tuple[JobRecord, ...] = ()
    unseen: int = 0
    scanned_all: bool = True


async def find(store: Store, active: Active | None, wanted: Wanted) -> Found:
    """Finds jobs; without a policy the lanes are not known, and live ones are found in the order of their instants."""
    now = await store.now_ms()
    found: list[JobRecord] = []
    unseen, scanned_all = 0, True
    if wanted.states & LIVE:
        if active is None:
            found, unseen = await _due(store, wanted, now)
        else:
            found, unseen = await _live(store, active, wanted, now)
    left = wanted.limit - len(found)
    if wanted.states & ENDED:
        ended, more, scanned_all = await _ended(store, wanted, now, limit=max(0, left))
        found, unseen = found + ended, unseen + more
    return Found(at_ms=now, jobs=tuple(found), unseen=unseen, scanned_all=scanned_all)


async def _live(store: Store, active: Active, wanted: Wanted, now: int) -> tuple[list[JobRecord], int]:
    names = [wanted.lane] if wanted.lane else list(active.lanes())
    if wanted.model:
        names = [name for name in names if name in active.lanes_of(wanted.model)]
    looks = [_lane(store, name, wanted, now) for name in names] if wanted.states & IN_LANE else []
    seen = await asyncio.gather(*looks)
    found = sorted((job for jobs, _ in seen for job in jobs), key=lambda job: job.submitted_at)
    unseen = sum(more for _, more in seen) + max(0, len(found) - wanted.limit)
    found = found[: wanted.limit]
    if State.SCHEDULED in wanted.states:
        later = replace(wanted, states=frozenset({State.SCHEDULED}), limit=wanted.limit - len(found))
        if count := await _in_no_lane(store, active):
            jobs, more = await _due(store, later, now, count=count)
            found, unseen = found + jobs, unseen + more
    return found, unseen


async def _in_no_lane(store: Store, active: Active) -> int:
    """How many live jobs stand in no lane: they start later."""
    live, *lengths = await asyncio.gather(
        store.command("ZCARD", store.keys.due),
        *(store.command("XLEN", store.keys.lane(name)) for name in active.lanes()),
    )
    return max(0, int(live) - sum(map(int, lengths)))


async def _lane(store: Store, lane: str, wanted: Wanted, now: int) -> tuple[list[JobRecord], int]:
    """The oldest wanted jobs of a lane, and how many of its entries were not looked at."""
    found: list[JobRecord] = []
    total, looked_at = int(await store.command("XLEN", store.keys.lane(lane))), 0
    page_size = min(PAGE, 2 * wanted.limit)  # most entries of a lane are wanted, as a rule
    pages = _held(store, lane) if wanted.states <= HELD else _entries(store, lane, page_size)
    async for page in pages:
        kept = [entry for entry in page if wanted.may_be(entry, now)]
        for entry, job in zip(kept, await read(store, [entry.job for entry in kept]), strict=True):
            if job is not None and job.entry == entry.entry and wanted.takes(job, now):
                found.append(job)
        looked_at += len(page)
        if len(found) >= wanted.limit or looked_at >= LOOKED_AT_MAX:
            break
    else:
        return found, 0  # nothing of it was left out but what was not asked for
    beyond = max(0, len(found) - wanted.limit)
    return found[: wanted.limit], max(0, total - looked_at) + beyond


async def _entries(store: Store, lane: str, page_size: int) -> AsyncIterator[list[Waiting]]:
    after, size = "", page_size
    while page := [entry async for entry in waiting_entries(store, lane, limit=size, after=after)]:
        yield page
        if len(page) < size:
            return
        after, size = page[-1].entry, PAGE


async def _held(store: Store, lane: str) -> AsyncIterator[list[Waiting]]:
    """The entries that hosts hold, which may stand anywhere in a long lane."""
    held, key = await held_entries(store, lane, limit=LOOKED_AT_MAX), store.keys.lane(lane)
    for at in range(0, len(held), PAGE):
        told = await asyncio.gather(*(store.command("XRANGE", key, e, e) for e in held[at : at + PAGE]))
        yield [Waiting.from_entry(lane, *row) for rows in told for row in rows]


async def _due(store: Store, wanted: Wanted, now: int, *, count: int | None = None) -> tuple[list[JobRecord], int]:
    """Wanted live jobs in the order of their next instants, and how many were not looked at; `count` live ones are in
    the wanted states, None = all of them."""
    found: list[JobRecord] = []
    total, looked_at, seen = int(await store.command("ZCARD", store.keys.due)), 0, 0
    while looked_at < min(total, LOOKED_AT_MAX) and len(found) < wanted.limit:
        ids = await store.command("ZRANGE", store.keys.due, looked_at, looked_at + PAGE - 1)
        if not ids:
            break
        looked_at += len(ids)
        told = await _read_in(store, [job_id.decode() for job_id in ids], wanted.states)
        seen += len(told)
        found += [job for job in told if wanted.takes(job, now)]
    beyond, left = max(0, len(found) - wanted.limit), max(0, total - looked_at)
    if count is not None:
        left = min(left, max(0, count - seen))
    return found[: wanted.limit], left + beyond


async def _ended(store: Store, wanted: Wanted, now: int, *, limit: int) -> tuple[list[JobRecord], int, bool]:
    """The newest ended jobs, how many more are wanted, and whether every key was passed by."""
    newest: list[tuple[int, str, JobRecord]] = []
    count, scanned, batch = 0, 0, list[str]()

    async def take(ids: Sequence[str]) -> None:
        nonlocal count
        for job in await _read_in(store, ids, wanted.states & ENDED):
            if not wanted.takes(job, now):
                continue
            count += 1
            heapq.heappush(newest, (job.ended_at, job.id, job))
            if len(newest) > limit:
                heapq.heappop(newest)

    async for key in store.scan(store.keys.job("*")):
        scanned += 1
        job_id = store.keys.job_of(key)
        if job_id:
            batch.append(job_id)
        if len(batch) == PAGE:
            await take(batch)
            batch.clear()
        if scanned >= SCANNED_MAX:
            break
    await take(batch)
    return [job for _, _, job in sorted(newest, reverse=True)], count - len(newest), scanned < SCANNED_MAX


async def _read_in(store: Store, ids: Sequence[str], states: frozenset[State]) -> list[JobRecord]:
    """Reads those of the jobs that are in one of these states: a look at the state costs little, a record more."""
    told = await asyncio.gather(*(store.command("HGET", store.keys.job(job_id), "state") for job_id in ids))
    words = {state.value.encode() for state in states}
    found = await read(store, [job_id for job_id, state in zip(ids, told, strict=True) if state in words])
    return [job for job in found if job is not None]


async def read(store: Store, ids: Iterable[str]) -> list[JobRecord | None]:
    """Reads jobs as far as a list needs it; None for one that is gone."""
    names = list(ids)
    told = await asyncio.gather(*(store.command("HMGET", store.keys.job(i), *_FIELDS) for i in names))
    return [
        JobRecord.from_values(_FIELDS, values, id=i) if values[0] is not None else None
        for i, values in zip(names, told, strict=True)
    ]
