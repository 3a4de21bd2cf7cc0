"""Every key of the namespace, by the row of the key table that it belongs to: how many, how much memory, how long they
live, and which of them have no owner or no end.
"""

import asyncio
from dataclasses import dataclass, field

from broker.keyspace import Family
from broker.lifecycle import ENDED
from broker.policies import Active
from broker.store import Store

PAGE = 500
SCANNED_MAX = 500_000
"""Keys that one look passes by."""

FAULTS_MAX = 100
"""Faults that are named; the others are counted."""

FOREVER, GONE = -1, -2
"""What PTTL says of a key without an end, and of one that is not there."""

MUST_END = frozenset(
    (
        "jobs:<caller>",
        "downgrades:<model>",
        "sticky:<model>",
        "wake:<model>",
        "model:<model>:<host>",
        "learned:<model>:<host>",
        "host:<host>",
        "usage:<day>",
        "usage:<day>:<caller>:<lane>:<model>:<model>",
        "active:<lane>",
        "line:<lane>",
        "count:<id>",
        "webhook_list:<caller>",
        "webhook_endpoint:<digest>",
        "spent:<caller>:<day>",
        "file:<id>",
        "file:<id>:parts",
        "files:<caller>",
        "batch:<id>",
        "batch:<id>:window",
        "batch:<id>:names",
        "batches:<caller>",
        "batch_idem:<caller>:<digest>",
    )
)
"""Families whose every key has a lifetime, whatever else there is."""

_OF_JOBS = ("job:<id>", "job:<id>:request", "job:<id>:frames", "readers:<id>")
_OF_POLICY = {"lane:<lane>": "lane", "model:<model>": "model", "wake:<model>:epoch": "model"}


@dataclass(kw_only=True)
class FamilyLook:
    """The keys of one row. `endless` have no lifetime now; `shortest_ms` and `longest_ms` are of the others."""

    pattern: str
    type: str
    lifetime: str
    count: int = 0
    bytes: int = 0
    endless: int = 0
    shortest_ms: int = 0
    longest_ms: int = 0

    def add(self, size: int, ttl_ms: int) -> None:
        """Counts one more key."""
        self.count += 1
        self.bytes += size
        if ttl_ms == FOREVER:
            self.endless += 1
            return
        self.shortest_ms = min(self.shortest_ms or ttl_ms, ttl_ms)
        self.longest_ms = max(self.longest_ms, ttl_ms)


@dataclass(kw_only=True)
class Keys:
    """All rows that have keys. `faults`: key -> what is wrong with it."""

    families: list[FamilyLook] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    more_faults: int = 0
    scanned: int = 0
    scanned_all: bool = True


async def look(store: Store, active: Active | None) -> Keys:
    """Reads every key in pages. What looks wrong is looked at again at the end: it may just have been on its way."""
    found, rows, suspects = Keys(), dict[str, FamilyLook](), list[bytes]()
    page: list[bytes] = []
    async for name in store.scan_names(store.keys.everything):
        found.scanned += 1
        page.append(name)
        if len(page) == PAGE:
            suspects += await _page(store, active, page, rows)
            page.clear()
        if found.scanned >= SCANNED_MAX:
            found.scanned_all = False
            break
    suspects += await _page(store, active, page, rows)
    for name in suspects:
        fault = await _fault_now(store, active, name)
        if fault and len(found.faults) < FAULTS_MAX:
            found.faults[name.decode(errors="backslashreplace")] = fault
        elif fault:
            found.more_faults += 1
    found.families = sorted(rows.values(), key=lambda row: -row.bytes)
    return found


async def _page(store: Store, active: Active | None, page: list[bytes], rows: dict[str, FamilyLook]) -> list[bytes]:
    """Counts some keys; gives those with which something seems wrong."""
    count = len(page)
    told = await asyncio.gather(
        *(store.command("PTTL", name) for name in page),
        *(store.command("MEMORY", "USAGE", name) for name in page),
        *(store.command("TYPE", name) for name in page),
    )
    families = [_family(store, name) for name in page]
    for family, ttl, size in zip(families, told[:count], told[count : 2 * count], strict=True):
        pattern = family.pattern if family else "?"
        if int(ttl) == GONE:
            continue
        if pattern not in rows:
            rows[pattern] = FamilyLook(
                pattern=pattern, type=family.type if family else "", lifetime=family.lifetime if family else "unknown"
            )
        rows[pattern].add(int(size or 0), int(ttl))
    faults = await asyncio.gather(
        *(
            _fault(store, active, name, family, kind=kind.decode(), ttl_ms=int(ttl))
            for name, family, ttl, kind in zip(page, families, told[:count], told[2 * count :], strict=True)
        )
    )
    return [name for name, fault in zip(page, faults, strict=True) if fault]


def _family(store: Store, name: bytes) -> Family | None:
    try:
        return store.keys.family(name.decode())
    except UnicodeDecodeError:
        return None


async def _fault_now(store: Store, active: Active | None, name: bytes) -> str:
    """Looks at one key anew."""
    ttl, kind = await asyncio.gather(store.command("PTTL", name), store.command("TYPE", name))
    return await _fault(store, active, name, _family(store, name), kind=kind.decode(), ttl_ms=int(ttl))


async def _fault(
    store: Store, active: Active | None, name: bytes, family: Family | None, *, kind: str, ttl_ms: int
) -> str:
    """Says what is wrong with a key; "" where nothing is, or where it is gone by now."""
    if kind == "none" or ttl_ms == GONE:
        return ""
    if family is None:
        return "no row of the key table knows it: it has no owner"
    key = name.decode()
    if kind != family.type:
        return f"is a {kind}, the key table says {family.type}"
    if family.pattern in _OF_POLICY:
        return _fault_of_policy(store, active, key, _OF_POLICY[family.pattern])
    if ttl_ms != FOREVER:
        return ""
    if family.pattern in _OF_JOBS:
        return await _fault_of_jobs(store, key)
    if family.pattern in MUST_END:
        return f"has no lifetime; it should live {family.lifetime}"
    if family.pattern == "idem:<caller>:<digest>":
        job_id = ((await store.command("GET", key)) or b"").decode().partition(" ")[0]
        return "" if await _lives(store, job_id) else "has no lifetime, and its job has ended"
    if family.pattern == "retries:<caller>:<digest>":
        waits = await store.command("ZCOUNT", key, "+inf", "+inf")
        return "" if waits else "has no lifetime, and no live job is in it"
    return ""


async def _fault_of_jobs(store: Store, key: str) -> str:
    job_id = store.keys.named_in(key)
    if await _lives(store, job_id):
        return ""
    there = await store.command("EXISTS", store.keys.job(job_id))
    if await store.command("PTTL", key) != FOREVER:
        return ""  # it has ended in between
    return "has no lifetime, and its job has ended" if there else "has no owner: its job is gone"


def _fault_of_policy(store: Store, active: Active | None, key: str, kind: str) -> str:
    if active is None:
        return ""
    name = store.keys.named_in(key)
    known = active.lanes() if kind == "lane" else active.models()
    return "" if name in known else f"has no owner: the policy has no {kind} {name}"


async def _lives(store: Store, job_id: str) -> bool:
    state = await store.command("HGET", store.keys.job(job_id), "state") if job_id else None
    return state is not None and state.decode() not in ENDED
