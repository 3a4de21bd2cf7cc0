"""`gateway dead`: jobs that were given up on, and why; try them again, or let their letters go."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from api.cli_policy import AsJson
from api.client import ask, part
from api.exit_codes import USAGE, Failed
from api.terminal import harmless

PAGE = 100
WORDS_SHOWN = 60

dead_app = typer.Typer(help="Jobs that were given up on: list, show, retry, drop.", no_args_is_help=True)

Letters = Annotated[
    list[str] | None, typer.Argument(metavar="ID...", help="Letters, or their jobs.", show_default=False)
]
All = Annotated[bool, typer.Option("--all", help="All that you may see; with --caller only that one's.")]
Of = Annotated[str, typer.Option("--caller", help="Only this caller's.", show_default=False)]


@dead_app.command("list")
def dead_list(
    caller: Of = "",
    limit: Annotated[int, typer.Option(help="How many, the newest first.", min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """Lists what was given up on."""
    letters, there_are_more = asyncio.run(_some(caller, limit))
    if there_are_more:
        typer.echo("note: there are older ones; --limit shows more", err=True)
    if as_json:
        print(json.dumps(letters, indent=2))
        return
    if not letters:
        print("no dead letters")
    for letter in letters:
        words = [letter["id"], _instant(letter["at"]), letter["caller"] or "-", letter["job"], letter["lane"]]
        print(harmless("  ".join([*words, f"{letter['code']}: {_short(letter['message'])}"])))


@dead_app.command("show")
def dead_show(letter: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Shows one, and whether it can still be tried again."""
    asyncio.run(_show(letter, as_json=as_json))


@dead_app.command("retry")
def dead_retry(letters: Letters = None, every: All = False, caller: Of = "") -> None:
    """Tries jobs again from their kept requests; prints the new jobs' ids. Those that cannot be are named on stderr."""
    asyncio.run(_each(letters or [], caller, every=every, method="POST", end="/retry", tells="id"))


@dead_app.command("drop")
def dead_drop(letters: Letters = None, every: All = False, caller: Of = "") -> None:
    """Lets letters go; prints the jobs that they were about."""
    asyncio.run(_each(letters or [], caller, every=every, method="DELETE", end="", tells="job"))


async def _show(name: str, *, as_json: bool) -> None:
    letter = await ask("GET", f"/v1/dead/{part(name)}")
    try:
        job: dict[str, Any] | None = await ask("GET", f"/v1/jobs/{part(letter['job'])}")
    except Failed:
        job = None
    if as_json:
        print(json.dumps({**letter, "job_record": job}, indent=2))
        return
    rows = {
        "letter": letter["id"],
        "at": _instant(letter["at"]),
        "job": letter["job"] if job is not None else f"{letter['job']} (no longer kept)",
        "caller": letter["caller"] or "-",
        "lane": letter["lane"],
        "model": letter["model"] or "-",
        "ended": f"{letter['state'] or 'failed'} after {letter['losses']} losses",
        "error": f"{letter['code']}: {letter['message']}",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(harmless(f"{name:<{width}}  {value}"))


async def _each(names: list[str], caller: str, *, every: bool, method: str, end: str, tells: str) -> None:
    if bool(names) == every:
        raise Failed("name letters, or say --all.", USAGE)
    if caller and not every:
        raise Failed("--caller goes with --all.", USAGE)
    failed = 0
    async for name in _all(caller) if every else _given(names):
        try:
            print((await ask(method, f"/v1/dead/{part(name)}{end}"))[tells])
        except Failed as problem:
            if problem.code != Failed("").code:  # nobody answers: the others would hear the same
                raise
            failed += 1
            typer.echo(harmless(f"{name}: {problem}"), err=True)
    if failed:
        raise Failed(f"{failed} of them could not be.")


async def _given(names: list[str]) -> AsyncIterator[str]:
    for name in names:
        yield name


async def _all(caller: str) -> AsyncIterator[str]:
    """Every letter that is there now, from the newest on: those that come meanwhile wait for the next time."""
    after = ""
    while True:
        told = await ask("GET", f"/v1/dead?limit={PAGE}&caller={part(caller)}&after={part(after)}")
        for letter in told["data"]:
            yield letter["id"]
        after = told["next"]
        if not after:
            return


async def _some(caller: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """The newest letters, and whether there are older ones."""
    found: list[dict[str, Any]] = []
    after = ""
    while len(found) <= limit:
        most = min(PAGE, limit + 1 - len(found))
        told = await ask("GET", f"/v1/dead?limit={most}&caller={part(caller)}&after={part(after)}")
        found += told["data"]
        after = told["next"]
        if not after:
            break
    return found[:limit], len(found) > limit


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WORDS_SHOWN else f"{line[: WORDS_SHOWN - 3]}..."


def _instant(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
