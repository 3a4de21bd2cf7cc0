"""What `gateway top` shows of a snapshot: rows of four tables, sorted and filtered. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from api.status_table import duration, loading, size, standing
from api.terminal import harmless
from broker.status import HostStatus, JobStatus, LaneStatus, ModelStatus, Snapshot

BAR = 10
"""Characters of the bar that shows how full a lane is."""


@dataclass(frozen=True)
class Column:
    """A column: its head, and by what of an item it is sorted; the greatest comes first where `falling`."""

    head: str
    by: Callable[[Any], Any]
    falling: bool = True


@dataclass(frozen=True)
class Row:
    """A row: the name that it keeps over looks, its cells, the word that gives it a colour."""

    name: str
    cells: tuple[str, ...]
    tone: str = ""


_STATES = ("warm", "degraded", "waking", "unloading", "cold", "quarantined", "absent")

MODELS = (
    Column("MODEL", lambda m: m.label or m.name, falling=False),
    Column("STATE", lambda m: _STATES.index(m.state) if m.state in _STATES else len(_STATES), falling=False),
    Column("FOR", lambda m: m.state_ms),
    Column("FIRST TOKEN", lambda m: m.first_token_ms),
    Column("QUEUE", lambda m: m.waiting),
    Column("SLOTS", lambda m: m.slots_used),
    Column("MEM", lambda m: m.memory_bytes),
    Column("", lambda m: m.reason, falling=False),
)
LANES = (
    Column("LANE", lambda lane: lane.name, falling=False),
    Column("WAITING", lambda lane: lane.waiting),
    Column("FULL", lambda lane: lane.waiting / max(1, lane.max_queue)),
    Column("OLDEST", lambda lane: lane.oldest_waiting_ms),
    Column("RUNNING", lambda lane: lane.running),
    Column("MODEL", lambda lane: lane.model, falling=False),
    Column("FALLBACK", lambda lane: lane.fallback, falling=False),
)
JOBS = (
    Column("AGE", lambda seen: seen.age_ms),
    Column("JOB", lambda seen: seen.job.id, falling=False),
    Column("CALLER", lambda seen: seen.job.caller, falling=False),
    Column("LANE", lambda seen: seen.lane, falling=False),
    Column("STATE", lambda seen: seen.job.state, falling=False),
    Column("PLACE", lambda seen: seen.job.position, falling=False),
    Column("FIRST TOKEN", lambda seen: seen.first_token_ms),
    Column("UNLESS SERVED", lambda seen: seen.left_ms, falling=False),
    Column("PROMPT", lambda seen: seen.job.tokens),
)
HOSTS = (
    Column("HOST", lambda host: host.name, falling=False),
    Column("BEAT", lambda host: host.beat_age_ms),
    Column("RUNNING", lambda host: host.running),
    Column("USED", lambda host: host.memory_used),
    Column("OF", lambda host: host.memory_total),
    Column("HEADROOM", lambda host: host.memory_headroom),
    Column("MODELS", lambda host: len(host.models)),
)


def model_rows(shown: Snapshot, *, sort: int, backwards: bool, only: str) -> list[Row]:
    """The models, those whose name, label or host has `only` in it."""
    found = (m for m in shown.models if _has(only, m.name, m.label, *m.hosts))
    return [_model(m) for m in _sorted(found, MODELS[sort], backwards)]


def lane_rows(shown: Snapshot, *, sort: int, backwards: bool, only: str) -> list[Row]:
    """The lanes: who waits, for how long, and where it would go."""
    found = (lane for lane in shown.lanes if _has(only, lane.name, lane.model))
    return [_lane(lane) for lane in _sorted(found, LANES[sort], backwards)]


@dataclass(frozen=True)
class JobSeen:
    """A job in its lane, at the moment of a snapshot. Times in ms."""

    at_ms: int
    lane: str
    number: int  # of the jobs told of its lane
    job: JobStatus

    @property
    def age_ms(self) -> int:
        """Since its submit."""
        return max(0, self.at_ms - self.job.submitted_at)

    @property
    def first_token_ms(self) -> float:
        """From its submit to its first token, told or foretold; below 0 where nobody can say."""
        if self.job.first_token_at:
            return self.job.first_token_at - self.job.submitted_at
        return -1.0 if self.job.first_token_in_ms is None else self.age_ms + self.job.first_token_in_ms

    @property
    def left_ms(self) -> float:
        """Until it tries its fallback, or is given up on; below 0 where that is overdue, inf where nothing is due."""
        due = [at for at in (self.job.promote_at, self.job.give_up_at) if at] if self.job.position else []
        return min(due) - self.at_ms if due else float("inf")


def job_rows(shown: Snapshot, *, sort: int, backwards: bool, only: str) -> list[Row]:
    """The jobs that wait and run, the oldest first; whose they are only as far as whoever asks may know."""
    seen = (
        JobSeen(shown.at_ms, lane.name, number, job) for lane in shown.lanes for number, job in enumerate(lane.jobs)
    )
    found = (one for one in seen if _has(only, one.lane, one.job.id, one.job.caller, one.job.host))
    return [_job(one) for one in _sorted(found, JOBS[sort], backwards)]


def host_rows(shown: Snapshot, *, sort: int, backwards: bool, only: str) -> list[Row]:
    """The live hosts, and those that fell silent."""
    silent = {host.name for host in shown.silent}
    known = [*shown.hosts, *(HostStatus(name=host.name, beat_age_ms=host.beat_age_ms) for host in shown.silent)]
    found = (host for host in known if _has(only, host.name, *host.models))
    return [_host(host, silent=host.name in silent) for host in _sorted(found, HOSTS[sort], backwards)]


def summary(shown: Snapshot) -> str:
    """One line over everything."""
    waiting, running = sum(lane.waiting for lane in shown.lanes), sum(lane.running for lane in shown.lanes)
    hosts = f"{len(shown.hosts)} host{'s'[: len(shown.hosts) != 1]}" if shown.hosts else "no host is alive"
    hosts += f", {len(shown.silent)} silent" if shown.silent else ""
    return f"policy {shown.policy_version}   {hosts}   {waiting} waiting   {running} running"


def _sorted(items: Iterable[Any], column: Column, backwards: bool) -> list[Any]:
    return sorted(items, key=column.by, reverse=column.falling != backwards)


def _has(only: str, *names: str) -> bool:
    return not only or any(only.lower() in name.lower() for name in names)


def _row(name: str, cells: tuple[str, ...], tone: str) -> Row:
    return Row(name, tuple(map(harmless, cells)), tone)


def _model(model: ModelStatus) -> Row:
    words = f"{loading(model)}" if model.state == "waking" else model.reason
    cells = (
        model.label or model.name,
        model.state,
        duration(model.state_ms) if model.state_ms else "-",
        f"{model.first_token_ms:.0f}ms" if model.first_token_ms else "-",
        f"{model.waiting}/{model.max_queue}",
        f"{model.slots_used}/{model.slots_total}" + f" +{model.slots_settling}" * bool(model.slots_settling),
        size(model.memory_bytes),
        words,
    )
    return _row(model.name, cells, model.state)


def _lane(lane: LaneStatus) -> Row:
    full = min(1.0, lane.waiting / max(1, lane.max_queue))
    late = bool(lane.fallback) and lane.oldest_waiting_ms > lane.cold_start_budget_ms
    goes = f"{lane.fallback} after {duration(lane.cold_start_budget_ms)}" if lane.fallback else "-"
    cells = (
        lane.name,
        f"{lane.waiting}/{lane.max_queue}",
        "#" * round(full * BAR) + "." * (BAR - round(full * BAR)),
        duration(lane.oldest_waiting_ms) if lane.oldest_waiting_ms else "-",
        str(lane.running),
        lane.model,
        goes + (", retiring" if lane.retiring else ""),
    )
    return _row(lane.name, cells, "late" if late else "full" if full >= 1 else "waits" if lane.waiting else "")


def _job(seen: JobSeen) -> Row:
    job, token, left = seen.job, duration(abs(seen.first_token_ms)), duration(abs(seen.left_ms))
    first = "-" if seen.first_token_ms < 0 else f"after {token}" if job.first_token_at else f"~{token}"
    due = "-"
    if seen.left_ms < float("inf"):
        moves = bool(job.promote_at) and job.promote_at <= (job.give_up_at or job.promote_at)
        due = ("moves" if moves else "ends") + (f" in {left}" if seen.left_ms >= 0 else f", {left} late")
    cells = (
        duration(seen.age_ms),
        job.id or "-",
        job.caller or "-",
        seen.lane,
        job.state + (" (batch)" if job.priority == "batch" else ""),
        f"{job.position}." if job.position else f"on {job.host}",
        first,
        due,
        str(job.tokens),
    )
    tone = ("late" if seen.left_ms < 0 else "waits") if job.position else "warm" if job.first_token_at else "waking"
    return _row(f"{seen.lane}/{job.id or seen.number}", cells, tone)


def _host(host: HostStatus, *, silent: bool) -> Row:
    if silent:
        dashes = ["-"] * (len(HOSTS) - 2)
        return _row(host.name, (f"{host.name} (silent)", duration(host.beat_age_ms), *dashes), "silent")
    aside = host.draining or host.policy_unread
    cells = (
        host.name + (f" ({standing(host)})" if aside else ""),
        duration(host.beat_age_ms),
        str(host.running),
        size(host.memory_used),
        size(host.memory_total),
        size(host.memory_headroom),
        ", ".join(host.models) or "-",
    )
    return _row(host.name, cells, "draining" if aside else "")
