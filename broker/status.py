"""One picture of the gateway: what `gateway status`, the status endpoint, the page and the gauges show."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import Any, Self, TypeVar, cast, get_args, get_origin, get_type_hints

from broker import downgrades
from broker.figures import Day
from broker.hosts import Fleet, Picture
from broker.looks import CloseLook, Told
from broker.policies import Active
from broker.policy import Lane, Model
from broker.precedence import LaneSeen, Precedence, Waiter
from broker.records import HostRecord, ModelFacts, ModelOnHost, without_name
from broker.today import Moves, Today, by_model, moves

NO_HOST = "absent"
"""The state of a model that no live host serves."""

_BEST_FIRST = ("warm", "degraded", "waking", "unloading", "cold", "quarantined")


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """A model over all its hosts. `waiting` and `max_queue` are those of its own lane. `memory_bytes` is what it
    occupies now, `footprint_bytes` what it needs."""

    name: str
    label: str = ""
    runtime: str = ""
    state: str = NO_HOST
    reason: str = ""
    first_token_ms: float = 0
    first_token_budget_ms: int = 0
    """What is slower than this counts as degraded."""
    first_tokens_ms: tuple[float, ...] = ()
    """Its last ones, the oldest first, as far as the api that answers has seen them."""
    waiting: int = 0
    max_queue: int = 0
    running: int = 0
    slots_used: int = 0
    slots_settling: int = 0
    slots_total: int = 0
    memory_bytes: int = 0
    hosts: tuple[str, ...] = ()
    simulated: bool = False
    keep_warm: bool = False
    outside_hours: str = ""
    """Its `activeHours` while it is not kept warm because of them; empty within them, and where the worker's own zone
    decides."""
    failures: int = 0
    wanted: bool = False
    pinned: bool = False
    unloaded_ms: int = 0
    """For how long keep-warm still leaves it alone, because it was unloaded by hand."""
    quarantine_ms: int = 0
    """For how long it is still set aside."""
    state_ms: int = 0
    """For how long it has been in this state."""
    woke_at: int = 0
    """When its last wake was over, 0 = none since its worker began."""
    max_concurrent: int = 0
    parallel: int = 0
    """How many generations its runtime really runs at once, where that is fewer than `maxConcurrent`; else 0."""
    progress: float = -1
    """Of a load under way, 0..1, by the runtime's own figures; -1 = it does not say."""
    load_ms: float = 0
    """How long a load takes, as learned; 0 = not known yet."""
    last_load_ms: float = 0
    """How long the last load took, on the host that is in the best state; 0 = its worker has not loaded it."""
    weights: str = ""
    """What the runtime calls them: a tag, a path."""
    footprint_bytes: int = 0
    """What it occupies once loaded: learned, else the policy's `memoryMb`, else 0."""
    prompt_tokens: int = 0
    """Prompt tokens of the day (UTC), and below those of them that were in the runtime's cache."""
    cached_tokens: int = 0
    prefill_tps: float = 0
    """Uncached prompt tokens it reads a second, and below answer tokens it writes; learned, 0 = not known."""
    decode_tps: float = 0
    judged: int = 0
    """Interactive jobs of the day that asked for it and ended, and below those whose first token came in time: from the
    model asked for, and from any (`today.Today`)."""
    in_time_asked: int = 0
    in_time_any: int = 0
    asked: int = 0
    """Under a cap, the last jobs that asked for it (200 at most), and below those of them that another model serves."""
    downgraded: int = 0
    sessions_on_fallback: int = 0

    @property
    def cached_share(self) -> float | None:
        """The part of the day's prompt tokens that the runtime had in its cache; None before the first."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job that stands in a lane. Instants are ms of Redis' clock, 0 = has not come, or never. Whose it is and its id
    are told to its caller and to administrators; to anybody else both are empty."""

    id: str = ""
    caller: str = ""
    state: str = ""
    priority: str = ""
    position: int = 0
    """Of those that wait in the lane, in the order of their entries; 0 = a worker holds it."""
    tokens: int = 0
    attempt: int = 0
    promotions: int = 0
    submitted_at: int = 0
    promote_at: int = 0
    give_up_at: int = 0
    claimed_at: int = 0
    first_token_at: int = 0
    first_token_in_ms: int | None = None
    """When its first token should come; None = nothing was measured that could tell, or it has come."""
    host: str = ""


@dataclass(frozen=True, kw_only=True)
class LaneStatus:
    """A lane; `oldest_waiting_ms` is the age of the job that has waited longest, 0 where none waits. `jobs` are its
    oldest, 256 at most, 64 of batch work."""

    name: str
    model: str
    priority: str = "interactive"
    waiting: int = 0
    max_queue: int = 0
    running: int = 0
    cold_start_budget_ms: int = 0
    fallback: str = ""
    spills_only: bool = False  # the fallback is remote: it takes requests while the lane is full, and no promoted job
    retiring: bool = False
    oldest_waiting_ms: int = 0
    deadline_used: float = 0
    """The most that a job which waits has used of its time in the lane, until its fallback is tried, or until it is
    given up where none is: 1 = its deadline is now."""
    jobs: tuple[JobStatus, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HostStatus:
    """A live host. `memory_source` = limit, gpu or system: what the memory is of."""

    name: str
    beat_age_ms: int = 0
    memory_total: int = 0
    memory_used: int = 0
    memory_headroom: int = 0
    memory_source: str = ""
    memory_note: str = ""
    policy_version: int = 0
    policy_unread: int = 0
    """The active policy's version, where its worker cannot read it and takes no work; else 0."""
    draining: bool = False
    running: int = 0
    skew_ms: int = 0
    """Redis' clock minus the host's."""
    models: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SilentHost:
    """A host whose worker sends no heartbeat and did not take its leave. It is forgotten a day after the last one."""

    name: str
    beat_age_ms: int = 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The gateway at one moment. Where two carry the same `number` they are the same, whoever shows them: it is the
    moment in microseconds of Redis' clock."""

    number: int = 0
    at_ms: int = 0
    policy_version: int = 0
    policy_unread: int = 0
    """The active policy's version, where whoever tells this cannot read it and goes by the one before; else 0."""
    made_up: bool = False
    models: tuple[ModelStatus, ...] = ()
    lanes: tuple[LaneStatus, ...] = ()
    hosts: tuple[HostStatus, ...] = ()
    silent: tuple[SilentHost, ...] = ()
    redis_note: str = ""
    """That Redis is full, where it is."""
    moves: Moves = field(default_factory=Moves)
    """What the day has counted of promotions and refusals."""
    day: Day = field(default=(), compare=False, repr=False)
    """The day's counters that this was made with: what metrics tell of them. Not told as JSON."""

    @property
    def policy_lines(self) -> list[str]:
        """What the policy does with jobs that wait too long, one sentence per lane with a fallback."""
        return [
            f"{lane.name} spill -> {lane.fallback} while it has no place, for requests that may leave"
            if lane.spills_only
            else f"{lane.name} fallback -> {lane.fallback} after {lane.cold_start_budget_ms}ms cold-start budget"
            for lane in self.lanes
            if lane.fallback
        ]

    def as_json(self, *, viewer: str | None = None) -> dict[str, Any]:
        """Gives plain data; `from_json` reads it back. A `viewer` sees whose jobs his own are, None = everybody's."""
        told = _plain(self)
        del told["day"]
        return told | {
            "models": [_plain(model) | {"cached_share": model.cached_share} for model in self.models],
            "lanes": [_plain(lane) | {"jobs": [_job_for(viewer, job) for job in lane.jobs]} for lane in self.lanes],
            "hosts": [_plain(host) for host in self.hosts],
            "silent": [_plain(host) for host in self.silent],
            "moves": _plain(self.moves),
            "policy": self.policy_lines,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads what another process told; what a newer version added is left out. Raises ValueError for data that is
        no snapshot."""
        for name in ("policy_version", "models", "lanes", "hosts"):
            if name not in data:
                raise ValueError(f"a snapshot without {name}")
        parts = _known(cls, data)
        parts["models"] = tuple(_read(ModelStatus, m) for m in _list(data["models"]))
        parts["lanes"] = tuple(_read_lane(lane) for lane in _list(data["lanes"]))
        parts["moves"] = _read(Moves, data.get("moves", {}))
        parts["hosts"] = tuple(_read(HostStatus, h) for h in _list(data["hosts"]))
        parts["silent"] = tuple(_read(SilentHost, h) for h in _list(data.get("silent", [])))
        parts.pop("day", None)
        return _made(cls, parts)


def compose(active: Active, fleet: Fleet, seen: CloseLook, day: Day, *, number: int) -> Snapshot:
    """Makes the snapshot of a close look, which the fleet has seen too, and of the day's counters."""
    picture, lanes, orders = fleet.picture, [], _orders(active, fleet.picture, seen)
    for lane in active.lanes().values():
        fallback = active.lane(lane.fallback) if lane.fallback else None
        inside = seen.jobs.get(lane.name, ())
        lanes.append(
            replace(
                _lane_status(lane, picture, seen.oldest_at.get(lane.name, 0)),
                spills_only=fallback is not None and fallback.trust == "remote",
                deadline_used=max((_deadline_used(x, picture.at_ms) for x in inside if not x.held), default=0),
                jobs=_jobs(inside, lane, fleet, orders[lane.model]),
            )
        )
    today, models = by_model(day), []
    for name, model in active.models().items():
        shown = _model_status(name, model, active, picture, today.get(name, Today()))
        shown = replace(_with_downgrades(model, shown, seen), first_tokens_ms=fleet.first_tokens.of(name))
        models.append(shown)
    return Snapshot(
        number=number,
        at_ms=picture.at_ms,
        policy_version=active.version,
        made_up=active.made_up,
        models=tuple(models),
        lanes=tuple(lanes),
        hosts=tuple(_host_status(name, picture) for name in sorted(picture.hosts)),
        silent=tuple(
            SilentHost(name=name, beat_age_ms=max(0, picture.at_ms - beat))
            for name, beat in sorted(seen.silent.items())
        ),
        moves=moves(day),
        day=day,
    )


def stays_cold(model: str, aside: Iterable[HostRecord | HostStatus]) -> str:
    """Says why nothing wakes a model all of whose hosts take no new work, and what would have them take it again."""
    mend = " or ".join(f"upgrade {h.name}" if h.policy_unread else f"`gateway undrain {h.name}`" for h in aside)
    return f"{model} stays cold, because no host that serves it takes new work: {mend}"


def _orders(active: Active, picture: Picture, seen: CloseLook) -> dict[str, Precedence]:
    """Who goes before whom, by model."""
    lines: dict[str, list[LaneSeen]] = {}
    for lane in active.lanes().values():
        waits = [_waiter(one) for one in seen.jobs.get(lane.name, ()) if not one.held]
        more = picture.waiting.get(lane.name, 0) - len(waits)
        lines.setdefault(lane.model, []).append(LaneSeen(waits, more, lane.priority == "batch"))
    return {model: Precedence(of_model) for model, of_model in lines.items()}


def _waiter(job: Told) -> Waiter:
    return Waiter(job.submitted_at, job.id, job.caller, job.priority == "batch")


def _jobs(told: Sequence[Told], lane: Lane, fleet: Fleet, order: Precedence) -> tuple[JobStatus, ...]:
    found, waiting = [], 0
    for one in told:
        in_ms = None
        if not one.held:
            fresh = fleet.fresh_tokens(lane.model, session=one.session, tokens=one.tokens)
            before = order.before(_waiter(one))
            in_ms = fleet.foretold_ms(lane.name, before, fresh_tokens=fresh, may_start=one.may_start)
            waiting += 1
        found.append(
            JobStatus(
                id=one.id,
                caller=one.caller,
                state=one.state,
                priority=one.priority,
                position=0 if one.held else waiting,
                tokens=one.tokens,
                attempt=one.attempt,
                promotions=one.promotions,
                submitted_at=one.submitted_at,
                promote_at=one.promote_at,
                give_up_at=one.give_up_at,
                claimed_at=one.claimed_at if one.held else 0,
                first_token_at=one.first_token_at,
                first_token_in_ms=in_ms,
                host=one.owner if one.held else "",
            )
        )
    return tuple(found)


def _deadline_used(job: Told, at_ms: int) -> float:
    deadline = job.continue_by or job.promote_at or job.give_up_at
    return max(0, at_ms - job.queued_at) / max(1, deadline - job.queued_at) if deadline else 0


def _with_downgrades(model: Model, shown: ModelStatus, seen: CloseLook) -> ModelStatus:
    """Adds what is kept of a model's downgrades: nothing where the policy says nothing of them."""
    name = shown.name
    if model.sticky_promotion_ms:
        shown = replace(shown, sessions_on_fallback=seen.sticky[name])
    if model.max_downgrade_share < 1:
        asked = min(seen.asked[name], downgrades.WINDOW)
        shown = replace(shown, asked=asked, downgraded=seen.downgraded[name])
    return shown


def _lane_status(lane: Lane, picture: Picture, oldest_at: int) -> LaneStatus:
    return LaneStatus(
        name=lane.name,
        model=lane.model,
        priority=lane.priority,
        waiting=picture.waiting.get(lane.name, 0),
        max_queue=lane.max_queue,
        running=picture.running.get(lane.name, 0),
        cold_start_budget_ms=lane.cold_start_budget_ms,
        fallback=lane.fallback or "",
        retiring=lane.retiring,
        oldest_waiting_ms=max(0, picture.at_ms - oldest_at) if oldest_at else 0,
    )


def _model_status(name: str, model: Model, active: Active, picture: Picture, today: Today) -> ModelStatus:
    there = picture.on_host.get(name, {})
    lane = active.lane(name)
    best = min(there.values(), key=_rank, default=None)
    facts = picture.facts.get(name, ModelFacts())
    quarantined = facts.quarantined_until > picture.at_ms
    state = best.state if best is not None else NO_HOST
    if quarantined and state == "cold":
        state = "quarantined"
    return ModelStatus(
        name=name,
        label=model.label or "",
        runtime=model.backend,
        state=state,
        reason=without_name(name, _reason(best, _failure(name, state, facts))),
        first_token_ms=best.first_token_ms if best is not None else 0,
        first_token_budget_ms=model.first_token_budget_ms,
        waiting=picture.waiting.get(name, 0),
        max_queue=lane.max_queue if lane is not None else 0,
        running=sum(picture.running.get(lane_name, 0) for lane_name in active.lanes_of(name)),
        slots_used=sum(m.slots_used for m in there.values()),
        slots_settling=sum(m.slots_settling for m in there.values()),
        slots_total=sum(m.slots_total for m in there.values()),
        memory_bytes=sum(m.memory_bytes for m in there.values()),
        hosts=tuple(sorted(there)),
        simulated=model.backend == "simulated" or any(m.runtime == "simulated" for m in there.values()),
        keep_warm=model.keep_warm,
        outside_hours=_outside_hours(model, picture.at_ms),
        failures=facts.failures,
        wanted=facts.wanted_until > picture.at_ms,
        pinned=facts.pinned,
        unloaded_ms=max(0, facts.unloaded_until - picture.at_ms),
        quarantine_ms=max(0, facts.quarantined_until - picture.at_ms) if state == "quarantined" else 0,
        state_ms=max(0, picture.at_ms - best.since) if best is not None and best.since else 0,
        woke_at=best.woke_at if best is not None else 0,
        progress=best.progress if best is not None and state == "waking" else -1,
        weights=model.model,
        footprint_bytes=max((m.footprint_bytes for m in there.values()), default=0)
        or facts.footprint_bytes
        or (model.memory_mb or 0) << 20,
        max_concurrent=model.max_concurrent,
        parallel=min((m.parallel for m in there.values() if m.parallel), default=0),
        load_ms=facts.load_ms,
        last_load_ms=best.last_load_ms if best is not None else 0,
        prompt_tokens=today.prompt_tokens,
        cached_tokens=today.cached_tokens,
        prefill_tps=facts.prefill_tps,
        decode_tps=facts.decode_tps,
        judged=today.judged,
        in_time_asked=today.in_time_asked,
        in_time_any=today.in_time_any,
    )


def _outside_hours(model: Model, at_ms: int) -> str:
    hours = model.hours
    known = model.keep_warm and hours is not None and hours.zone is not None
    return model.active_hours or "" if known and hours is not None and not hours.contains(at_ms) else ""


def _host_status(name: str, picture: Picture) -> HostStatus:
    host = picture.hosts[name]
    return HostStatus(
        name=name,
        beat_age_ms=max(0, picture.at_ms - host.beat_at) if host.beat_at else 0,
        memory_total=host.memory_total,
        memory_used=host.memory_used,
        memory_headroom=host.memory_headroom,
        memory_source=host.memory_source,
        memory_note=host.memory_note,
        policy_version=host.policy_version,
        policy_unread=host.policy_unread,
        draining=host.draining,
        skew_ms=host.skew_ms,
        running=sum(hosts[name].slots_used for hosts in picture.on_host.values() if name in hosts),
        models=tuple(sorted(model for model, hosts in picture.on_host.items() if name in hosts)),
    )


def _rank(model: ModelOnHost) -> tuple[int, float]:
    place = _BEST_FIRST.index(model.state) if model.state in _BEST_FIRST else len(_BEST_FIRST)
    return place, model.first_token_ms or float("inf")


def _failure(name: str, state: str, facts: ModelFacts) -> str:
    if state == "quarantined":
        return facts.failure
    return facts.failed(name) if state == "cold" else ""


def _reason(best: ModelOnHost | None, failure: str) -> str:
    if best is None:
        return "no live host serves it"
    return best.reason or failure


_Part = TypeVar("_Part")


def _read(kind: type[_Part], data: Any) -> _Part:
    return _made(kind, _known(kind, data))


@cache
def _kinds(part: type[Any]) -> dict[str, Any]:
    """The kinds of a part's fields, read out of their annotations once and not for each of a thousand jobs."""
    return get_type_hints(part)


def _made(kind: type[_Part], parts: Mapping[str, Any]) -> _Part:
    for name, of in _kinds(cast(Any, kind)).items():
        if name in parts and not _fits(parts[name], of):
            raise ValueError(f"{name} of a {kind.__name__} is no {of}")
    try:
        return kind(**parts)
    except TypeError as missing:
        raise ValueError(str(missing)) from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's kind; a number may be any number."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(kind)[0]) for one in value)
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    return isinstance(value, (int, float) if kind in (int, float) else get_origin(kind) or kind)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("something else where a list belongs")
    return value


def _plain(part: Any) -> dict[str, Any]:
    """The fields of a part; unlike `asdict` it copies no deeper, which for many jobs takes longer than all the rest."""
    return dict(vars(part))


def _job_for(viewer: str | None, job: JobStatus) -> dict[str, Any]:
    told = _plain(job)
    if viewer is not None and job.caller != viewer:
        told["id"] = told["caller"] = ""
    return told


def _read_lane(data: Any) -> LaneStatus:
    parts = _known(LaneStatus, data)
    return _made(LaneStatus, parts | {"jobs": tuple(_read(JobStatus, job) for job in _list(data.get("jobs", [])))})


def _known(kind: type[Any], data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"something else where a {kind.__name__} belongs")
    known = {field.name for field in fields(kind)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in known}
