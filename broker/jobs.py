"""Jobs: how one is read, fed with frames, ended, cancelled, and who reads along."""

import json
import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

from broker import errors, traces
from broker.keyspace import GROUP
from broker.lifecycle import HELD, State
from broker.records import JobRecord
from broker.store import Store

log = logging.getLogger("warmlane.jobs")

MAX_READERS = 16
MOVED_TRIES = 8

PUT_BACK_MAX = 3
"""So often a batch job is stopped for interactive work: then it runs to its end."""

PUT_BACK_LEFT_MS = 60_000
"""A batch job that would give up within this time is not put back: it might end for having made way."""


async def read(store: Store, job_id: str) -> JobRecord:
    """Reads a job's record; raises NoSuchJob."""
    raw = await store.hash(store.keys.job(job_id))
    if not raw:
        raise errors.NoSuchJob(job_id)
    return JobRecord.from_hash(raw)


async def find(store: Store, job_id: str) -> JobRecord | None:
    """The same, None where it is gone or never was."""
    try:
        return await read(store, job_id)
    except errors.NoSuchJob:
        return None


@dataclass(frozen=True)
class Holding:
    """A worker's hold on a job: every write carries its attempt, and a write after the hold is lost raises."""

    job_id: str
    lane: str
    attempt: int
    boot: str


@dataclass(frozen=True)
class GoOn:
    """A judgement: the answer can be gone on from its frame `last_seq`, if a worker takes it within this time."""

    last_seq: int
    within_ms: int

    @staticmethod
    def args(judged: "GoOn | None") -> tuple[int, int]:
        """What the scripts are told; None = the answer cannot be gone on from."""
        return (judged.last_seq, judged.within_ms) if judged is not None else (-1, 0)


async def first_token(store: Store, held: Holding, data: bytes, *, seq: int = 1) -> None:
    """Logs the attempt's first frame; from here on the job is streaming. Raises StaleAttempt, AlreadyEnded, FrameGap.

    `seq` is above 1 where the attempt goes on from an earlier one's frames.
    """
    keys = store.keys
    await store.run_through(
        "first_token",
        [keys.job(held.job_id), keys.frames(held.job_id)],
        [store.now_arg(), held.job_id, held.attempt, seq, data, keys.frames_channel("")],
    )
    log.info("event=first_token job=%s attempt=%d lane=%s", held.job_id, held.attempt, held.lane)


async def emit(store: Store, held: Holding, seq: int, data: bytes) -> None:
    """Logs and carries one more frame; repeats are skipped. Raises StaleAttempt, AlreadyEnded, FrameGap."""
    keys = store.keys
    await store.run_through(
        "emit",
        [keys.job(held.job_id), keys.frames(held.job_id)],
        [held.job_id, held.attempt, seq, data, keys.frames_channel("")],
    )


async def end(
    store: Store,
    held: Holding,
    event: Literal["finish", "fail"],
    *,
    seq: int = 0,
    data: bytes = b"",
    error: errors.BrokerError | None = None,
    served_by: str = "",
    usage: dict[str, Any] | None = None,
) -> None:
    """Ends a held job. `seq` is the number of its last frame, which goes along as `data` if it is not in the log yet.

    Raises StaleAttempt, AlreadyEnded, and FrameGap where the log lacks what came before.
    """
    code, message = (error.code, str(error)) if error is not None else ("", "")
    usage = usage or {}
    await store.run_through(
        "end",
        closing_keys(store, held.job_id, held.lane),
        [
            store.now_arg(),
            held.job_id,
            GROUP,
            *prefixes(store),
            held.attempt,
            event,
            seq,
            data,
            code,
            message,
            getattr(error, "status", ""),
            served_by,
            json.dumps(usage) if usage else "",
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("cached_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        ],
    )
    if error is None:
        told = held.job_id, held.attempt, held.lane, served_by or "-", int(usage.get("completion_tokens") or 0)
        log.info("event=finish job=%s attempt=%d lane=%s served_by=%s tokens=%d", *told)
    else:
        _tell_failed(held, error)


async def release(
    store: Store, held: Holding, *, loss: bool, max_losses: int, error: errors.BrokerError, go_on: GoOn | None = None
) -> Literal["queued", "failed"]:
    """Gives a held job back to its lane; after too many losses it ends with `error` instead.

    Raises BadTransition when a client has seen part of the answer and `go_on` does not say that another attempt can go
    on from there: then only `end` is honest. Raises Moved when frames came since that was judged.
    """
    args = [
        store.now_arg(),
        held.job_id,
        GROUP,
        *prefixes(store),
        held.attempt,
        int(loss),
        max_losses,
        error.code,
        str(error),
        *GoOn.args(go_on),
        0,
        0,
    ]
    reply = await store.run_through("release", closing_keys(store, held.job_id, held.lane), args)
    outcome: Literal["queued", "failed"] = "queued" if reply[0] == b"queued" else "failed"
    words = errors.without_quotes(error)
    log.warning(
        "event=release job=%s attempt=%d outcome=%s code=%s reason=%s",
        held.job_id, held.attempt, outcome, error.code, words,
    )  # fmt: skip
    return outcome


async def put_back(store: Store, held: Holding, *, left_ms: int = PUT_BACK_LEFT_MS) -> None:
    """Gives a running batch job back to its lane for interactive work; no loss is counted.

    Raises NotPutBack, BadTransition when a client has seen part of the answer, AlreadyEnded, StaleAttempt, NoSuchJob:
    then nothing has happened, and the attempt goes on.
    """
    args = [store.now_arg(), held.job_id, GROUP, *prefixes(store), held.attempt, 0, 0, "", "", *GoOn.args(None)]
    await store.run("release", closing_keys(store, held.job_id, held.lane), [*args, PUT_BACK_MAX, left_ms])
    log.info("event=put_back job=%s attempt=%d lane=%s", held.job_id, held.attempt, held.lane)


async def spend_cancelled(store: Store, held: Holding, tokens: int) -> None:
    """Charges the caller of a job that was cancelled while this attempt answered, by an estimate of what it cost."""
    args = [store.now_arg(), held.job_id, held.attempt, tokens]
    await store.run("spend_cancelled", [store.keys.job(held.job_id)], args)


async def may_run(store: Store, job_id: str) -> bool:
    """Whether the caller of a waiting job runs fewer jobs than its key allows. Only a look: the claim decides."""
    caller, most = await store.command("HMGET", store.keys.job(job_id), "caller", "max_running")
    limit = int(most or 0)
    return not limit or int(await store.command("ZCARD", store.keys.runs(caller.decode()))) < limit


async def renew(store: Store, held: Holding, *, lease_ms: int) -> None:
    """Proves that the worker lives and holds the job. Raises StaleAttempt, AlreadyEnded, NoSuchJob."""
    keys = [store.keys.job(held.job_id), store.keys.due]
    await store.run("renew", keys, [store.now_arg(), held.job_id, held.attempt, held.boot, lease_ms])


async def cancel(
    store: Store,
    job_id: str,
    *,
    message: str = "cancelled by its caller",
    only: Literal["", "abandoned", "unread"] = "",
) -> str:
    """Ends a job in any live state and tells its worker; gives the state that it was in.

    `only` = if no reader is left whose lease and grace still run, or none whose lease does (raises NotDue otherwise).
    Raises NoSuchJob, AlreadyEnded.
    """
    for _ in range(MOVED_TRIES):
        job = await read(store, job_id)
        args = [store.now_arg(), job_id, GROUP, *prefixes(store), job.lane, job.entry, only, message]
        try:
            was = (await store.run("cancel", closing_keys(store, job_id, job.lane), args)).decode()
        except errors.Moved:
            continue
        log.info("event=cancel job=%s attempt=%d lane=%s was=%s reason=%s", job_id, job.attempt, job.lane, was, message)
        await tell_end(store, replace(job, state=State(was)))
        return str(was)
    raise errors.BrokerUnavailable(f"job {job_id} moved {MOVED_TRIES} times while it was to be cancelled")


async def attach(store: Store, job_id: str, *, reader: str, lease_ms: int, sees: bool) -> tuple[str, int, int]:
    """Adds a reader or renews its lease; gives state, attempt, last frame. Raises NoSuchJob.

    `sees` = a synchronous streaming reader: what it was given cannot be taken back.
    """
    keys = [store.keys.job(job_id), store.keys.readers(job_id), store.keys.due]
    args = [store.now_arg(), job_id, reader, lease_ms, int(sees), MAX_READERS]
    state, attempt, last = await store.run("attach", keys, args)
    return state.decode(), int(attempt), int(last)


async def detach(store: Store, job_id: str, *, reader: str, comes_back: bool = False) -> int:
    """Takes a reader off; gives how many are left. The last one starts the job's grace period.

    `comes_back` = the client knows which job is its own: no SDK's retry is led to it any more.
    """
    keys = [store.keys.job(job_id), store.keys.readers(job_id), store.keys.due]
    return int(await store.run("detach", keys, [store.now_arg(), job_id, reader, int(comes_back)]))


async def forget(store: Store, job_id: str) -> None:
    """Deletes an ended job with its answer before its keep time is over; raises NotDue while it lives, NoSuchJob."""
    k = store.keys
    await store.run("forget", [k.job(job_id), k.request(job_id), k.frames(job_id)], [store.now_arg(), job_id])


async def tell_end(store: Store, job: JobRecord) -> None:
    """Tells the trace of a job, given as it was before, that it is over, and what it came to."""
    over = await _over(store, job)
    if over is None:
        return
    if job.state not in HELD:
        traces.waited(job, until_ms=over.ended_at, outcome=over.state.value)
    traces.ended(over)


async def tell_lost(store: Store, job: JobRecord, *, again: bool) -> None:
    """Tells the trace of a job, given as it was before, that its worker was lost; not `again`: and that it is over."""
    over = await _over(store, job)
    if over is None:
        return
    traces.lost(job, at_ms=over.entered_at if again else over.ended_at)
    if not again:
        traces.ended(over)


async def tell_attempt(
    store: Store, job: JobRecord, outcome: str, *, first_token_ms: float, total_ms: float, error: str = ""
) -> None:
    """Tells the trace of a job that an attempt at it is over as `traces.attempted` has it, and where it is over too,
    what it came to. Its record knows better than an attempt that was told that it holds nothing: the reply to its own
    end may have been lost."""
    over = await _over(store, job)
    ended = over is not None and over.attempt == job.attempt and over.state in (State.DONE, State.FAILED)
    if over is None or not ended or (outcome == "stopped" and over.error == errors.WorkerLost.code):
        traces.attempted(job, outcome, first_token_ms=first_token_ms, total_ms=total_ms, error=error)
        return
    traces.attempted(
        job, over.state.value, first_token_ms=first_token_ms, total_ms=total_ms, error=over.error,
        ended_at=over.ended_at,
    )  # fmt: skip
    traces.ended(over)


async def _over(store: Store, job: JobRecord) -> JobRecord | None:
    """What became of a job whose steps are told; None where they are not, or where that cannot be read."""
    if not traces.told(job):
        return None
    try:
        return await find(store, job.id)
    except errors.BrokerUnavailable as e:
        log.debug("event=trace_lost job=%s reason=%s", job.id, e)
        return None


def _tell_failed(held: Holding, error: errors.BrokerError) -> None:
    words = errors.without_quotes(error)
    log.warning("event=fail job=%s attempt=%d code=%s reason=%s", held.job_id, held.attempt, error.code, words)


def closing_keys(store: Store, job_id: str, lane: str) -> list[str]:
    """The keys of every verb that may end a job, in the order of their headers."""
    k = store.keys
    return [k.job(job_id), k.lane(lane), k.due, k.frames(job_id), k.request(job_id), k.readers(job_id), k.dead]


def prefixes(store: Store) -> list[str]:
    """What those verbs put before names that they read from the job: frames, control, usage."""
    k = store.keys
    return [k.frames_channel(""), k.control_channel(""), k.usage_prefix()]
