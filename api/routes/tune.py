"""GET /v1/tune: what an operator may want to change in the policy, with the reasons; nothing is changed."""

from typing import Any

from fastapi import APIRouter

from api.auth import Admin, Gate
from api.described import Described, described, says
from api.query import KNOWN
from broker import errors
from broker.dialects.json_schema import text
from broker.tune_facts import tuning

router = APIRouter(tags=["operator"])


@router.get("/v1/tune", dependencies=KNOWN)
@described(
    Described(
        "Proposals for the policy", "operator", says("What to change and why; nothing is applied.", "Tuning"),
        query={
            "since": text("Days or weeks back, today included (2d, 1w), or the first date; 2d unless it is said."),
            "until": text("The last date, UTC; today unless it is said."),
        },
        fails=(errors.AdminOnly, errors.BadRequest, errors.ModelUnavailable, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def tune(gateway: Gate, _admin: Admin, since: str = "2d", until: str = "") -> dict[str, Any]:
    """Judges the days from `since` to `until`, both included, by what is learned of the models now."""
    return await tuning(gateway.store, gateway.book, gateway.fleet, since=since, until=until)
