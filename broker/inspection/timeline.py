"""A job's life as steps on one line: what its record tells of it, and what lies ahead. Pure."""

from dataclasses import dataclass

from broker.inspection.spills import spill
from broker.lifecycle import State
from broker.records import JobRecord


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that happened to a job, or lies `ahead`. `after_ms` counts from its submit, `took_ms` from the step
    before; of what lies ahead it is the time until then, below 0 where nobody has looked after it in time."""

    at_ms: int
    step: str
    words: str = ""
    after_ms: int = 0
    took_ms: int = 0
    ahead: bool = False


def timeline(job: JobRecord, *, now_ms: int, woke_at: int = 0) -> list[Step]:
    """Puts a job's instants in order. `woke_at`: when the model that it waits for last woke, where that is known; of
    the one that claimed it, its record knows. The record keeps the last of each kind, and counts the others."""
    if job.state is not State.QUEUED:
        woke_at = job.woke_at if job.claimed_at and not job.given_back else 0
    past = sorted((row for row in _past(job, woke_at) if row[0]), key=lambda row: row[0])
    ahead = sorted(row for row in _ahead(job) if row[0]) if job.live else []
    steps, before = list[Step](), job.submitted_at
    for at, step, words in past:
        steps.append(
            Step(at_ms=at, step=step, words=words, after_ms=at - job.submitted_at, took_ms=max(0, at - before))
        )
        before = at
    steps += [
        Step(at_ms=at, step=step, words=words, after_ms=at - job.submitted_at, took_ms=at - now_ms, ahead=True)
        for at, step, words in ahead
    ]
    return steps


def troubles(job: JobRecord) -> list[str]:
    """What went another way than straight on, in sentences."""
    found = [spill(job)] if job.spilled else []
    if job.promotions:
        times = _times(job.promotions)
        found.append(f"moved to a fallback lane {times}: it asked for {job.asked_model or job.asked}, now {job.model}")
    if job.put_backs:
        found.append(f"put back for interactive work {_times(job.put_backs)}")
    if job.losses:
        found.append(f"lost with its worker or runtime {_times(job.losses)}")
    if job.held_ms:
        found.append(f"attempts that were moved or put back held slots for {job.held_ms} ms")
    if job.continues and job.state is not State.QUEUED:
        found.append(f"gone on from what attempt {job.continues} had told")
    return found


def _past(job: JobRecord, woke_at: int) -> list[tuple[int, str, str]]:
    rows = [
        (job.submitted_at, "submitted", f"by {job.caller} for {job.asked or job.lane}, {job.priority}"),
        (job.promoted_at, "moved", f"to lane {job.lane}"),
        (job.requeued_at, "waits again", "its attempt was given back"),
        (job.first_token_at, "first token", f"of {job.model}"),
        (job.ended_at, job.state.value, job.served_by and f"by {job.served_by}"),
    ]
    if job.not_before and job.queued_at:
        rows.append((job.not_before, "started", "its start had come"))
    if job.claimed_at:
        words = f"attempt {job.attempt}" + (f" on {job.owner}" if job.owner else "")
        rows.append((job.claimed_at, "claimed", words + (", and given back since" if job.given_back else "")))
    if job.waits_since < woke_at:
        rows.append((woke_at, "woke", f"{job.model} gave its first token"))
    return rows


def _ahead(job: JobRecord) -> list[tuple[int, str, str]]:
    if job.state is State.SCHEDULED:
        return [(job.not_before, "starts", ""), (job.give_up_at, "gives up", "")]
    if job.state is State.QUEUED and job.continue_by:
        return [(job.continue_by, "ends", "unless another attempt goes on with its answer until then")]
    if job.state is State.QUEUED:
        tries_at = max(job.promote_at, job.retry_at) if job.promote_at else 0
        return [(tries_at, "tries its fallback", ""), (job.give_up_at, "gives up", "")]
    return [(job.lease_until, "lease ends", f"unless {job.owner} renews it")]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
