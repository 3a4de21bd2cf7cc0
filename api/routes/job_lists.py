"""GET /v1/jobs: one's own asynchronous jobs, newest first; an administrator's view of everybody's."""

import json
import re
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request

from api.auth import CountedCaller, Gate, whose
from api.described import Described, described, says
from api.gateway import Gateway
from api.paging import checked
from api.query import KNOWN
from broker import callers, errors, job_lists
from broker.dialects.json_schema import one_of, text, whole
from broker.lifecycle import State
from broker.records import JobRecord

router = APIRouter(tags=["jobs"])

_STATES = tuple(state.value for state in State)
_metadata = re.compile(r"metadata\[(.{1,64})\]").fullmatch
_id = re.compile(r"[0-9A-Za-z_-]{0,64}").fullmatch

LIMIT = 20
LIMITS = whole(
    f"How many at most; {LIMIT} unless said. A page may be shorter and not the last.", least=1, most=job_lists.PAGE_MAX
)


@router.get("/v1/jobs", dependencies=KNOWN)
@described(
    Described(
        "List jobs", "jobs", says("A page of jobs that were handed in, newest first.", "Jobs"),
        query={
            "state": one_of("", *_STATES, words="Only those in this state."),
            "lane": text("Only those of this lane."),
            "model": text("Only those of this model: the one that is to serve it, or did."),
            "metadata[key]": text("Only those whose metadata say this of the key; several may be named."),
            "caller": text("Only this caller's; who is no administrator sees its own anyway."),
            "after": text("The `next` of the page before, or the id of any job.", pattern="^[0-9A-Za-z_-]{0,64}$"),
            "limit": LIMITS,
        },
        fails=(errors.AdminOnly, errors.BadRequest, errors.CallerTooMany, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def list_jobs(
    request: Request, gateway: Gate, me: CountedCaller, state: str = "", lane: str = "", model: str = "",
    caller: str = "", after: str = "", limit: int = LIMIT,
) -> dict[str, Any]:  # fmt: skip
    """Lists asynchronous jobs that are still kept."""
    if state not in ("", *_STATES):
        raise errors.BadRequest(f"state must be one of {', '.join(_STATES)}", "state")
    if not _id(after):
        raise errors.BadRequest("after must be the id of a job", "after")
    notes = {found.group(1): value for key, value in request.query_params.items() if (found := _metadata(key))}
    fits = _filter({"state": state, "lane": lane, "model": model}, notes)
    owners, limit = _whose(gateway, me, caller), checked(limit, job_lists.PAGE_MAX)
    page = await job_lists.page(gateway.store, owners, fits=fits, after=after, limit=limit)
    return {"object": "list", "data": [job.public() for job in page.jobs], "next": page.next}


def _whose(gateway: Gateway, me: callers.Caller, asked: str) -> list[str]:
    one = whose(me, asked, "jobs")
    return [one] if one else sorted({*gateway.keys.names, callers.ANONYMOUS, me.name})


def _filter(wanted: dict[str, str], notes: dict[str, str]) -> Callable[[JobRecord], bool]:
    asked = [(name, value) for name, value in wanted.items() if value]

    def fits(job: JobRecord) -> bool:
        if any(getattr(job, name) != value for name, value in asked):
            return False
        told = json.loads(job.metadata) if notes and job.metadata else {}
        return all(told.get(key) == value for key, value in notes.items())

    return fits
