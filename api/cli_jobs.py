"""`gateway job`: one's jobs, from any machine: look, follow, fetch the answer, cancel, try again."""

import json
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from api.cli_completion import job_ids, models
from api.cli_policy import AsJson
from api.status_table import duration
from api.terminal import harmless

if TYPE_CHECKING:
    from api.jobs_client import JobsClient

PAGE_MAX, LIMIT_MAX = 100, 10_000

job_app = typer.Typer(help="One's jobs: look, follow, fetch, cancel, try again.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.", autocompletion=job_ids, show_default=False)]
Timeout = Annotated[str, typer.Option(help="The longest wait, like 10m; the job goes on after it.", show_default=False)]


@job_app.command("show")
def job_show(job_id: JobId, as_json: AsJson = False) -> None:
    """Shows what became of a job."""
    _do(job_id, lambda jobs: jobs.look(job_id), as_json=as_json)


@job_app.command("list")
def job_list(
    state: Annotated[str, typer.Option(help="Only those in this state.", show_default=False)] = "",
    lane: Annotated[str, typer.Option(help="Only those of this lane.", show_default=False)] = "",
    model: Annotated[
        str, typer.Option(help="Only those of this model.", autocompletion=models, show_default=False)
    ] = "",
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only those of which this was noted.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=LIMIT_MAX)] = 20,
    after: Annotated[str, typer.Option(metavar="ID", help="Only older ones than this.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """Lists jobs that were handed in, newest first."""
    from api.cli_answer import once, pair, with_jobs

    filters = {"state": state, "lane": lane, "model": model}
    filters |= {f"metadata[{key}]": value for key, value in map(pair, metadata or [])}

    async def run(jobs: "JobsClient") -> None:
        found: list[dict[str, Any]] = []
        more = after
        while len(found) <= limit:
            page = min(PAGE_MAX, limit + 1 - len(found))
            told = await once(partial(jobs.page, **filters, after=more, limit=page))
            found, more = found + told["data"], told["next"]
            if not more:
                break
        found, more = found[:limit], found[limit - 1]["id"] if len(found) > limit else ""
        if as_json:
            print(json.dumps({"data": found, "next": more}, indent=2))
        else:
            _print_jobs(found)
            if more:
                typer.echo(f"note: there are older ones; --limit shows more, --after {more} goes on", err=True)

    with_jobs(run)


@job_app.command("cancel")
def job_cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancels a job in any state."""
    _do(job_id, lambda jobs: jobs.cancel(job_id), as_json=as_json)


@job_app.command("retry")
def job_retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Hands the request of a job that ended badly in again, and prints the new job's id."""
    from api.cli_answer import once, with_jobs

    about: dict[str, Any] = {}

    async def run(jobs: "JobsClient") -> None:
        about.update(await once(partial(jobs.retry, job_id)))
        print(json.dumps(about, indent=2) if as_json else about["id"])

    with_jobs(run, about)


@job_app.command("tail")
def job_tail(job_id: JobId, timeout: Timeout = "", as_json: AsJson = False) -> None:
    """Prints a job's answer as it comes, from its beginning."""
    from api.cli_answer import length_s, once, tell_as_it_comes, with_jobs

    timeout_s = length_s(timeout) if timeout else None
    about: dict[str, Any] = {}

    async def run(jobs: "JobsClient") -> None:
        about.update(await once(partial(jobs.look, job_id)))
        await tell_as_it_comes(jobs, about, as_json=as_json, timeout_s=timeout_s)

    with_jobs(run, about)


@job_app.command("result")
def job_result(
    job_id: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
    timeout: Timeout = "",
    as_json: AsJson = False,
) -> None:
    """Prints a job's answer; with --json the whole of it."""
    from api.cli_answer import length_s, once, tell, until_ended, with_jobs
    from api.exit_codes import UNFINISHED, Failed
    from broker.lifecycle import ENDED

    timeout_s = length_s(timeout) if timeout else None
    about: dict[str, Any] = {}

    async def run(jobs: "JobsClient") -> None:
        about.update(await once(partial(jobs.look, job_id)))
        if wait or timeout:
            about.update(await until_ended(jobs, about, timeout_s=timeout_s))
        if about["state"] not in ENDED:
            raise Failed(f"Job {job_id} has no answer yet: it is {about['state']}.", UNFINISHED)
        await tell(jobs, about, as_json=as_json)

    with_jobs(run, about)


def _do(job_id: str, call: Any, *, as_json: bool) -> None:
    from api.cli_answer import once, with_jobs

    async def run(jobs: "JobsClient") -> None:
        _print_job(await once(partial(call, jobs)), as_json=as_json)

    with_jobs(run)


def _print_job(job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(job, indent=2))
        return
    rows = {
        "job": job["id"],
        "state": job["state"],
        "lane": job["lane"] if job["asked"] == job["lane"] else f"{job['lane']} (asked for {job['asked']})",
        "served by": job["served_by"] or "-",
        "queued": _between(job, "submitted_at", "claimed_at"),
        "first token": _between(job, "submitted_at", "first_token_at"),
        "whole": _between(job, "submitted_at", "ended_at"),
        "attempts": str(job["attempt"]),
    }
    if job["state"] == "scheduled":
        rows["starts"] = _instant(job["not_before"])
    if job.get("spilled"):
        rows["spilled"] = f"at once ({job['spilled']})"
    if job["promotions"]:
        rows["promoted"] = f"{job['promotions']} times"
    if job.get("metadata"):
        rows["metadata"] = ", ".join(f"{key}={value}" for key, value in job["metadata"].items())
    if job.get("retried_as"):
        rows["tried again"] = job["retried_as"]
    if job["error"]:
        rows["error"] = f"{job['error']['code']}: {job['error']['message']}"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(harmless(f"{name:<{width}}  {value}"))


def _print_jobs(jobs: list[dict[str, Any]]) -> None:
    if not jobs:
        print("no such jobs")
        return
    rows = [("JOB", "STATE", "ASKED FOR", "HANDED IN", "NOTED")]
    for job in jobs:
        noted = " ".join(f"{key}={value}" for key, value in job["metadata"].items())
        rows.append((job["id"], job["state"], job["asked"], _instant(job["submitted_at"]), noted))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        print(harmless("  ".join([*cells, row[4]]).rstrip()))


def _between(job: dict[str, Any], start: str, end: str) -> str:
    return duration(job[end] - job[start]) if job[end] else "-"


def _instant(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
