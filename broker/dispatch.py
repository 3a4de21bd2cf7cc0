"""Who is next, and how long it will take. Pure functions: facts in, decision out, no Redis, no clock, no log.

The worker chooses with `choose`; admission, promotion and `Retry-After` predict with the functions below it. A fact
that gates a write is checked again inside the script that writes.
"""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from broker.fairness import Levels
from broker.records import Waiting

UNKNOWN_SERVICE_MS = 5_000.0
"""How long a job is assumed to hold a slot before any has been measured."""

AWAY_S = 5
"""When a model may be asked for again of which nobody knows when it comes back."""

INTERACTIVE_MEMORY_MS = 600_000
"""For this long after interactive work, one of two or more slots is kept for the next."""

STOP_MS = 2_500
"""How long a running job may take to stop and its slot to be seen to settle, when the slot is needed for another: a
runtime is asked every two seconds."""

AFFINITY_MS = 250
"""For this long a job is left to the host that has its session's prompt in a cache."""

FORETOLD_MS_MAX = 86_400_000
SHORT_PROMPT_TOKENS = 512
"""A prompt that is read in next to no time, however fast the model reads."""

_ALL_THE_SAME: Mapping[str, Levels] = {}

Availability = Literal["warm", "degraded", "waking", "cold", "unavailable"]


@dataclass(frozen=True)
class ModelView:
    """What is known of a model across its hosts when a decision is taken. Times in ms, instants in ms."""

    availability: Availability
    slots_total: int = 0
    slots_free: int = 0
    slots_yielding: int = 0  # held by batch work that is put back where people would miss their deadline
    slots_kept: int = 0  # kept free of batch work now
    first_token_ms: float = 0
    service_ms: float = 0
    load_ms: float = 0  # 0 = never loaded yet
    prefill_tps: float = 0  # uncached prompt tokens read a second, 0 = not known
    waking_since: int = 0
    room_at: int = 0  # the earliest instant at which others make room for it, 0 = it waits for nobody's memory
    reason: str = ""
    aside_until: int = 0  # unavailable until then, by its quarantine; 0 = nobody knows until when


def choose(
    waiting: Iterable[Waiting],
    *,
    free: int,
    total: int,
    now_ms: int,
    service_ms: float,
    interactive_at: int = 0,
    active: bool = False,
    cached: Container[str] = frozenset(),
    open_slots: int | None = None,
    elsewhere: Container[str] = frozenset(),
    levels: Mapping[str, Levels] = _ALL_THE_SAME,
) -> Waiting | None:
    """Picks the job that should be claimed next, or None if no slot may be given away.

    Order: interactive before batch; then jobs whose slack until their cold-start deadline is under one service time,
    earliest deadline first; then jobs whose session's prompt is cached in a free slot; then those of the caller that
    was served least; then age. With two slots or more, the last free one is kept for interactive work during active
    hours, and while there was some within INTERACTIVE_MEMORY_MS.

    `levels` say, by priority, how far the callers that wait have been served; nothing where only one waits. A near
    deadline and a cached prompt count only for a caller that is not ahead of the least served by more than one mean
    charge. Otherwise fairness would end where it begins to matter: the jobs of whoever floods a lane wait for long,
    so their deadlines are always near, and its sessions always sit in the slots.

    `interactive_at` is the instant of the last interactive claim; `active` = the model's active hours go on. `cached`
    are the sessions that free slots hold and that may still go before others. `open_slots` are the free slots that are
    not kept for their session: without one, only cached sessions and urgent jobs get a slot; None = all free ones.
    `elsewhere` are sessions whose prompt another host has: for AFFINITY_MS their jobs are left to it.
    """
    if free < 1:
        return None
    reserved = free <= kept_for_people(total=total, now_ms=now_ms, interactive_at=interactive_at, active=active)
    urgent_until = now_ms + (service_ms or UNKNOWN_SERVICE_MS)
    kept, caches = open_slots is not None and open_slots < 1, bool(cached)
    best: Waiting | None = None
    best_rank: tuple[float, ...] = ()
    best_level = level = 0.0
    people_served, batch_served = levels.get("interactive"), levels.get("batch")
    # A worker looks at hundreds of jobs for each that it takes: most are passed over after two or three comparisons.
    for job in waiting:
        batch = job.priority == "batch"
        if batch and reserved:
            continue
        urgent = 0 < job.promote_at < urgent_until
        known = caches and job.session in cached
        if levels:
            served, level = batch_served if batch else people_served, 0.0
            if served is not None:
                level = served.of.get(job.caller, 0.0)
                if level > served.ahead_above:
                    urgent = known = False
        if not known and not urgent:
            if kept:
                continue
            if best is not None and batch >= best_rank[0] and level >= best_level:
                if job.submitted > best.submitted or level > best_level:
                    continue  # younger, or served more, than one that is at least of its kind
            if elsewhere and job.session in elsewhere and now_ms - job.submitted < AFFINITY_MS:
                continue
        rank = (batch, not urgent, job.promote_at if urgent else 0, not known, level, job.submitted)
        if best is None or rank < best_rank or (rank == best_rank and job.job < best.job):
            best, best_rank, best_level = job, rank, level
    return best


def kept_for_people(*, total: int, now_ms: int, interactive_at: int, active: bool) -> int:
    """How many free slots batch work may not have now: one of two or more while people are expected."""
    expected = active or (interactive_at > 0 and now_ms - interactive_at < INTERACTIVE_MEMORY_MS)
    return int(total >= 2 and expected)


def in_need(
    waiting: Iterable[Waiting],
    *,
    now_ms: int,
    budgets_ms: Mapping[str, int],
    first_token_ms: float,
    prefill_tps: float,
) -> tuple[list[Waiting], int | None]:
    """Gives the interactive jobs that will miss their deadline unless a slot is made free for them now, and says at
    which instant the next will be one of them; None = none waits.

    The deadline is `promote_at`, or, where a job has no fallback, its submit and the cold-start budget of its lane
    (`budgets_ms`). A slot must begin to be made free so long before as a stop takes (STOP_MS), and the first token.
    """
    need: list[Waiting] = []
    next_at = None
    for job in waiting:
        if job.priority == "batch":
            continue
        deadline = job.promote_at or job.submitted + budgets_ms.get(job.lane, 0)
        reading_ms = job.tokens * 1000 / prefill_tps if prefill_tps > 0 else 0.0
        at = int(deadline - STOP_MS - first_token_ms - reading_ms)
        if at <= now_ms:
            need.append(job)
        elif next_at is None or at < next_at:
            next_at = at
    return need, next_at


def ready_in_ms(view: ModelView, now_ms: int) -> float | None:
    """Predicts when the model can take a job: 0 = now, inf = never, None = nothing was learned yet."""
    if view.availability in ("warm", "degraded"):
        return 0.0
    if view.availability == "unavailable":
        return math.inf
    room = max(0.0, view.room_at - now_ms) if view.availability == "cold" else 0.0
    if view.load_ms <= 0:
        return room or None  # what is known is a part of it: it will not take less
    elapsed = now_ms - view.waking_since if view.availability == "waking" and view.waking_since else 0
    # a load that takes longer than it ever did is not about to end at any moment: assume a quarter more
    return room + max(view.load_ms - elapsed, view.load_ms / 4 if elapsed > view.load_ms else 0.0)


def first_token_in_ms(
    view: ModelView, *, ahead: int, now_ms: int, fresh_tokens: int = 0, batch_ahead: int | None = None
) -> float | None:
    """Predicts the first token of a job with `ahead` jobs before it; inf = never, None = cannot be said.

    It comes when the model is ready, those before it had their turns, and its prompt is read: `fresh_tokens` of it
    are in no cache. `batch_ahead` = it is batch work, behind so much of its kind and `ahead` jobs of people.
    """
    ready = ready_in_ms(view, now_ms)
    if ready is None or math.isinf(ready):
        return ready
    turns = _turns(view, ahead=ahead, batch_ahead=batch_ahead)
    service = view.service_ms or UNKNOWN_SERVICE_MS
    reading = fresh_tokens * 1000 / view.prefill_tps if view.prefill_tps > 0 else 0.0
    return ready + turns * service + reading + (view.first_token_ms or 0.0)


def _turns(view: ModelView, *, ahead: int, batch_ahead: int | None) -> float:
    """How many service times those before a job take; 0 = a slot is free for it.

    On a model at work some slot becomes free every service time / slots; after a load all slots start together, so that
    turns come in waves. Batch work begins only where a slot that is kept for people stays free.
    """
    kept = 0 if batch_ahead is None else view.slots_kept
    slots = max(1, view.slots_total)
    at_work = view.availability in ("warm", "degraded")
    free = view.slots_free if at_work else slots
    behind = max(0, ahead + (batch_ahead or 0) + 1 + kept - free)
    people = min(ahead, behind) if kept else behind  # they take every slot
    turns = people / slots + (behind - people) / max(1, slots - kept)
    return turns if at_work else math.ceil(turns)


def foretold_ms(
    view: ModelView, *, ahead: int, now_ms: int, fresh_tokens: int = 0, batch_ahead: int | None = None
) -> int | None:
    """Predicts the first token for those who wait: only where everything that it depends on has been measured.

    A decision needs some number and assumes what it does not know; a person would take it for a promise.
    """
    found = first_token_in_ms(view, ahead=ahead, now_ms=now_ms, fresh_tokens=fresh_tokens, batch_ahead=batch_ahead)
    if found is None or found > FORETOLD_MS_MAX:
        return None
    loads = view.availability in ("cold", "waking")
    if loads and (view.load_ms <= 0 or view.room_at > now_ms):
        return None  # others make room at that instant at the earliest
    if view.availability == "waking" and now_ms - view.waking_since > view.load_ms:
        return None  # it waits for something before it loads, or takes longer than it ever did
    if view.service_ms <= 0 and _turns(view, ahead=ahead, batch_ahead=batch_ahead):
        return None
    if fresh_tokens > SHORT_PROMPT_TOKENS and view.prefill_tps <= 0:
        return None
    return round(found)


def promotion_helps(here: float | None, there: float | None, *, there_budget_ms: int, overdue: bool) -> bool:
    """Decides whether the fallback is predicted to answer sooner.

    `here` and `there` are predictions as of `first_token_in_ms`. Unknown here, past the deadline, counts as never;
    unknown there (a fallback that was never loaded) counts as its own cold-start budget.
    """
    if here is None:
        if not overdue:
            return False
        here = math.inf
    if there is None:
        there = float(there_budget_ms)
    return there < here


def waiting_is_pointless(here: float | None, view: ModelView, *, left_ms: float, priority: str, ahead: int = 0) -> bool:
    """Decides whether a job should try its fallback before its deadline: its model cannot come, its first token is
    predicted to come too late, or the model answers too slowly for people.

    On a warm model a job whose turn it is stays, however long its prompt: its claim ends the cold-start clock. Nor is
    a deadline that has passed already any reason to hurry, and without a measured service time nothing is predicted.
    The slots that batch work holds are people's in time: it is put back for them. Those kept for people are never its
    own.
    """
    if view.availability == "unavailable":
        return True
    if view.availability == "degraded" and priority == "interactive":
        return True
    if here is None or here <= left_ms:
        return False
    if view.availability in ("cold", "waking"):
        return True
    soon_free = view.slots_free + (view.slots_yielding if priority == "interactive" else -view.slots_kept)
    return left_ms > 0 and view.service_ms > 0 and ahead >= soon_free


def retry_after_s(view: ModelView, *, before: int = 0) -> int:
    """Says in how many whole seconds (1 to 30) a place in the lane should be free, from the rate at which it drains;
    `before` places go to others first."""
    service = view.service_ms or UNKNOWN_SERVICE_MS
    one_leaves_ms = service / max(1, view.slots_total) * (1 + before)
    if view.availability in ("cold", "waking"):
        one_leaves_ms += view.load_ms or 0.0
    return max(1, min(30, math.ceil(one_leaves_ms / 1000)))


def back_in_s(view: ModelView, now_ms: int) -> int:
    """Says in how many whole seconds (1 to 30) a model that cannot serve may be tried again: when its quarantine is
    over."""
    left_ms = view.aside_until - now_ms
    return min(30, math.ceil(left_ms / 1000)) if left_ms > 0 else AWAY_S
