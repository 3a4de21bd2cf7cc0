"""Dead letters over HTTP: what was given up on and why; try it again, or let it go. What `gateway dead` asks for."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from api.auth import Caller, CountedCaller, Gate, whose
from api.described import Described, described, says
from api.gateway import Gateway
from api.paging import checked
from api.query import KNOWN
from api.routes.job_lists import LIMIT, LIMITS
from api.routes.jobs import own_job
from api.routes.new_jobs import RETRIED, RETRY_FAILS, taken, tried_again
from broker import callers, dead, errors
from broker.dead import Letter
from broker.dialects.json_schema import text

router = APIRouter(tags=["jobs"])

_WITHIN = {"letter": text("Its own id, or that of its job while that is kept.")}
_FAILS = (errors.NoSuchLetter, errors.BrokerUnavailable)
_NAME_CHARACTERS_MAX = 64


@router.get("/v1/dead", dependencies=KNOWN)
@described(
    Described(
        "List dead letters", "jobs", says("A page of jobs that were given up on, newest first.", "Letters"),
        query={
            "caller": text("Only this caller's; who is no administrator sees its own anyway."),
            "after": text("The `next` of the page before.", pattern=r"^(\d{1,19}-\d{1,19})?$"),
            "limit": LIMITS,
        },
        fails=(errors.AdminOnly, errors.BadRequest, errors.CallerTooMany, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def list_letters(
    gateway: Gate, me: CountedCaller, caller: str = "", after: str = "", limit: int = LIMIT
) -> dict[str, Any]:
    """Lists dead letters, never with a word of what their jobs held."""
    if after and not dead.is_id(after):
        raise errors.BadRequest("after must be the id of a dead letter", "after")
    owner, limit = whose(me, caller, "dead letters"), checked(limit, dead.PAGE_MAX)
    page = await dead.page(gateway.store, caller=owner, after=after, limit=limit)
    return {"object": "list", "data": [asdict(letter) for letter in page.letters], "next": page.next}


@router.get("/v1/dead/{letter}")
@described(
    Described("Look at a dead letter", "jobs", says("Whose, and why.", "Letter"), within=_WITHIN, fails=_FAILS)
)  # fmt: skip
async def show_letter(letter: str, gateway: Gate, me: Caller) -> dict[str, Any]:
    """Shows one."""
    return asdict(await _find(gateway, letter, me))


@router.post("/v1/dead/{letter}/retry", status_code=202, response_class=Response)
@described(
    Described(
        "Try what was given up on again", "jobs", {202: RETRIED}, within=_WITHIN,
        words="As for its job; the letter goes with it.", fails=(errors.NoSuchLetter, *RETRY_FAILS),
    )
)  # fmt: skip
async def retry_letter(letter: str, gateway: Gate, me: CountedCaller) -> Response:
    """Tries the job of a letter again."""
    found = await _find(gateway, letter, me)
    try:
        old = await own_job(gateway, found.job, me)
    except errors.NoSuchJob:
        raise errors.NotRetryable(f"the request of job {found.job} is no longer kept") from None
    again = await tried_again(gateway, old, me)
    await dead.drop(gateway.store, found)
    status, headers, body = await taken(gateway, again)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


@router.delete("/v1/dead/{letter}")
@described(
    Described("Let a dead letter go", "jobs", says("It, for the last time.", "Letter"), within=_WITHIN, fails=_FAILS)
)  # fmt: skip
async def drop_letter(letter: str, gateway: Gate, me: Caller) -> dict[str, Any]:
    """Takes a letter out. Its job stays for as long as it is kept."""
    found = await _find(gateway, letter, me)
    await dead.drop(gateway.store, found)
    return asdict(found)


async def _find(gateway: Gateway, name: str, me: callers.Caller) -> Letter:
    if len(name) > _NAME_CHARACTERS_MAX:
        raise errors.NoSuchLetter(name)
    return await dead.find(gateway.store, name, caller=whose(me, "", "dead letters"))
