"""Gathers what `tune` judges: the policy, the status, what was learned, and the counters of some days, by lane."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from statistics import median
from typing import Any

from broker import usage
from broker.figures import ENDS, By, Count
from broker.first_tokens import percentile
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.policy import Lane, Model, Policy
from broker.snapshots import Snapshots
from broker.status import HostStatus, ModelStatus
from broker.store import Store
from broker.tune import CallerSeen, LaneSeen, ModelSeen, Seen, propose


@dataclass
class _OfLane:
    """The counters of one lane."""

    counts: Counter[str] = field(default_factory=Counter)
    first_tokens: Counter[int] = field(default_factory=Counter)
    done_by: Counter[str] = field(default_factory=Counter)
    running_ms_by: Counter[str] = field(default_factory=Counter)


class Tally:
    """Adds counters up by the lane that was asked for: a job that was moved ends in another, and counts for its own."""

    def __init__(self) -> None:
        self._lanes: defaultdict[str, _OfLane] = defaultdict(_OfLane)

    def count(self, day: date, one: Count) -> None:
        """Adds a counter of a day; none twice."""
        asked, there = self._lanes[_asked_lane(one.by)], self._lanes[one.by.lane]
        if one.figure in ENDS:
            asked.counts["asked"] += one.amount
            if one.figure == "expired":
                asked.counts["expired"] += one.amount
        elif one.figure == "refused":
            asked.counts["asked"] += one.amount
            asked.counts["full"] += one.amount if one.detail == "lane_full" else 0
        elif one.figure == "promoted":
            there.counts["moved"] += one.amount
        elif one.figure == "running_ms":
            there.running_ms_by[one.by.caller] += one.amount
        if one.figure == "done":
            there.done_by[one.by.caller] += one.amount
        if one.judged:
            asked.counts["judged"] += one.amount
            asked.counts["late"] += one.amount if one.judged != "in_time" and one.figure != "expired" else 0
            if one.judged != "no_token":
                asked.first_tokens[one.first_token_ms] += one.amount

    def of(self, lane: Lane, policy: Policy) -> LaneSeen:
        """Gives a lane as it was seen."""
        found = self._lanes.get(lane.name, _OfLane())
        counts = found.counts
        names = (rule.match.lane for rule in policy.routing if rule.target == lane.name)
        beside = (other for other in policy.all_lanes().values() if other.model == lane.name != other.name)
        fallback = policy.lane(lane.fallback) if lane.fallback else None
        callers = found.done_by.keys() | found.running_ms_by.keys()
        return LaneSeen(
            name=lane.name,
            model=lane.model,
            max_queue=lane.max_queue,
            cold_start_budget_ms=lane.cold_start_budget_ms,
            max_wait_ms=lane.max_wait_ms,
            fallback=fallback.name if fallback is not None and fallback.trust == "local" else "",
            names=tuple(dict.fromkeys(name for name in names if name and name != lane.name)),
            in_lanes=_said(policy, lane.name),
            mixed_with=tuple(other.name for other in beside if other.fallback),
            **{name: counts[name] for name in ("asked", "full", "moved", "expired", "judged", "late")},
            first_token_p95_ms=percentile(found.first_tokens, 0.95),
            callers={
                name: CallerSeen(done=found.done_by[name], running_ms=found.running_ms_by[name])
                for name in sorted(callers)
            },
        )


def seen(
    policy: Policy,
    tally: Tally,
    *,
    shown: Mapping[str, ModelStatus],
    hosts: Mapping[str, HostStatus],
    service_ms: Mapping[str, float],
) -> Seen:
    """Puts together what is judged. Pure; lanes of batch work are not judged, since nobody waits for it."""
    lanes = [lane for lane in policy.all_lanes().values() if lane.priority == "interactive"]
    models = {name: policy.models[name] for name in {lane.model: None for lane in lanes}}
    return Seen(
        models=tuple(
            _model(name, model, shown.get(name, ModelStatus(name=name)), hosts, service_ms.get(name, 0))
            for name, model in models.items()
        ),
        lanes=tuple(tally.of(lane, policy) for lane in lanes),
        names=frozenset([*policy.names(), *policy.all_lanes()]),
    )


async def tuning(store: Store, book: PolicyBook, fleet: Fleet, *, since: str, until: str) -> dict[str, Any]:
    """Judges the days of a span (`usage.days`) and gives everything as plain data; raises BadRequest."""
    first, last = await usage.days(store, since, until)
    tally = Tally()
    await usage.tell(store, tally, first, last)
    active, shown = book.active, await Snapshots(store, book, fleet).latest()
    found = propose(
        seen(
            active.policy,
            tally,
            shown={model.name: model for model in shown.models},
            hosts={host.name: host for host in shown.hosts},
            service_ms={name: facts.service_ms for name, facts in fleet.picture.facts.items()},
        )
    )
    return {
        "since": first.isoformat(),
        "until": last.isoformat(),
        "zone": "UTC",
        "policy_version": active.version,
        "proposals": [proposal.as_json() for proposal in found.proposals],
        "advice": list(found.advice),
        "unknown": list(found.unknown),
        "fragment": found.fragment(),
    }


def _said(policy: Policy, lane: str) -> frozenset[str]:
    """The keys that `lanes:` says for a lane."""
    entry = policy.lanes.get(lane)
    return frozenset(entry.model_dump(by_alias=True, exclude_none=True)) if entry is not None else frozenset()


def _asked_lane(by: By) -> str:
    """A moved job stands under the lane where it ended; the model that it asked for tells where it began."""
    return by.lane if by.model == by.asked_model else by.asked_model


def _model(
    name: str, model: Model, shown: ModelStatus, hosts: Mapping[str, HostStatus], service_ms: float
) -> ModelSeen:
    there = [hosts[host].memory_headroom for host in shown.hosts if host in hosts]
    return ModelSeen(
        name=name,
        max_concurrent=model.max_concurrent,
        hosts=min(len(shown.hosts), 1 if model.shared else model.replicas),
        parallel=shown.parallel,
        remote=model.trust == "remote",
        load_ms=shown.load_ms or shown.last_load_ms,
        first_token_ms=float(median(shown.first_tokens_ms)) if shown.first_tokens_ms else shown.first_token_ms,
        service_ms=service_ms,
        footprint_bytes=shown.footprint_bytes,
        headroom_bytes=min(there, default=0),
    )
