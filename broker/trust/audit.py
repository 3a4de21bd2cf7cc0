"""The records of what left: who sent how much to which provider, past which rules. Never a word of it.

`claim.lua` writes them; they go when `auditDays` have passed, with the next record or the next chores.
"""

import json
from dataclasses import dataclass
from typing import Any

from broker.records import decode_hash
from broker.store import Store

PAGE = 500
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Left:
    """One dispatch to a remote model."""

    id: str
    at: int
    caller: str
    job: str
    attempt: int
    endpoint: str
    lane: str
    model: str
    provider: str
    host: str
    bytes: int
    passed: tuple[str, ...]
    redacted: dict[str, int]
    rules: str

    @classmethod
    def from_entry(cls, entry_id: Any, values: Any) -> "Left":
        """Reads an entry of the stream."""
        f = decode_hash(values)
        left: dict[str, Any] = json.loads(f.get("left") or "{}")
        return cls(
            id=entry_id.decode(),
            at=int(f.get("at") or 0),
            caller=f.get("caller", ""),
            job=f.get("job", ""),
            attempt=int(f.get("attempt") or 0),
            endpoint=f.get("endpoint", "/v1/chat/completions"),
            lane=f.get("lane", ""),
            model=f.get("model", ""),
            provider=f.get("provider", ""),
            host=f.get("host", ""),
            bytes=int(left.get("bytes") or 0),
            passed=tuple(left.get("passed") or ()),
            redacted=dict(left.get("redacted") or {}),
            rules=f.get("rules", ""),
        )


async def read(store: Store, *, since_ms: int, after: str = "") -> list[Left]:
    """Gives the records of the last `since_ms`, oldest first, at most PAGE; `after` is the id of the last one known."""
    since = await store.now_ms() - since_ms
    start = f"({after}" if after else str(max(0, since))
    found = await store.command("XRANGE", store.keys.audit, start, "+", "COUNT", PAGE)
    return [Left.from_entry(entry, values) for entry, values in found or []]


async def trim(store: Store, *, days: int) -> int:
    """Lets records go that are older than this; gives how many."""
    oldest = await store.now_ms() - days * DAY_MS
    return int(await store.command("XTRIM", store.keys.audit, "MINID", oldest))
