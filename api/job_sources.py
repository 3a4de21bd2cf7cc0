"""Where a job's story comes from: its record in Redis, and the log lines of the parts or of files that were named."""

import io
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from api import job_log
from api.cli_policy import redis_url
from api.exit_codes import USAGE, Failed
from api.terminal import harmless
from broker import errors, log_lines
from broker.inspection import story
from broker.inspection.reading import ReadingStore
from broker.settings import BrokerSettings, read_settings

SKEW_TOLD_MS = 1_000
"""Clocks that differ by more are named: lines and steps stand in the wrong order then."""


async def of_record(job_id: str, data: Path | None) -> story.Story | None:
    """What the record tells; a Redis that is away leaves the lines, and a sentence on stderr."""
    settings = read_settings(BrokerSettings)
    try:
        store = await ReadingStore.open(redis_url(settings, data), namespace=settings.namespace)
    except (errors.BrokerError, Failed) as problem:
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
    except errors.BrokerError as problem:
        _note(f"{problem}. Only log lines are told.")
        return None
    finally:
        await store.close()


def of_logs(files: Iterable[tuple[str, Path]], job_id: str, *, named: bool) -> Iterator[log_lines.Line]:
    """The lines of some files that may belong to the story; one that somebody `named` must be there."""
    for part, path in files:
        if str(path) == "-":
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(encoding="utf-8", errors="replace")
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
    print(harmless(f"note: {sentence}"), file=sys.stderr)
