"""What one verb must have counted, told once more in Python: from the records before and after it, to the letter."""

import json
from collections import Counter

from broker.figures import By
from broker.first_tokens import bound_of
from broker.keyspace import Keyspace
from broker.lifecycle import ENDED, HELD, State
from broker.records import JobRecord, decode_hash

Counted = Counter[tuple[str, str]]
"""Whose and which figure -> how much, over all days."""


def counted(names: Keyspace, hashes: dict[str, dict[bytes, bytes]]) -> Counted:
    """Adds up what the figures' keys of a picture say."""
    found: Counted = Counter()
    for name, raw in hashes.items():
        by = name.removeprefix(names.usage(names.usage_day_of(name)) + ":")
        found.update({(by, figure): int(amount) for figure, amount in decode_hash(raw).items()})
    return found


def miscounted(before: dict[str, JobRecord], after: dict[str, JobRecord], was: Counted, now: Counted) -> list[str]:
    """Says what was counted otherwise than the records' changes want it."""
    change = Counter({key: now[key] - was[key] for key in now.keys() | was.keys() if now[key] != was[key]})
    wanted: Counted = Counter()
    for job_id, job in after.items():
        old = before.get(job_id)
        if old is None or old.state in ENDED:
            continue
        if job.state in ENDED:
            wanted.update(_end(old, job))
            if job.error == "worker_lost" and change[_by(job), "recovered/failed"]:
                wanted[_by(job), "recovered/failed"] += 1  # or its worker said so itself
        elif job.lane != old.lane:
            wanted[_by(old), f"promoted/{job.lane}"] += 1
            if old.state is State.CLAIMED:
                wanted[_by(old), "running_ms"] += job.promoted_at - old.claimed_at
        elif old.state in HELD and job.state is State.QUEUED:
            recovered = "recovered/continued" if job.continue_by else "recovered/queued"
            given_back = "put_back" if job.put_backs > old.put_backs else "released"
            wanted[_by(old), recovered if change[_by(old), recovered] else given_back] += 1
            wanted[_by(old), "running_ms"] += job.held_ms - old.held_ms  # no record tells when that was
    wanted = Counter({key: amount for key, amount in wanted.items() if amount})
    if wanted == change:
        return []
    return [f"counted {dict(change - wanted | wanted - change)}: {dict(change)}, the records say {dict(wanted)}"]


def _by(job: JobRecord) -> str:
    return By(job.caller, job.lane, job.asked_model, job.model).spelled


def _end(old: JobRecord, job: JobRecord) -> Counted:
    start, held = max(job.submitted_at, job.not_before), old.state in HELD
    figure = f"failed/{job.error}" if job.state is State.FAILED else job.state.value
    # a job that never gave a first token was never late: whoever cancelled it in time is not judged
    if job.first_token_by and job.first_token_at:
        when = "in_time" if job.first_token_at <= job.first_token_by else "late"
        figure += f"/{when}/{bound_of(job.first_token_at - start)}"
    elif job.first_token_by and not (job.state is State.CANCELLED and job.ended_at <= job.first_token_by):
        figure += "/no_token"
    waited = (job.claimed_at if held else job.ended_at) - start - old.held_ms
    usage = json.loads(job.usage) if job.usage else {}
    prompt, cached = usage.get("prompt_tokens", 0), usage.get("cached_tokens", 0)
    figures = {
        figure: 1,
        "running_ms": job.ended_at - job.claimed_at if held else 0,
        "queued_ms": waited if waited >= 50 else 0,
        "tokens_in": prompt,
        "tokens_cached": min(prompt, cached),
        "tokens_out": usage.get("completion_tokens", 0),
        "untold": int(job.state is State.DONE and not usage),
    }
    return Counter({(_by(job), name): amount for name, amount in figures.items() if amount})
