"""`gateway tune`: what to change in the policy, by what the last days showed. Nothing is applied."""

import asyncio
import json
from typing import Annotated
from urllib.parse import urlencode

import typer

from api.cli_policy import AsJson
from api.client import ask, no_gateway
from api.tune_text import is_tuning, tune_text


def tune(
    since: Annotated[str, typer.Option(help="Days or weeks back, today included (2d, 1w), or a first date.")] = "2d",
    until: Annotated[str, typer.Option(help="The last date, UTC.  [default: today]")] = "",
    as_json: AsJson = False,
) -> None:
    """Proposes slots, queue budgets, cold-start budgets and lanes, with reasons: YAML to merge into the policy."""
    told = asyncio.run(ask("GET", f"/v1/tune?{urlencode({'since': since, 'until': until})}"))
    if not is_tuning(told):
        raise no_gateway()
    print(json.dumps(told, indent=2) if as_json else tune_text(told))
