"""`gateway inspect`: what stands in Redis, read from Redis itself, for when the api, a worker or the scheduler is dead.

Nothing is written: a user of Redis with `+@read` alone may run all of it. What is looked at stands in `inspecting`,
which other commands need not wait for.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli_jobs import JobId
from api.cli_policy import AsJson, DataDir

if TYPE_CHECKING:
    from api.inspecting import Look

EVERY_S_MIN = 0.2
LIMIT_MAX = 10_000

inspect_app = typer.Typer(
    help="Look at what stands in Redis, without the api: it reads, and changes nothing.", no_args_is_help=True
)

Watch = Annotated[bool, typer.Option("--watch", help="Look again and again until Ctrl-C.")]
Every = Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=EVERY_S_MIN)]
Limit = Annotated[int, typer.Option(help="How many at most.", min=1, max=LIMIT_MAX)]


@inspect_app.command("lanes")
def inspect_lanes(as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None) -> None:
    """Who waits and runs in each lane, for how long, held by whom."""
    from api.inspecting import at_lanes

    _show(at_lanes, as_json, watch, every_s, data)


@inspect_app.command("jobs")
def inspect_jobs(
    state: Annotated[str, typer.Option(help="A state, or live, running, ended, all.")] = "live",
    lane: Annotated[str, typer.Option(help="Only those of this lane.", show_default=False)] = "",
    caller: Annotated[str, typer.Option(help="Only those of this caller.", show_default=False)] = "",
    model: Annotated[str, typer.Option(help="Only those of this model.", show_default=False)] = "",
    older_than: Annotated[
        str, typer.Option(metavar="TIME", help="Only those submitted so long ago, like 30s.", show_default=False)
    ] = "",
    limit: Limit = 50,
    as_json: AsJson = False,
    watch: Watch = False,
    every_s: Every = 1.0,
    data: DataDir = None,
) -> None:
    """Lists jobs: those of the lanes from the oldest on, ended ones from the newest on."""
    from api.inspecting import at_jobs

    look = at_jobs(state=state, lane=lane, caller=caller, model=model, older_than=older_than, limit=limit)
    _show(look, as_json, watch, every_s, data)


@inspect_app.command("job")
def inspect_job(
    job_id: JobId, as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None
) -> None:
    """One job: its steps with their times, what lies ahead, moves, put-backs and losses. Never what it says."""
    from api.inspecting import at_job

    _show(at_job(job_id), as_json, watch, every_s, data)


@inspect_app.command("hosts")
def inspect_hosts(as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None) -> None:
    """The hosts of the last day, alive or gone, and the models on them."""
    from api.inspecting import at_hosts

    _show(at_hosts, as_json, watch, every_s, data)


@inspect_app.command("locks")
def inspect_locks(as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None) -> None:
    """Wake locks: who holds each, under which epoch, for how much longer."""
    from api.inspecting import at_locks

    _show(at_locks, as_json, watch, every_s, data)


@inspect_app.command("dead")
def inspect_dead(
    limit: Limit = 50, as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None
) -> None:
    """Jobs that were given up on, newest first; `gateway dead` tries them again."""
    from api.inspecting import at_dead

    _show(at_dead(limit), as_json, watch, every_s, data)


@inspect_app.command("keys")
def inspect_keys(as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None) -> None:
    """Every key by its row of the key table: count, memory, lifetime, and those without an owner or an end. It passes
    by all of them, which takes a while where there are many."""
    from api.inspecting import at_keys

    _show(at_keys, as_json, watch, every_s, data)


def _show(look: "Look", as_json: bool, watch: bool, every_s: float, data: Path | None) -> None:
    from api.inspecting import show

    show(look, as_json=as_json, every_s=every_s if watch else None, data=data)
