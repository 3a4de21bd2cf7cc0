"""One look at Redis: hosts, models and lanes of a single moment, read by one script. What is made of it, others say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.keyspace import GROUP
from broker.policies import Active
from broker.records import HostRecord, ModelFacts, ModelOnHost
from broker.store import Store

TOLD_INTERACTIVE, TOLD_BATCH = 256, 64
"""So many of a lane's oldest jobs a snapshot tells one by one."""


@dataclass(frozen=True)
class Look:
    """What was seen: instants in ms; `running` are the jobs that workers hold, `waiting` the others, by lane."""

    at_ms: int
    hosts: Mapping[str, HostRecord]
    on_host: Mapping[str, Mapping[str, ModelOnHost]]  # model -> host -> state
    facts: Mapping[str, ModelFacts]
    waiting: Mapping[str, int]
    running: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Told:
    """A job that stands in a lane: what its entry and its record say, instants in ms, and whether a worker holds it."""

    id: str
    caller: str
    session: str
    priority: str
    tokens: int
    submitted_at: int
    held: bool
    state: str
    owner: str
    attempt: int
    promotions: int
    promote_at: int
    give_up_at: int
    claimed_at: int
    first_token_at: int
    queued_at: int
    continue_by: int
    may_start: int
    """How many more jobs of its caller may run at the moment, by the key that it came with; -1 = any number."""


@dataclass(frozen=True)
class CloseLook:
    """A look that a snapshot is made of. `moment` is its instant in microseconds, which no other look at this server
    has; `silent` are the last heartbeats of hosts that fell silent; `oldest_at` is when the job was submitted that has
    waited longest in a lane, 0 = none; `jobs` are a lane's oldest; `asked`, `downgraded` and `sticky` go by model."""

    moment: int
    look: Look
    silent: Mapping[str, int]
    oldest_at: Mapping[str, int]
    jobs: Mapping[str, Sequence[Told]]
    asked: Mapping[str, int]
    downgraded: Mapping[str, int]
    sticky: Mapping[str, int]


async def look(store: Store, active: Active) -> Look:
    """Looks at all that the policy names."""
    keys, models, lanes = store.keys, list(active.models()), list(active.lanes())
    at_ms, hosts, seen, counted = await store.run(
        "look",
        [keys.hosts, *map(keys.model, models), *map(keys.lane, lanes)],
        [store.now_arg(), GROUP, keys.host(""), len(models)],
    )
    return _look(at_ms, hosts, dict(zip(models, seen, strict=True)), dict(zip(lanes, counted, strict=True)))


async def look_closely(store: Store, active: Active) -> CloseLook:
    """Looks at all that the policy names and at the jobs in its lanes."""
    keys, models, lanes = store.keys, list(active.models()), active.lanes()
    most = [TOLD_BATCH if lane.priority == "batch" else TOLD_INTERACTIVE for lane in lanes.values()]
    at_ms, moment, hosts, silent, found, counted = await store.run(
        "snapshot",
        [
            keys.hosts,
            *map(keys.model, models),
            *map(keys.downgrades, models),
            *map(keys.sticky, models),
            *map(keys.lane, lanes),
        ],
        [store.now_arg(), GROUP, keys.host(""), keys.job(""), len(models), *most],
    )
    seen, lines = dict(zip(models, found, strict=True)), dict(zip(lanes, counted, strict=True))
    return CloseLook(
        moment=int(moment),
        look=_look(at_ms, hosts, seen, lines),
        silent={name: int(float(beat)) for name, beat in _by_host(silent).items()},
        oldest_at={lane: int(oldest or 0) for lane, (_, _, oldest, _) in lines.items()},
        jobs={lane: [_told(*job) for job in jobs] for lane, (_, _, _, jobs) in lines.items()},
        asked={model: int(asked) for model, (_, _, asked, _, _) in seen.items()},
        downgraded={model: int(downgraded) for model, (_, _, _, downgraded, _) in seen.items()},
        sticky={model: int(sticky) for model, (_, _, _, _, sticky) in seen.items()},
    )


def _look(at_ms: int, hosts: list[Any], seen: Mapping[str, Any], lines: Mapping[str, Any]) -> Look:
    return Look(
        at_ms=int(at_ms),
        hosts={name: HostRecord.from_hash(raw) for name, raw in _by_host(hosts).items()},
        on_host={
            model: {host: ModelOnHost.from_hash(raw) for host, raw in _by_host(there).items()}
            for model, (_, there, *_) in seen.items()
            if there
        },
        facts={model: ModelFacts.from_hash(facts) for model, (facts, *_) in seen.items()},
        waiting={lane: int(length) - int(held) for lane, (length, held, *_) in lines.items()},
        running={lane: int(held) for lane, (_, held, *_) in lines.items()},
    )


def _by_host(flat: list[Any]) -> dict[str, Any]:
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


def _told(values: list[bytes], held: int, record: list[bytes]) -> Told:
    """Reads one job; `record` is in the order of `told_of` in `snapshot.lua`. There are many each second: no detour."""
    entry = dict(zip(values[::2], values[1::2], strict=True))
    state, owner, *instants = record
    return Told(
        entry.get(b"job", b"").decode(),
        entry.get(b"caller", b"").decode(),
        entry.get(b"session", b"").decode("utf-8", "replace"),
        entry.get(b"priority", b"interactive").decode(),
        int(entry.get(b"tokens") or 0),
        int(entry.get(b"submitted") or 0),
        bool(held),
        state.decode(),
        owner.decode(),
        *(int(instant or 0) for instant in instants),
    )
