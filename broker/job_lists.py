"""Lists of asynchronous jobs, newest first: whose, page by page, filtered by what their records say."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from broker.records import JobRecord
from broker.store import Store

PAGE_MAX = 100
LOOKED_AT_MAX = 1_000
"""Records that one request looks at, whatever its filters let through; the next one goes on from there."""


@dataclass(frozen=True)
class Page:
    """Some jobs, and the `after` of the next page, "" where this is the last."""

    jobs: list[JobRecord]
    next: str


async def page(
    store: Store, callers: Sequence[str], *, fits: Callable[[JobRecord], bool], after: str = "", limit: int = PAGE_MAX
) -> Page:
    """Gives the jobs of these callers that fit, newest first, from behind the job `after`.

    A job that is forgotten leaves the lists here, if no newer one of its caller has looked for it.
    """
    found: list[JobRecord] = []
    for _ in range(LOOKED_AT_MAX // PAGE_MAX):
        ids = await _ids(store, callers, after)
        for owner, job_id, job in await _read(store, ids):
            if job is None:
                await store.command("ZREM", store.keys.jobs(owner), job_id)
            elif fits(job):
                found.append(job)
                if len(found) == limit:
                    return Page(found, job_id)
        if len(ids) < PAGE_MAX:
            return Page(found, "")
        after = ids[-1][1]
    return Page(found, after)


async def _ids(store: Store, callers: Sequence[str], after: str) -> list[tuple[str, str]]:
    """The newest jobs behind `after`, PAGE_MAX at most: caller, id."""
    newest = f"({after}" if after else "+"
    listed = await asyncio.gather(
        *(
            store.command("ZREVRANGEBYLEX", store.keys.jobs(caller), newest, "-", "LIMIT", 0, PAGE_MAX)
            for caller in callers
        )
    )
    ids = [(caller, told.decode()) for caller, page in zip(callers, listed, strict=True) for told in page]
    return sorted(ids, key=lambda one: one[1], reverse=True)[:PAGE_MAX]


async def _read(store: Store, ids: list[tuple[str, str]]) -> list[tuple[str, str, JobRecord | None]]:
    raws = await asyncio.gather(*(store.hash(store.keys.job(job_id)) for _, job_id in ids))
    return [
        (caller, job_id, JobRecord.from_hash(raw) if raw else None)
        for (caller, job_id), raw in zip(ids, raws, strict=True)
    ]
