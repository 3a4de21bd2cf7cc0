"""`gateway logs JOB`: what every process has said of a job, with what its record tells, in the order of time."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from api import job_log, part_logs
from api.cli_jobs import JobId
from api.cli_policy import AsJson, DataDir, data_dir, redis_url
from api.exit_codes import USAGE, Failed
from broker import errors, log_lines
from broker.inspection import story
from broker.inspection.reading import ReadingStore
from broker.settings import BrokerSettings, read_settings

SKEW_TOLD_MS = 1_000
"""Clocks that differ by more are named: lines and steps stand in the wrong order then."""


def logs(
    job_id: JobId,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help="Read these instead of the logs of `gateway up`; - is the standard input.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
    data: DataDir = None,
) -> None:
    """Gathers a job's story from its record and from the logs of the parts."""
    directory = data_dir(data, os.environ)
    told = asyncio.run(_story(job_id, data))
    given = [(path.stem, path) for path in file] if file else part_logs.files(directory)
    entries = job_log.gather(job_id, _lines(given, job_id, named=bool(file)), told)
    if not entries:
        where = "what was given" if file else str(part_logs.folder(directory))
        raise Failed(
            f"Nothing is known of job {job_id}: it has no record (any more), and no line in {where} tells of it."
        )
    if as_json:
        print(json.dumps(job_log.as_json(job_id, entries, told), indent=2))
    else:
        print(job_log.as_text(entries))


async def _story(job_id: str, data: Path | None) -> story.Story | None:
    """What the record tells; a Redis that is away leaves the lines, and a sentence on stderr."""
    settings = read_settings(BrokerSettings)
    try:
        store = await ReadingStore.open(redis_url(settings, data), namespace=settings.namespace)
    except (errors.BrokerUnavailable, errors.RedisUnfit, Failed) as problem:
        _note(f"{problem} Only log lines are told.")
        return None
    try:
        found = await story.tell(store, job_id)
        skew_ms = found.at_ms - round(time.time() * 1_000)
        if abs(skew_ms) > SKEW_TOLD_MS:
            _note(f"Redis' clock is {abs(skew_ms)} ms {'ahead of' if skew_ms > 0 else 'behind'} this machine's.")
        return found
    except errors.NoSuchJob:
        return None
    except errors.BrokerUnavailable as problem:
        _note(f"{problem}. Only log lines are told.")
        return None
    finally:
        await store.close()


def _lines(files: Iterable[tuple[str, Path]], job_id: str, *, named: bool) -> Iterator[log_lines.Line]:
    """The lines of some files that may belong to the story; one that somebody `named` must be there."""
    for part, path in files:
        if str(path) == "-":
            yield from _matter(sys.stdin, "", job_id)
            continue
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                yield from _matter(lines, part, job_id)
        except OSError as problem:
            if named or not isinstance(problem, FileNotFoundError):  # one of ours may just have been put aside
                raise Failed(f"{path} can't be read: {problem.strerror}.", USAGE) from None


def _matter(lines: Iterable[str], part: str, job_id: str) -> Iterator[log_lines.Line]:
    """The lines that may belong to the story, each with what follows it."""
    return (line for line in log_lines.read(_glanced(lines, job_id), part) if line.event or line.job)


def _glanced(lines: Iterable[str], job_id: str) -> Iterator[str]:
    takes = False
    for text in lines:
        if log_lines.begins(text):
            takes = job_log.may_matter(text, job_id)
        if takes:
            yield text


def _note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr)
