"""`gateway audit`: what left the machine, as its records say."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from api.cli_policy import AsJson
from api.client import ask, part
from api.durations import length_ms
from api.exit_codes import USAGE, Failed


def audit(
    since: Annotated[str, typer.Option(help="How far back: 90m, 12h, 7d.")] = "7d",
    as_json: AsJson = False,
) -> None:
    """Lists what left the machine: when, whose, to whom, how much, past which rules. Never what it said."""
    try:
        since_ms = length_ms(since)
    except ValueError as wrong:
        raise Failed(f"--since: {wrong}.", USAGE) from None
    asyncio.run(_print(since_ms, as_json=as_json))


async def _print(since_ms: int, *, as_json: bool) -> None:
    records = [record async for record in _records(since_ms)]
    if as_json:
        print(json.dumps(records, indent=2))
        return
    if not records:
        print("nothing left the machine in that time")
    for record in records:
        print(_line(record))


async def _records(since_ms: int) -> AsyncIterator[dict[str, Any]]:
    after = ""
    while True:
        told = await ask("GET", f"/v1/audit?since_ms={since_ms}&after={part(after)}")
        for record in told["records"]:
            yield record
        after = told["next"]
        if not after:
            return


def _line(record: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(record["at"] / 1000, UTC)
    words = [
        f"{at:%Y-%m-%d %H:%M:%S} UTC",
        record["caller"],
        f"{record['job']}/{record['attempt']}",
        f"{record['lane']} -> {record['provider']}",
        f"{record['bytes']} bytes",
        f"passed {', '.join(record['passed'])}",
    ]
    if record["redacted"]:
        words.append("redacted " + ", ".join(f"{name} x{count}" for name, count in record["redacted"].items()))
    return "  ".join(words)
