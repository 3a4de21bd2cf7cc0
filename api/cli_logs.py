"""`gateway logs JOB`: what every process has said of a job, with what its record tells, in the order of time."""

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from api import part_logs
from api.cli_jobs import JobId
from api.cli_policy import AsJson, DataDir, data_dir
from api.exit_codes import Failed


def logs(
    job_id: JobId,
    file: Annotated[
        list[Path] | None,
        typer.Option(help="Read these instead of the logs of `gateway up`; - is the standard input."),
    ] = None,
    as_json: AsJson = False,
    data: DataDir = None,
) -> None:
    """Gathers a job's story from its record and from the logs of the parts."""
    from api import job_log, job_sources

    directory = data_dir(data, os.environ)
    told = asyncio.run(job_sources.of_record(job_id, data))
    given = [(path.stem, path) for path in file] if file else part_logs.files(directory)
    entries = job_log.gather(job_id, job_sources.of_logs(given, job_id, named=bool(file)), told)
    if not entries:
        where = "what was given" if file else str(part_logs.folder(directory))
        raise Failed(
            f"Nothing is known of job {job_id}: it has no record (any more), and no line in {where} tells of it."
        )
    if as_json:
        print(json.dumps(job_log.as_json(job_id, entries, told), indent=2))
    else:
        print(job_log.as_text(entries))
