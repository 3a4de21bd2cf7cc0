"""The text of `gateway inspect`, made of what was read and of nothing else."""

from collections.abc import Sequence
from datetime import UTC, datetime

from api.status_table import duration, size
from api.terminal import harmless, text_of
from broker.dead import Letter
from broker.inspection.hosts import HostLook, LockLook
from broker.inspection.jobs import Found
from broker.inspection.keys import Keys
from broker.inspection.lanes import Lanes
from broker.inspection.story import PLACES_MAX, Story
from broker.lifecycle import State
from broker.records import JobRecord

WORDS_SHOWN = 72
"""Of a sentence that stands in a table."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns; the last one is as long as it likes."""
    every = [tuple(map(harmless, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in every)
    return [line.rstrip() for line in lines]


def lanes(found: Lanes) -> str:
    """The lanes, who holds what of them, and whether anybody looks after their instants."""
    rows = []
    for lane in found.lanes:
        held = ", ".join(f"{host} {count}" for host, count in sorted(lane.held_by.items())) or "-"
        rest = [f"-> {lane.fallback} after {duration(lane.cold_start_budget_ms)}"] if lane.fallback else []
        rest += ["retiring"] if lane.retiring else []
        rest += [f"{lane.in_line} in line"] if lane.in_line else []
        oldest = duration(lane.oldest_waiting_ms) if lane.oldest_waiting_ms else "-"
        rows.append(
            (
                lane.name,
                lane.model,
                lane.priority,
                f"{lane.waiting}/{lane.max_queue}",
                str(lane.running),
                oldest,
                str(lane.asking),
                held,
                "; ".join(rest),
            )
        )
    head = ("LANE", "MODEL", "PRIORITY", "WAITING", "RUNNING", "OLDEST", "ASKING", "HELD BY", "")
    lines = table(head, rows)
    lines.append(f"policy: version {found.policy_version}")
    if found.scheduled:
        lines.append(f"note: {_count(found.scheduled, 'job')} in no lane yet: to start later")
    if found.late:
        lines.append(
            f"note: nobody has looked at {_count(found.late, 'job')} whose instant has come, the first "
            f"{duration(found.late_ms)} ago: is a scheduler running?"
        )
    return text_of(lines)


def jobs(found: Found, limit: int) -> str:
    """A list of jobs; then what it leaves out."""
    rows = [_job(job, found.at_ms) for job in found.jobs]
    head = ("JOB", "STATE", "LANE", "MODEL", "CALLER", "AGE", "NEXT")
    lines = table(head, rows) if rows else ["no such jobs"]
    if found.unseen:
        lines.append(
            f"note: {_count(len(found.jobs), 'job')} shown; {found.unseen} more were left out: --limit (now {limit}), "
            "or a filter, shows others"
        )
    if not found.scanned_all:
        lines.append("note: Redis holds more keys than one look passes by, so some ended jobs were not looked at")
    return text_of(lines)


def story(told: Story) -> str:
    """One job: where it stands, its steps with their times, what went another way."""
    job = told.job
    rows = [("job", job.id), ("state", _standing(told)), ("lane", f"{job.lane}, model {job.model}")]
    if job.priority != "interactive" or job.mode == "async":
        rows.append(("kind", f"{job.priority}, {'nobody waits for it' if job.mode == 'async' else 'its client waits'}"))
    sizes = f"request {told.request_bytes} bytes, {_count(told.frames, 'frame')} logged"
    rows.append(("held", f"{sizes}, {_count(told.readers, 'reader')}"))
    models = ", ".join(f"{state} on {host}" for host, state in told.models.items())
    rows.append((job.model, models or "no live host serves it"))
    if job.error:
        rows.append(("error", f"{job.error}: {told.error}"))
    if told.kept_ms >= 0:
        rows.append(("kept", f"for {duration(told.kept_ms)} more"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {words}" for name, words in rows]
    head = ("AT (UTC)", "AFTER", "TOOK", "STEP", "")
    steps = [
        (
            instant(step.at_ms),
            duration(step.after_ms),
            _until(step.took_ms) if step.ahead else duration(step.took_ms),
            step.step,
            step.words,
        )
        for step in told.steps
    ]
    lines += ["", *table(head, steps), *(f"note: {words}" for words in told.troubles)]
    return text_of(lines)


def hosts(found: Sequence[HostLook], version: int) -> str:
    """The hosts of the last day, each with its models."""
    if not found:
        return "no worker has told of a host within a day"
    lines = []
    for host in found:
        if not host.alive:
            lines.append(f"{host.name}  gone: its last heartbeat was {duration(host.beat_age_ms)} ago")
            continue
        words = [f"pid {host.pid}", f"up {duration(host.up_ms)}", f"beat {duration(host.beat_age_ms)} ago"]
        if host.memory_total:
            of = f"{size(host.memory_used)} of {size(host.memory_total)} used ({host.memory_source})"
            words.append(f"{of}, headroom {size(host.memory_headroom)}")
        words += ["draining"] if host.draining else []
        if host.policy_unread:
            words.append(f"cannot read policy version {host.policy_unread}")
        elif version and host.policy_version != version:
            words.append(f"still at policy version {host.policy_version}")
        if abs(host.skew_ms) >= 1_000:
            words.append(f"its clock is {duration(abs(host.skew_ms))} {'behind' if host.skew_ms > 0 else 'ahead'}")
        lines.append(f"{host.name}  {', '.join(words)}")
        rows = [
            (
                f"  {model.name}",
                model.state,
                duration(model.for_ms) if model.for_ms else "-",
                f"{model.slots_used}/{model.slots_total}" + f" +{model.slots_settling}" * bool(model.slots_settling),
                f"{model.first_token_ms:.0f}ms" if model.first_token_ms else "-",
                size(model.memory_bytes),
                str(model.sessions),
                _short(model.reason) + (" (earlier policy)" if model.behind else ""),
            )
            for model in host.models
        ]
        if rows:
            lines += table(("  MODEL", "STATE", "FOR", "SLOTS", "FIRST TOKEN", "MEM", "SESSIONS", ""), rows)
    return text_of(lines)


def locks(found: Sequence[LockLook]) -> str:
    """Wake locks, held or free, with what asks for them."""
    rows = []
    for lock in found:
        holder = "-"
        if lock.holder and not lock.boot:
            holder = f"{lock.holder} (no worker's)"
        elif lock.holder:
            holder = f"{lock.holder}/{lock.boot}" + ("" if lock.alive else " (gone: the lock ends by itself)")
        asks = [f"wanted for {duration(lock.wanted_ms)}"] if lock.wanted_ms else []
        asks += [f"{_count(lock.failures, 'failed load')}"] if lock.failures else []
        asks += [f"quarantined for {duration(lock.quarantine_ms)}"] if lock.quarantine_ms else []
        epoch = str(lock.epoch) if lock.holder else "-"
        ttl = duration(lock.ttl_ms) if lock.holder else "-"
        rows.append((lock.model, holder, epoch, ttl, str(lock.wakes), ", ".join(asks)))
    return "\n".join(table(("MODEL", "HOLDER", "EPOCH", "TTL", "WAKES", ""), rows)) if rows else "no wake locks"


def dead(letters: Sequence[Letter], total: int) -> str:
    """Dead letters, newest first."""
    if not letters:
        return "no dead letters"
    rows = [(x.id, x.job, x.caller or "-", x.lane, x.code, str(x.losses), _short(x.message)) for x in letters]
    lines = table(("LETTER", "JOB", "CALLER", "LANE", "CODE", "LOSSES", "WHY"), rows)
    if total > len(letters):
        lines.append(f"note: {len(letters)} of {total} letters shown; --limit shows more")
    return text_of(lines)


def keys(found: Keys) -> str:
    """Rows of the key table that have keys, then faults."""
    rows = []
    for row in found.families:
        lives = f"{duration(row.shortest_ms)} to {duration(row.longest_ms)}" if row.count > row.endless else "-"
        rows.append((row.pattern, row.type, str(row.count), size(row.bytes), str(row.endless), lives, row.lifetime))
    head = ("KEY", "TYPE", "COUNT", "MEM", "ENDLESS", "ENDS IN", "LIFETIME BY THE KEY TABLE")
    lines = table(head, rows) if rows else ["no keys"]
    lines += [f"fault: {key} {words}" for key, words in found.faults.items()]
    if found.more_faults:
        lines.append(f"note: {found.more_faults} more faults were left out")
    if not found.scanned_all:
        lines.append(f"note: Redis holds more keys than the {found.scanned} that one look passes by")
    return text_of(lines)


def instant(ms: int) -> str:
    """Writes an instant to the ms, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%H:%M:%S.%f")[:-3]


def _job(job: JobRecord, now: int) -> tuple[str, ...]:
    age = now - job.submitted_at if job.live else job.ended_at - job.submitted_at
    return job.id, job.state.value, job.lane, job.model, job.caller, duration(max(0, age)), _next(job, now)


def _next(job: JobRecord, now: int) -> str:
    """What comes next for a live job, or how an ended one ended."""
    if not job.live:
        return f"{job.error or job.served_by or '-'}, {duration(now - job.ended_at)} ago"
    if job.state is State.SCHEDULED:
        return f"starts in {_left(job.not_before, now)}"
    if job.state is State.QUEUED:
        moves = f"tries its fallback {_when(job.promote_at, now)}, " if job.promote_at else ""
        return f"{moves}gives up {_when(job.give_up_at, now)}"
    held = f"attempt {job.attempt} on {job.owner}"
    return held if job.lease_until > now else f"{held}, its lease ended {duration(now - job.lease_until)} ago"


def _when(at: int, now: int) -> str:
    return f"in {duration(at - now)}" if at > now else "now"


def _until(left_ms: int) -> str:
    return f"in {duration(left_ms)}" if left_ms >= 0 else f"{duration(-left_ms)} ago, and nobody has looked"


def _left(at: int, now: int) -> str:
    return duration(max(0, at - now))


def _standing(told: Story) -> str:
    job = told.job
    if told.ahead >= 0:
        return f"{job.state.value}, behind {told.ahead}{' or more' if told.ahead >= PLACES_MAX else ''}"
    return job.state.value + (f" on {job.owner}, attempt {job.attempt}" if job.live and job.owner else "")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WORDS_SHOWN else f"{line[: WORDS_SHOWN - 3]}..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"
