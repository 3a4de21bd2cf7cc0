"""`gateway batch run`: a file of requests as jobs, with a bar for whoever looks at a terminal."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from api import exit_codes
from api.cli_policy import AsJson
from api.exit_codes import BUSY, INTERRUPTED, REFUSED, TERMINATED, UNREACHABLE, UNWRITTEN, USAGE, Failed
from api.output import or_else

if TYPE_CHECKING:
    from api.batch_run import BatchRun, Tally

CONCURRENCY_MAX = 512
"""A caller may have twice as many requests under way."""

LOOK_EVERY_S = 0.25

_GOES_ON = " The same command again goes on from here."
_AGAIN = dict.fromkeys((UNREACHABLE, BUSY, INTERRUPTED, TERMINATED), _GOES_ON)
_AGAIN[REFUSED] = _AGAIN[UNWRITTEN] = " Once that is mended, the same command goes on from here."
"""What the same words lead to, by the code of what a run ended with: wrong words lead nowhere."""

batch_app = typer.Typer(help="Many requests at once, from a file.", no_args_is_help=True)


@batch_app.callback()
def _batch() -> None:
    """Keeps `run` a word of its own: a group with one command would swallow it."""


@batch_app.command("run")
def batch_run(
    file: Annotated[
        Path, typer.Argument(metavar="REQUESTS", help="One request a line, as in OpenAI's batches.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where answers are added, one a line.", show_default=False)
    ],
    errors: Annotated[
        Path | None, typer.Option(help="… and lines that failed.  [default: OUTPUT with .errors before its end]")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Jobs under way at once.", min=1, max=CONCURRENCY_MAX)] = 32,
    lane: Annotated[str, typer.Option(help="The lane to enter, instead of the models'.", show_default=False)] = "",
    expires_after: Annotated[str, typer.Option(help="How long each may wait, like 12h.", show_default=False)] = "",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed lines of an earlier run again.")
    ] = False,
    patience: Annotated[
        str, typer.Option(help="How long to go on while the gateway is away or takes nothing.")
    ] = "15m",
    as_json: AsJson = False,
) -> None:
    """Runs every request of a file. The same command again goes on where it was; nothing is paid for twice."""
    from api.cli_answer import length_s

    if not output.name:
        raise Failed("--output must name a file.", USAGE)
    order = {name: value for name, value in {"lane": lane, "expiresAfter": expires_after}.items() if value}
    failures = errors or output.with_suffix(f".errors{output.suffix}")
    if len({path.resolve() for path in (file, output, failures)}) < 3:
        raise Failed("The requests, the output and the errors must be three files.", USAGE)
    files = Files(file, output, failures)
    run = run_files(
        files, order, concurrency=concurrency, patience_s=length_s(patience), retry_failed=retry_failed, as_json=as_json
    )
    asyncio.run(run)


@dataclass(frozen=True)
class Files:
    """Where the requests are, and where answers and failures go."""

    requests: Path
    output: Path
    errors: Path


async def run_files(
    files: Files, order: dict[str, Any], *, concurrency: int, patience_s: float, retry_failed: bool, as_json: bool
) -> None:
    """Runs them and says how it went; whatever is not done is a Failed with its exit code."""
    from api.batch_files import Requests, Written
    from api.batch_run import BatchRun, Options
    from api.jobs_client import jobs_client
    from api.patience import Patience

    run: BatchRun | None = None
    reason: Failed | None = None
    try:
        async with _stoppable():
            with (
                Requests(files.requests) as requests,
                Written(files.output) as output,
                Written(files.errors, temporary=True) as errors,
            ):
                given_up = errors.jobs() if retry_failed else {}
                async with jobs_client(connections_max=concurrency) as jobs:
                    options, patience = Options(concurrency, order), Patience(patience_s)
                    run = BatchRun(
                        jobs, requests, output, errors, options=options, patience=patience, given_up=given_up
                    )
                    async with _bar(run):
                        await run.run()
    except Failed as failure:
        reason = failure
    if run is None:
        raise reason or Failed("Nothing was begun.")
    _say(run.tally, reason, files, as_json=as_json)


@asynccontextmanager
async def _stoppable() -> AsyncIterator[None]:
    """Makes of Ctrl-C and of SIGTERM a Failed: what is handed in goes on, and can be come back to."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    codes: list[int] = []

    def stop(code: int) -> None:
        codes.append(code)
        task.cancel()

    for number, code in ((signal.SIGINT, exit_codes.INTERRUPTED), (signal.SIGTERM, exit_codes.TERMINATED)):
        loop.add_signal_handler(number, stop, code)
    try:
        yield
    except asyncio.CancelledError:
        if not codes:
            raise
        raise Failed("Stopped", codes[0]) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@asynccontextmanager
async def _bar(run: "BatchRun") -> AsyncIterator[None]:
    """Shows how far a run is, where stderr is a terminal. By rich, which the tables are drawn with anyway."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed"), TextColumn("{task.fields[waits]}", style="dim", markup=False),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, auto_refresh=False, speed_estimate_period=300) as progress:
        tally = run.tally
        bar = progress.add_task("", total=tally.total, completed=tally.ended, rate="", failed=tally.failed, waits="")

        def show() -> None:
            speed = progress.tasks[0].finished_speed or progress.tasks[0].speed
            rate = f"{speed:.1f}/s" if speed else ""
            waits = f"waits: {run.waits_for}" if run.waits_for else ""
            progress.update(bar, completed=tally.ended, rate=rate, failed=tally.failed, waits=waits, refresh=True)

        async def watch() -> None:
            while True:
                show()
                await asyncio.sleep(LOOK_EVERY_S)

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            show()


def _say(tally: "Tally", reason: Failed | None, files: Files, *, as_json: bool) -> None:
    """Says how it went, in a line, and ends with the code for it."""
    done = f"{tally.done:,} of {tally.total:,} answered in {files.output}"
    failed = f", {tally.failed:,} failed, in {files.errors}" if tally.failed else ""
    if reason is not None:
        goes_on = f" {tally.under_way:,} jobs go on." if tally.under_way else ""
        again = _AGAIN.get(reason.code, "")
        sentence = f"{str(reason).rstrip('.')}: {done}{failed}.{goes_on}{again}"
    elif tally.failed:
        sentence = f"{done}{failed}; --retry-failed tries those again."
    else:
        sentence = f"{done}."
    if as_json:
        shown = {"total": tally.total, "done": tally.done, "failed": tally.failed, "left": tally.left}
        errors = str(files.errors) if tally.failed else None
        with or_else(sentence):
            print(json.dumps(shown | {"output": str(files.output), "errors": errors}))
    if reason is not None or tally.failed:
        raise Failed(sentence, exit_codes.FAILED if reason is None else reason.code)
    print(sentence, file=sys.stderr)
