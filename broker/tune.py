"""What `gateway tune` proposes, each with its reason, and what it cannot know. Pure: it looks at figures only.

A waiting job is served after the jobs before it, `service_ms / slots` each: its *turn*. Places whose turn comes too
late serve nobody, and requests that are refused while a place would have come in time are lost for nothing: the queue
budget follows from that. A cold-start budget must hold a load and a first token, or a fallback takes every cold start,
and no place mends that. Counters are of days, so nothing is known of what came at the same moment, and nothing follows
from a mean load alone.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ENOUGH = 20
"""Requests below which their shares say little."""
SURE = 50
"""Judged jobs from which on a budget may be tightened."""
HARMED_SHARE = 0.01
"""Of a lane's requests: so many refused, late or moved make it worth a change."""
HARMED_LEAST = 3
LOAD_MARGIN = 1.2
"""A budget holds the learned load and first token so many times over: loads vary."""
TIGHT_MARGIN = 1.5
LOOSE = 3.0
"""A budget that is so many times what was needed is worth tightening."""
IN_TIME_SHARE = 0.99
BUDGET_MS_MAX = 60_000
"""Nobody should be told to wait longer than this for a load."""
BUDGET_MS_LEAST = 2_000
QUEUE_MAX, SLOTS_MAX = 100_000, 1024
"""What the policy allows."""
GROWTH = 2
"""A queue budget at most doubles at once: the next look is at what came of it."""
HOG_SHARE, HOG_LONGER = 0.5, 3.0
"""Who takes more than this share of a lane's slot time, with jobs so many times as long as others', is in their way."""
SERVICE_MS_LEAST = 1.0
"""A job that holds its slot for less was none that a place can be reckoned by."""
SLOT_MEMORY_SHARE = 0.1
"""Free memory, as a share of what the model occupies, without which no further slot is proposed."""

Path = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSeen:
    """A model of the policy, and what was learned of it; 0 = not known."""

    name: str
    max_concurrent: int = 1
    hosts: int = 1
    parallel: int = 0
    """How many generations its runtime runs at once, where that is fewer than `max_concurrent`; else 0."""
    remote: bool = False
    load_ms: float = 0
    first_token_ms: float = 0
    """Its own, of a job that has a slot and whose prompt is soon read: without the wait before."""
    service_ms: float = 0
    footprint_bytes: int = 0
    headroom_bytes: int = 0
    """The least that is free on a host that serves it."""

    @property
    def slots(self) -> int:
        """Generations that run at once over all hosts."""
        return min(self.max_concurrent, self.parallel or self.max_concurrent) * max(1, self.hosts)

    @property
    def turn_ms(self) -> float:
        """How long each job before one makes it wait."""
        return self.service_ms / self.slots


@dataclass(frozen=True, kw_only=True)
class CallerSeen:
    """What a caller had of a lane."""

    done: int = 0
    running_ms: int = 0

    @property
    def each_ms(self) -> float:
        """The mean time that a job held a slot."""
        return self.running_ms / self.done if self.done else 0.0


@dataclass(frozen=True, kw_only=True)
class LaneSeen:
    """A lane of interactive work, and what became of the requests that asked for it."""

    name: str
    model: str
    max_queue: int
    cold_start_budget_ms: int
    max_wait_ms: int
    fallback: str = ""
    """Where its waiting jobs move; a remote fallback takes none that waits."""
    names: tuple[str, ...] = ()
    """What clients ask for to get here: routing names, beside its own."""
    in_lanes: frozenset[str] = frozenset()
    """Keys that `lanes:` says for it; of a model's own lane all others stand at the model."""
    mixed_with: tuple[str, ...] = ()
    """Other lanes of its model, of whose jobs those that moved are counted here."""
    asked: int = 0
    """Jobs that ended and requests that were refused."""
    full: int = 0
    """Refused for want of a place."""
    moved: int = 0
    """Moved to the fallback lane."""
    expired: int = 0
    judged: int = 0
    late: int = 0
    first_token_p95_ms: int | None = None
    """From the submit, whatever the wait was and whoever answered."""
    callers: Mapping[str, CallerSeen] = field(default_factory=dict)

    def path(self, key: str) -> Path:
        """Where one of its keys stands in the policy file."""
        at_model = self.name == self.model and key not in self.in_lanes
        return ("models" if at_model else "lanes", self.name, key)

    @property
    def patience_ms(self) -> int:
        """How long a job waits here before it is moved or given up."""
        return self.cold_start_budget_ms if self.fallback else self.max_wait_ms

    @property
    def unserved(self) -> int:
        """Requests that got no first token in time from here, other than for want of a place."""
        return max(self.late, self.moved) + self.expired


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All that is judged."""

    models: tuple[ModelSeen, ...] = ()
    lanes: tuple[LaneSeen, ...] = ()
    names: frozenset[str] = frozenset()
    """Every name that the policy knows."""


@dataclass(frozen=True)
class Proposal:
    """One change to the policy file. `now` is what it says, None where it says nothing of the kind."""

    path: Path
    now: Any
    proposed: Any
    why: str

    def as_json(self) -> dict[str, Any]:
        """Gives it as plain data."""
        return {"key": ".".join(self.path), "now": self.now, "proposed": self.proposed, "why": self.why}


@dataclass(frozen=True)
class Tuning:
    """What to change, what no number mends, and what could not be judged."""

    proposals: tuple[Proposal, ...]
    advice: tuple[str, ...]
    unknown: tuple[str, ...]

    def fragment(self) -> dict[str, Any]:
        """The proposals as a part of a policy file: mappings to be merged into it, rules to stand above its own."""
        told: dict[str, Any] = {}
        for one in self.proposals:
            if one.path == ("routing",):
                told.setdefault("routing", []).append(one.proposed)
                continue
            there = told
            for name in one.path[:-1]:
                there = there.setdefault(name, {})
            there[one.path[-1]] = one.proposed
        return told


def propose(seen: Seen) -> Tuning:
    """Judges every lane; what says nothing changes nothing."""
    models = {model.name: model for model in seen.models}
    proposals: list[Proposal] = []
    advice: list[str] = []
    unknown: list[str] = []
    for model in seen.models:
        proposals += _hidden_queue(model)
    taken = set(seen.names)
    for lane in seen.lanes:
        model = models[lane.model]
        if problem := _too_little(lane):
            unknown.append(problem)
            continue
        unknown += _not_known(lane, model)
        budget = [*_budget(lane, model)]
        found = [*_queue(lane, model, budget_ms=budget[0].proposed if budget else None), *budget]
        own = _lane_of_its_own(lane, taken)
        taken |= {one.path[1] for one in own if one.path[0] == "lanes"}
        proposals += [*found, *own]
        if not found and not own and _harmed(lane, lane.full + lane.unserved):
            more, words = _slots(lane, model)
            already = any(one.path == ("models", model.name, "maxConcurrent") for one in proposals)
            proposals += [] if already else more
            advice += words
    if seen.lanes:
        unknown.append(
            "How many requests came at the same moment is not counted, only how many in a day: these proposals go by "
            "what was refused, late or moved, and a day like no other may need others."
        )
    return Tuning(tuple(proposals), tuple(advice), tuple(unknown))


# --- slots -------------------------------------------------------------------------------------------------------


def _hidden_queue(model: ModelSeen) -> Iterator[Proposal]:
    if 0 < model.parallel < model.max_concurrent:
        yield Proposal(
            ("models", model.name, "maxConcurrent"), model.max_concurrent, model.parallel,
            f"The runtime of {model.name} was seen to run {model.parallel} at once and not {model.max_concurrent}: "
            "what is sent beyond that waits inside it, where no deadline and no other host sees it.",
        )  # fmt: skip


def _slots(lane: LaneSeen, model: ModelSeen) -> tuple[list[Proposal], list[str]]:
    """A slot more, where places and budgets cannot help and memory is left; else what else would."""
    if _lost_when_cold(lane, model) and not _harmed(lane, lane.full):
        waits_ms = min(lane.cold_start_budget_ms, lane.patience_ms)
        return [], [
            f"{_share(lane.unserved, lane.asked)} of {lane.asked:,} requests for {lane.name} were late, moved or given "
            f"up (how many because it was cold, and how many because it was busy, is not counted): {_loads(model)}, "
            f"past the {_s(waits_ms)} that a job has, so who finds it cold is served in time only by a model that is "
            "loaded before (`keepWarm`)."
        ]
    harm = f"{_share(lane.full + lane.unserved, lane.asked)} of {lane.asked:,} requests for {lane.name} were refused, "
    harm += "late or moved, and neither more places nor a longer budget would help"
    if model.remote or model.parallel:
        return [], [f"{harm}: its runtime takes no more at once, so another model or host must."]
    if model.max_concurrent >= SLOTS_MAX:
        return [], [f"{harm}: it has as many slots as a model may have."]
    if model.service_ms < SERVICE_MS_LEAST or not model.footprint_bytes or not model.hosts:
        return [], [f"{harm}; whether another slot would cannot be said before it has run here for a while."]
    if model.headroom_bytes < model.footprint_bytes * SLOT_MEMORY_SHARE:
        free, held = _gib(model.headroom_bytes), _gib(model.footprint_bytes)
        return [], [f"{harm}; with {free} free beside its {held} another slot may not fit: a second host would help."]
    why = (
        f"{harm}, while {_gib(model.headroom_bytes)} are free beside the {_gib(model.footprint_bytes)} of "
        f"{model.name}; its runtime must allow it, and whether each answer gets slower shows only then."
    )
    now = model.max_concurrent
    return [Proposal(("models", model.name, "maxConcurrent"), now, now + 1, why)], []


# --- places ------------------------------------------------------------------------------------------------------


def _queue(lane: LaneSeen, model: ModelSeen, *, budget_ms: int | None) -> Iterator[Proposal]:
    """As many places as have their turn in time: within `budget_ms`, where another cold-start budget is proposed."""
    if model.service_ms < SERVICE_MS_LEAST:
        return
    patience_ms = lane.patience_ms if budget_ms is None else budget_ms
    fit = math.floor(patience_ms / model.turn_ms)
    limit = f"the {_s(patience_ms)}{' (as proposed)' if budget_ms is not None else ''} after which a job " + (
        f"moves to {lane.fallback}" if lane.fallback else "is given up"
    )
    pace = f"{_s(model.service_ms)} a job, {model.slots} slot{'s' * (model.slots != 1)}"
    now = lane.max_queue
    if _harmed(lane, lane.full) and min(fit, QUEUE_MAX) > now:
        proposed = min(fit, max(1, now * GROWTH), QUEUE_MAX)
        yield Proposal(
            lane.path("maxQueue"), now, proposed,
            f"{lane.full:,} of {lane.asked:,} requests for {lane.name} found no place, though place {proposed} would "
            f"have its turn after {_s(proposed * model.turn_ms)} ({pace}), within {limit}.",
        )  # fmt: skip
    elif _harmed(lane, lane.unserved) and fit < now and not (lane.mixed_with or _lost_when_cold(lane, model)):
        yield Proposal(
            lane.path("maxQueue"), now, max(1, fit),
            f"The last of {now} places of {lane.name} has its turn after {_s(now * model.turn_ms)} ({pace}), past "
            f"{limit}, and {lane.unserved:,} of {lane.asked:,} requests were late, moved or given up: such a place "
            "only puts off the refusal or the fallback.",
        )  # fmt: skip


# --- budgets -----------------------------------------------------------------------------------------------------


def _budget(lane: LaneSeen, model: ModelSeen) -> Iterator[Proposal]:
    """Long enough for a load and a first token, where anybody should wait for that; not much longer than was needed."""
    if not lane.fallback or not model.load_ms:
        return
    now, path = lane.cold_start_budget_ms, lane.path("coldStartBudgetMs")
    wake_ms = _wake_ms(model)
    if now < wake_ms:
        proposed = _whole_s(wake_ms * LOAD_MARGIN)
        if _harmed(lane, lane.moved) and proposed <= min(BUDGET_MS_MAX, lane.max_wait_ms):
            yield Proposal(
                path, now, proposed,
                f"{_loads(model)}, so nobody who finds it cold has one within {_s(now)}; {lane.moved:,} of "
                f"{lane.asked:,} requests moved to {lane.fallback}, for that or because it was busy: which of them for "
                "which is not counted.",
            )  # fmt: skip
        return
    p95 = lane.first_token_p95_ms
    if p95 is None or lane.judged < SURE or lane.late > lane.judged * (1 - IN_TIME_SHARE):
        return
    needed_ms = max(wake_ms, p95)
    proposed = max(BUDGET_MS_LEAST, _whole_s(needed_ms * TIGHT_MARGIN))
    if now > needed_ms * LOOSE and proposed < now:
        in_time = lane.judged - lane.late
        yield Proposal(
            path, now, proposed,
            f"{in_time:,} of {lane.judged:,} first tokens of {lane.name} came in time, 95 % of all within "
            f"{_s(p95)}, and a load takes {_s(model.load_ms)}: {_s(proposed)} hold both, and who would wait longer is "
            f"moved to {lane.fallback} sooner.",
        )  # fmt: skip


def _wake_ms(model: ModelSeen) -> float:
    """A load and a first token, the load alone where no first token is known."""
    return model.load_ms + model.first_token_ms


def _lost_when_cold(lane: LaneSeen, model: ModelSeen) -> bool:
    """Whether who finds the model cold has no first token in time, whatever place it gets."""
    waits_ms = min(lane.cold_start_budget_ms, lane.patience_ms)
    return model.load_ms > 0 and waits_ms < _wake_ms(model)


def _loads(model: ModelSeen) -> str:
    loads = f"{model.name} loads in {_s(model.load_ms)} and then"
    if not model.first_token_ms:
        return f"{loads} gives a first token, after a time that no worker has measured yet"
    return f"{loads} takes {_s(model.first_token_ms)} itself to a first token"


# --- lanes -------------------------------------------------------------------------------------------------------


def _lane_of_its_own(lane: LaneSeen, taken: Iterable[str]) -> list[Proposal]:
    """A lane behind people's for a caller whose long jobs are in the others' way."""
    if not _harmed(lane, lane.full + lane.unserved) or len(lane.callers) < 2:
        return []
    whole_ms = sum(caller.running_ms for caller in lane.callers.values())
    name, hog = max(lane.callers.items(), key=lambda pair: (pair[1].running_ms, pair[0]))
    others = [caller for other, caller in lane.callers.items() if other != name]
    done, ran_ms = sum(c.done for c in others), sum(c.running_ms for c in others)
    if not done or hog.done < HARMED_LEAST or hog.running_ms <= whole_ms * HOG_SHARE:
        return []
    if hog.each_ms < HOG_LONGER * ran_ms / done:
        return []
    own = _free_name(f"{lane.model}-{re.sub(r'[^a-z0-9_-]', '-', name.lower())}", taken)
    why = (
        f"{name} took {_share(hog.running_ms, whole_ms)} of the slot time of {lane.name}, {_s(hog.each_ms)} a job "
        f"where the others took {_s(ran_ms / done)}, while {lane.full + lane.unserved:,} of {lane.asked:,} requests "
        "were refused, late or moved: in a lane of batch priority its jobs let people go first."
    )
    new = {"target": lane.model, "priority": "batch"}
    found = [Proposal(("lanes", own), None, new, why)]
    for asked in (lane.name, *lane.names):
        rule = {"match": {"lane": asked, "caller": name}, "target": own}
        why = f"It leads the requests of {name} for {asked} there, and must stand above the other rules."
        found.append(Proposal(("routing",), None, rule, why))
    return found


def _free_name(name: str, taken: Iterable[str]) -> str:
    known, number, found = set(taken), 2, name[:100]
    while found in known:
        found, number = f"{name[:100]}-{number}", number + 1
    return found


# --- what is not known -------------------------------------------------------------------------------------------


def _too_little(lane: LaneSeen) -> str:
    if not lane.asked:
        return f"Nobody asked for {lane.name} in this time, so nothing is known of it."
    if lane.asked < ENOUGH:
        return f"Only {lane.asked} requests for {lane.name} are counted, too few to go by ({ENOUGH} would do)."
    return ""


def _not_known(lane: LaneSeen, model: ModelSeen) -> Iterator[str]:
    if not model.hosts:
        yield f"No live host serves {model.name}, so its slots are counted as those of one host."
    if model.service_ms < SERVICE_MS_LEAST:
        yield f"How long a job of {model.name} holds a slot is not learned, so places of {lane.name} are not judged."
    if lane.mixed_with:
        yield (
            f"What moved out of {', '.join(lane.mixed_with)} is counted with {lane.name}, so whether {lane.name} has "
            "too many places is not judged."
        )
    if not lane.fallback:
        yield f"{lane.name} has no fallback that waiting jobs move to, so its cold-start budget is not judged."
    elif not model.load_ms:
        yield f"No worker has loaded {model.name} yet, so the cold-start budget of {lane.name} is not judged."


def _harmed(lane: LaneSeen, requests: int) -> bool:
    return requests >= max(HARMED_LEAST, lane.asked * HARMED_SHARE)


def _whole_s(value_ms: float) -> int:
    return math.ceil(value_ms / 1000) * 1000


def _s(value_ms: float) -> str:
    if 0 < value_ms < 100:
        return f"{max(1, round(value_ms))} ms"
    return f"{value_ms / 1000:.0f} s" if value_ms >= 10_000 else f"{value_ms / 1000:.1f} s"


def _share(part: int, whole: int) -> str:
    return f"{part * 100 / whole:.0f} %"


def _gib(value: int) -> str:
    return f"{value / 2**30:.1f} GiB"
