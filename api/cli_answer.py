"""Waiting for a job at a terminal: its end, its words as they come, and how the command ends."""

import asyncio
import json
import signal
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from api import exit_codes
from api.answer_text import objects_of, pieces_of, text_of
from api.exit_codes import USAGE, Failed
from api.jobs_client import Away, Busy, Event, JobsClient, Refusal, Result, jobs_client, sentence_of
from api.output import Unwritten
from api.patience import AWAY_S_MAX, Patience
from broker.lifecycle import ENDED

T = TypeVar("T")

LAST_LOOK_S_MAX = 2.0
"""The time given to wait is over: so long a look may take at whether the job has ended meanwhile."""


def with_jobs(work: Callable[[JobsClient], Coroutine[Any, Any, T]], about: dict[str, Any] | None = None) -> T:
    """Does something with the gateway's jobs; what goes wrong becomes a sentence and an exit code. `about` is the job
    that it is about, as the work saw it last, empty until then: whoever has to leave it hears how to come back."""

    async def run() -> T:
        async with _terminable(), jobs_client() as jobs:
            return await work(jobs)

    try:
        found = asyncio.run(run())
        sys.stdout.flush()
        return found
    except Refusal as refusal:
        raise Failed(str(refusal), exit_codes.of_status(refusal.status)) from None
    except KeyboardInterrupt:
        raise Failed(way_back(about) if about else "interrupted", exit_codes.INTERRUPTED) from None
    except _Terminated:
        raise Failed(way_back(about) if about else "terminated", exit_codes.TERMINATED) from None
    except Unwritten as failure:
        raise Unwritten(failure.why, way_back(about) if about else "") from None


class _Terminated(Exception):
    """We were told to end."""


@asynccontextmanager
async def _terminable() -> AsyncIterator[None]:
    """Makes of SIGTERM an exception, as `asyncio.run` does of Ctrl-C. The second one ends us at once: we may hang on
    whoever reads what we print."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    told: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        told.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        loop.call_soon_threadsafe(task.cancel)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except asyncio.CancelledError:
        if not told:
            raise
        raise _Terminated from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def way_back(job: dict[str, Any]) -> str:
    """Says how to come back to a job."""
    if job["state"] in ENDED:
        return f"Job {job['id']} has ended; `gateway job result {job['id']}` tells how."
    return f"Job {job['id']} goes on; `gateway job result --wait {job['id']}` waits for it again."


def once(call: Callable[[], Awaitable[T]]) -> Awaitable[T]:
    """Makes a call that is worth no second try."""
    return Patience(0).answered(call)


def length_s(text: str) -> float:
    """Reads a length of time from the command line, in seconds."""
    from api.durations import length_ms

    try:
        return length_ms(text) / 1000
    except ValueError as wrong:
        raise Failed(f"{str(wrong)[:1].upper()}{str(wrong)[1:]}.", USAGE) from None


def pair(line: str) -> tuple[str, str]:
    """Reads what is noted on a job."""
    key, equals, value = line.partition("=")
    if not equals or not key:
        raise Failed(f"--metadata takes KEY=VALUE, and {line[:80]!r} is none.", USAGE)
    return key, value


async def until_ended(jobs: JobsClient, job: dict[str, Any], *, timeout_s: float | None) -> dict[str, Any]:
    """Waits for a job's end, over outages of the gateway; a job that has not ended by then is a Failed."""
    async with _within(timeout_s, jobs, job):
        return await Patience(AWAY_S_MAX).until_ended(jobs, job)


async def tell(jobs: JobsClient, job: dict[str, Any], *, as_json: bool) -> None:
    """Prints what an ended job ended with; one that did not end well is a Failed."""
    result = await Patience(AWAY_S_MAX).answered(partial(jobs.result, job["id"]))
    text = text_of(job["endpoint"], result.body) if result.good else None
    if as_json or (result.good and text is None):
        print(json.dumps(result.body, indent=2, ensure_ascii=False))
    elif text is not None:
        print(text)
    _judge(job, result)


async def tell_as_it_comes(jobs: JobsClient, job: dict[str, Any], *, as_json: bool, timeout_s: float | None) -> None:
    """Prints the words of a job as they come, or its chunks, one a line; goes on where a connection broke. `job` is
    then as it ended."""
    said, ended = "", False
    limit_s = None if job["state"] in ENDED else timeout_s  # of one that has ended there is nothing to wait for
    async with _within(limit_s, jobs, job), aclosing(follow(jobs, job["id"], Patience(AWAY_S_MAX))) as events:
        async for event in events:
            if event.name == "frame":
                said += _print_frame(job["endpoint"], event.said["data"], as_json=as_json)
            elif event.name == "restarted":
                _print_restart(said, as_json=as_json)
                said = ""
            ended = ended or event.name == "end"
    if said and not said.endswith("\n") and not as_json:
        print(flush=True)
    if not ended:
        raise Failed(f"The gateway no longer knows job {job['id']}.")
    job.update(await Patience(AWAY_S_MAX).answered(partial(jobs.look, job["id"])))
    if not said or job["state"] != "done":  # vectors and calls of tools have no words
        await tell(jobs, job, as_json=as_json)


async def follow(jobs: JobsClient, job_id: str, patience: Patience) -> AsyncGenerator[Event, None]:
    """Gives a job's events to the last, each once, over as many connections as it takes."""
    after, tries = "", 0
    while True:
        try:
            async with jobs.events(job_id, after) as events:
                async for event in events:
                    patience.progress()
                    after, tries = event.id or after, 0
                    yield event
                return
        except (Away, Busy) as why:
            await patience.pause(why, tries)
            tries += 1


def _print_frame(endpoint: str, data: str, *, as_json: bool) -> str:
    """Prints a frame; gives what of it counts as said."""
    if as_json:
        objects = objects_of(data)
        for found in objects:
            print(json.dumps(found, ensure_ascii=False), flush=True)
        return "\n" * len(objects)
    text = pieces_of(endpoint, data)
    sys.stdout.write(text)
    sys.stdout.flush()
    return text


def _print_restart(said: str, *, as_json: bool) -> None:
    """What was printed cannot be taken back: says that it is void."""
    if as_json:
        print(json.dumps({"restarted": True}), flush=True)
    elif said:
        print(flush=True)
        print("The answer begins anew.", file=sys.stderr)


def _judge(job: dict[str, Any], result: Result) -> None:
    code = exit_codes.of_state(job["state"])
    if code == exit_codes.OK and not result.good:
        code = exit_codes.FAILED
    if code != exit_codes.OK:
        error = job.get("error") or {}
        why = error.get("message") or sentence_of(result.body) or "without a word"
        raise Failed(f"Job {job['id']} {_ENDS.get(job['state'], job['state'])}: {why}", code)


_ENDS = {"failed": "failed", "cancelled": "was cancelled", "expired": "expired"}


class _within:
    """The block may last so long, None = for ever; else it is a Failed that says whether the job goes on."""

    def __init__(self, timeout_s: float | None, jobs: JobsClient, job: dict[str, Any]) -> None:
        self._timeout = asyncio.timeout(timeout_s)
        self._jobs, self._job = jobs, job

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            with suppress(TimeoutError, Refusal, Failed):
                async with asyncio.timeout(LAST_LOOK_S_MAX):
                    self._job.update(await once(partial(self._jobs.look, self._job["id"])))
            raise Failed(way_back(self._job), exit_codes.UNFINISHED) from None
