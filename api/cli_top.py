"""`gateway top`: the gateway on one screen of a terminal, over HTTP like every client command."""

import sys
from typing import Annotated, Any

import typer

from api.client import ask, gateway_url
from api.exit_codes import USAGE, Failed

MISSING = (
    "`gateway top` needs the package textual: pip install 'warmlane[top]'. `gateway status --watch` needs nothing."
)
NO_TERMINAL = "`gateway top` needs a terminal; `gateway status --watch` prints into anything."


def top(
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 1.0,
) -> None:
    """Shows models, lanes, jobs and hosts on one screen: s sorts, / filters, q quits."""
    try:
        from api.top import Top
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] != "textual":
            raise
        raise Failed(MISSING, USAGE) from None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Failed(NO_TERMINAL, USAGE)

    async def look() -> dict[str, Any]:
        return await ask("GET", "/v1/status")

    Top(look, url=gateway_url(), every_s=every_s).run()
