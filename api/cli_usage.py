"""`gateway usage`: who used what, as a table, CSV or JSON."""

import asyncio
import json
import sys
from typing import Annotated
from urllib.parse import urlencode

import typer
from rich.console import Console

from api.cli_policy import AsJson
from api.client import ask
from api.exit_codes import USAGE, Failed
from api.usage_table import usage_csv, usage_table


def usage(
    since: Annotated[str, typer.Option(help="Days or weeks back, today included (7d, 2w), or a first date.")] = "7d",
    until: Annotated[str, typer.Option(help="The last date, UTC.  [default: today]")] = "",
    by: Annotated[str, typer.Option(help="What has a row: day, caller, lane or model, or some.")] = "caller,model",
    caller: Annotated[str, typer.Option(metavar="NAME", help="Only this caller's.")] = "",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, always with the same columns.")] = False,
    as_json: AsJson = False,
) -> None:
    """Shows who used what: jobs, first tokens in time, tokens, slot time."""
    if as_csv and as_json:
        raise Failed("Either --csv or --json.", USAGE)
    question = urlencode({"since": since, "until": until, "by": by, "caller": caller})
    told = asyncio.run(ask("GET", f"/v1/usage?{question}"))
    if as_csv:
        sys.stdout.write(usage_csv(told))
    elif as_json:
        print(json.dumps(told, indent=2))
    else:
        Console(highlight=False, soft_wrap=True).print(usage_table(told), markup=False)
