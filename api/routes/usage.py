"""GET /v1/usage: who used what, in how many days, added up as the question says."""

from typing import Any

from fastapi import APIRouter

from api.auth import Caller, Gate, whose
from api.described import Described, described, says
from api.query import KNOWN
from broker import errors, usage
from broker.dialects.json_schema import text
from broker.policy.sentences import near_words
from broker.usage_report import BY, Report

router = APIRouter(tags=["usage"])


@router.get("/v1/usage", dependencies=KNOWN)
@described(
    Described(
        "Who used what", "usage", says("Added up, a row for each of what `by` names.", "Usage"),
        query={
            "since": text("Days or weeks back, today included (7d, 2w), or the first date; 7d unless it is said."),
            "until": text("The last date, UTC; today unless it is said."),
            "by": text("What has a row: day, caller, lane, model or some with commas; caller,model unless said."),
            "caller": text("Only this caller's; who is no administrator sees its own anyway."),
        },
        fails=(errors.AdminOnly, errors.BadRequest, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def show_usage(
    gateway: Gate, me: Caller, since: str = "7d", until: str = "", by: str = "caller,model", caller: str = ""
) -> dict[str, Any]:
    """Adds up the days from `since` to `until`, both included, by any of `day,caller,lane,model`."""
    report = Report(_named(by), caller=whose(me, caller, "usage") or None)
    first, last = await usage.days(gateway.store, since, until)
    await usage.tell(gateway.store, report, first, last)
    return report.as_json(first, last)


def _named(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    for word in found:
        if word not in BY:
            near = near_words(word, BY, most=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise errors.BadRequest(f"{word[:40]!r} is none of {', '.join(BY)}{hint}", "by")
    return found
