"""Whether the models that are to be kept warm fit into memory together, on the hosts and at the hours that the policy
gives them. Pure.

Not in question are models whose memory is unknown and not to be guessed from a file, or not a host's of ours. Where the
policy names no hosts there is one; `replicas` says that there are at least so many.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from broker.policy.content import Model

FILE_SHARE = 1.2
"""A model of which only the file is known is expected to need this many times its size."""

SEARCH_MAX = 20_000
"""Steps of the search for a place for each model; past them they are taken to fit."""

COPIES_MAX = 400
"""So many models, replicas counted, are judged at most."""

_WEEK_MS = 7 * 86_400_000
_WEEKS = tuple(
    round(datetime(2026, month, day, tzinfo=UTC).timestamp() * 1000)
    for month, day in ((1, 12), (3, 9), (3, 23), (7, 6), (10, 19), (10, 26))
)
"""Weeks in winter and summer, and those in which some zones have changed their clocks and others have not."""


@dataclass(frozen=True)
class Clash:
    """Models that do not fit together, and when; `when` is empty where that is always."""

    models: tuple[tuple[str, int, int], ...]  # name, MB, copies
    hosts: int
    when: str = ""

    @property
    def need_mb(self) -> int:
        """What they need at once."""
        return sum(size * copies for _, size, copies in self.models)


@dataclass(frozen=True)
class _Warm:
    name: str
    size: int  # MB
    copies: int
    hosts: frozenset[str]
    model: Model


def with_sizes(models: dict[str, Model], size_of: Callable[[str], int]) -> dict[str, Model]:
    """Gives the models, those of which only the file is known with what a file of its size should need."""
    return {
        name: model.model_copy(update={"memory_mb": guess})
        if model.memory_mb is None and model.backend == "llama.cpp" and model.url is None
        and (guess := int(size_of(model.model) * FILE_SHARE) >> 20)
        else model
        for name, model in models.items()
    }  # fmt: skip


def clashes(models: dict[str, Model], host_memory_mb: int) -> Iterator[Clash]:
    """Finds, for each group of models that may share a host, the moment of the week that lacks the most."""
    for group in _groups(_kept(models)):
        worst: Clash | None = None
        for at_ms, active in _moments(group):
            clash = Clash(tuple((w.name, w.size, w.copies) for w in active), len({h for w in active for h in w.hosts}))
            if worst is not None and clash.need_mb <= worst.need_mb:
                continue
            if not _has_place(active, host_memory_mb):
                worst = Clash(clash.models, clash.hosts, _when(at_ms, active))
        if worst is not None:
            yield worst


def _kept(models: dict[str, Model]) -> list[_Warm]:
    kept = {n: m for n, m in models.items() if m.keep_warm and m.memory_mb and m.trust == "local" and not m.shared}
    named = sorted({host for model in models.values() for host in model.hosts or ()})
    most = max((m.replicas for m in kept.values()), default=1)
    everywhere = frozenset([*named, *(f"another {n}" for n in range(most - len(named)))])
    found = []
    for name, model in kept.items():
        hosts = everywhere if model.hosts is None else frozenset(model.hosts)
        found.append(_Warm(name, model.memory_mb or 0, min(model.replicas, len(hosts)), hosts, model))
    return found


def _groups(warm: Sequence[_Warm]) -> Iterator[list[_Warm]]:
    """Models that share hosts, directly or through others."""
    left = list(warm)
    while left:
        group, hosts = [left.pop(0)], set[str]()
        grown = True
        while grown:
            hosts = {host for w in group for host in w.hosts}
            joining = [w for w in left if w.hosts & hosts]
            group += joining
            left = [w for w in left if w not in joining]
            grown = bool(joining)
        yield sorted(group, key=warm.index)


def _moments(group: Sequence[_Warm]) -> Iterator[tuple[int, list[_Warm]]]:
    """Every moment at which hours begin, and who is to be warm then: the most are wanted at one of these."""
    hours = [(w, w.model.hours) for w in group]
    starts = {_WEEKS[0]}
    for _, own in hours:
        if own is not None:
            starts |= {max(begin, week) for week in _WEEKS for begin, _ in own.between(week, week + _WEEK_MS)}
    told: set[frozenset[str]] = set()
    for at_ms in sorted(starts):
        active = [w for w, own in hours if own is None or own.contains(at_ms)]
        names = frozenset(w.name for w in active)
        if names not in told:
            told.add(names)
            yield at_ms, active


def _has_place(active: Sequence[_Warm], host_memory_mb: int) -> bool:
    """Whether every copy finds a host; copies of a model are on different ones."""
    items = sorted(((w.size, w.name, w.hosts) for w in active for _ in range(w.copies)), key=lambda i: (-i[0], i[1]))
    free = dict.fromkeys(sorted({host for w in active for host in w.hosts}), host_memory_mb)
    holds: dict[str, set[str]] = {host: set() for host in free}
    steps = 0
    if len(items) > COPIES_MAX:
        return True

    def place(index: int) -> bool:
        nonlocal steps
        if index == len(items):
            return True
        size, name, hosts = items[index]
        for host in free:
            if host not in hosts or free[host] < size or name in holds[host]:
                continue
            steps += 1
            if steps > SEARCH_MAX:
                return True
            free[host] -= size
            holds[host].add(name)
            if place(index + 1):
                return True
            free[host] += size
            holds[host].discard(name)
        return False

    return place(0)


def _when(at_ms: int, active: Sequence[_Warm]) -> str:
    timed = next((hours for w in active if (hours := w.model.hours) is not None), None)
    if timed is None:
        return ""
    zone = "local time" if timed.zone is None else timed.zone.key
    return f"{timed.wall(at_ms):%A at %H:%M} ({zone})"
