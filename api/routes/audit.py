"""GET /v1/audit: what left the machine, for an operator; a page at a time, oldest first."""

import re
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from api.auth import Admin, Gate
from api.described import Described, described, says
from api.query import KNOWN
from broker import errors
from broker.dialects.json_schema import text, whole
from broker.trust import audit

router = APIRouter(tags=["operator"])

SINCE_MS_MAX = 3_650 * audit.DAY_MS

_ID = re.compile(r"(?:\d{1,19}-\d{1,19})?")


@router.get("/v1/audit", dependencies=KNOWN)
@described(
    Described(
        "What left the machine", "operator", says("A page of its records, never a word of what they tell of.", "Audit"),
        query={
            "since_ms": whole("Records of the last so many ms; of a week unless said.", least=1, most=SINCE_MS_MAX),
            "after": text("The `next` of the page before.", pattern=f"^{_ID.pattern}$"),
        },
        fails=(errors.AdminOnly, errors.BadRequest, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def read_audit(gateway: Gate, _admin: Admin, since_ms: int = 7 * audit.DAY_MS, after: str = "") -> dict[str, Any]:
    """Gives the records of the last `since_ms`; `next` is the `after` of the next page, "" where this is the last."""
    if not 0 < since_ms <= SINCE_MS_MAX:
        raise errors.BadRequest(f"since_ms must be 1 to {SINCE_MS_MAX}", "since_ms")
    if not _ID.fullmatch(after):
        raise errors.BadRequest("after must be the id of a record", "after")
    records = await audit.read(gateway.store, since_ms=since_ms, after=after)
    return {
        "records": [asdict(record) for record in records],
        "next": records[-1].id if len(records) == audit.PAGE else "",
    }
