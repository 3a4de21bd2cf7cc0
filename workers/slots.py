"""The slots of one model on one host: who uses one, whose prompt each has in its cache, and which are still settling.

A slot whose answer was closed early is *settling* until the runtime itself says that it is idle: a runtime may take
seconds to notice a closed connection, and a job claimed for that slot would wait inside the runtime, unseen. Past the
limit the slot counts as lost: still not claimable, until the runtime says idle or is restarted.

What a slot has in its cache is what it served last. Reading a lost prompt again costs more than anything else that we
could save, so a session goes back to its slot, and a slot that has just served a long prompt waits a moment for its
session before it is given to another.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

ON_ITS_WAY_S = 0.5
"""How long a claim and its request may take to reach the runtime."""

ROW_MAX = 4
"""So many turns in a row a session is served before others that wait; then it takes its place in line."""

KEEP_S = 0.15
"""How long a free slot is kept for its session: an agent's next call comes within milliseconds or within seconds."""

KEEP_TOKENS = 1024
"""Shorter prompts are not worth keeping a slot for."""


@dataclass(frozen=True)
class Cached:
    """The session that a slot served last, whose prompt it should still have."""

    session: str
    tokens: int  # of its last prompt and answer; 0 = not known yet
    used_s: float  # loop time of its last start or end
    row: int  # turns in a row that it was served while others waited
    estimate: int = 0  # its last prompt and answer, the prompt as the api estimated it


@dataclass(frozen=True)
class _Held:
    """A slot in use."""

    number: int
    since_s: float
    before: Cached | None  # what the slot had in its cache until then


class Slots:
    """Counts and numbers, 0 to `total` - 1; `total` is the policy's maxConcurrent, or what the runtime really runs."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.settling: dict[int, float] = {}  # slot -> loop time at which its answer was closed early
        self._held: dict[str, _Held] = {}
        self._cached: dict[int, Cached] = {}
        self._slots_of: dict[str, set[int]] = {}  # session -> slots that have its prompt
        self._kept: dict[int, float] = {}  # free slot -> loop time until which it is its session's

    @property
    def using(self) -> frozenset[str]:
        """Who is in flight, claims under way included."""
        return frozenset(self._held)

    @property
    def free(self) -> int:
        """Slots that a job may be claimed for now."""
        return max(0, self.total - len(self._held) - len(self.settling))

    @property
    def taken(self) -> int:
        """Slots that are in use or settle."""
        return len(self._held) + len(self.settling)

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing settles."""
        return not self._held and not self.settling

    def ready(self) -> "Ready":
        """The sessions whose prompt a free slot has."""
        return Ready(set(self._free()), self._slots_of, self._cached)

    def knows(self, session: str) -> bool:
        """Whether any slot has the session's prompt, free or not."""
        return session in self._slots_of

    def cached_for(self, user: str) -> int:
        """How much of its session's prompt is in the slot that a user has just taken, in the api's estimate."""
        held = self._held[user]
        before, now = held.before, self._cached.get(held.number)
        return before.estimate if before is not None and now is not None and before.session == now.session else 0

    def open(self, now_s: float) -> int:
        """Free slots that anybody may have: none of those that are kept for their session."""
        return self.free - sum(until > now_s for until in self._kept.values())

    def next_open_s(self, now_s: float) -> float | None:
        """The loop time at which the next kept slot is anybody's; None if none is kept."""
        return min((until for until in self._kept.values() if until > now_s), default=None)

    def spare(self, since_s: float) -> bool:
        """Whether a free slot holds nobody's prompt, or one that was last used before an instant."""
        found = (self._cached.get(number) for number in self._free())
        return any(cached is None or cached.used_s < since_s for cached in found)

    def quiet(self, since_s: float) -> bool:
        """Whether no slot holds a prompt that was used since an instant."""
        return all(cached.used_s < since_s for cached in self._cached.values())

    def offer(self, total: int) -> None:
        """Changes how many there are; what is held beyond them runs on, and is not given away again."""
        self.total = total
        for number in [number for number in self._cached if number >= total]:
            self._note(number, None)

    def take(self, user: str, *, session: str = "", contended: bool = False, now_s: float = 0.0) -> int:
        """Gives a slot away, the one that has the session's prompt if it is free; gives its number.

        A job that comes back while its last attempt still ends is another user. `contended` = others waited too.
        """
        number = self._best(session, now_s)
        before = self._cached.get(number)
        self._held[user] = _Held(number, now_s, before)
        self._kept.pop(number, None)
        row = before.row if before is not None and before.session == session else 0
        tokens = before.tokens if before is not None and before.session == session else 0
        estimate = before.estimate if before is not None and before.session == session else 0
        row = row + 1 if contended else 0
        self._note(number, Cached(session, tokens, now_s, row, estimate) if session else None)
        return number

    def give_back(
        self,
        user: str,
        *,
        clean: bool,
        now_s: float,
        tokens: int = 0,
        estimate: int = 0,
        served: bool = True,
        keep: bool = True,
    ) -> None:
        """Takes the slot back; not clean = the runtime may still be at it. `tokens` = what its cache should hold now,
        0 = not known, `estimate` the same with the prompt in the api's estimate; not served = the runtime never heard
        of the user. After a long prompt the slot is kept for its session for KEEP_S, unless `keep` says no."""
        held = self._held.pop(user, None)
        if held is None:
            return
        number = held.number
        if not clean:
            self.settling[number] = now_s
        if not served:
            return self._note(number, held.before)
        cached = self._cached.get(number)
        if cached is None or not tokens:
            return None
        self._cached[number] = replace(cached, tokens=tokens, estimate=estimate, used_s=now_s)
        if keep and clean and tokens >= KEEP_TOKENS and cached.row < ROW_MAX:
            self._kept[number] = now_s + KEEP_S
        return None

    def settled(self, busy: int, *, asked_s: float = math.inf) -> bool:
        """Notes that the runtime itself says how many generations run; True if a slot became free by that.

        Who took a slot just before the question may not have reached the runtime yet: what is busy may not be theirs.
        """
        before = len(self.settling)
        there = sum(held.since_s < asked_s - ON_ITS_WAY_S for held in self._held.values())
        left = max(0, min(before, busy - there))
        # the runtime ends closed answers in any order; those closed last are the likeliest to be still at work
        self.settling = dict(sorted(self.settling.items(), key=lambda item: item[1])[before - left :])
        return len(self.settling) < before

    def expire(self, before_s: float) -> bool:
        """Gives up on slots that settle since before an instant, where the runtime cannot tell; True if there were."""
        left = {number: since for number, since in self.settling.items() if since > before_s}
        gone, self.settling = len(self.settling) - len(left), left
        return gone > 0

    def wedged(self, before_s: float) -> bool:
        """Whether every slot has been settling since before an instant: the runtime is stuck, and no probe can tell."""
        return len(self.settling) >= self.total and all(since <= before_s for since in self.settling.values())

    def restarted(self) -> None:
        """Notes that the runtime is a new one: nothing settles any more, nothing is cached."""
        self.settling.clear()
        self._kept.clear()
        for number in self._cached.keys() - {held.number for held in self._held.values()}:
            self._note(number, None)

    def told(self) -> dict[int, tuple[str, int]]:
        """What each slot has in its cache, to be told: slot -> session, tokens."""
        return {number: (cached.session, cached.tokens) for number, cached in sorted(self._cached.items())}

    def estimates(self) -> dict[str, int]:
        """How long the prompt of each session is that a slot has in its cache, in the api's estimate."""
        known = sorted((cached.estimate, cached.session) for cached in self._cached.values() if cached.estimate)
        return {session: estimate for estimate, session in known}

    def _free(self) -> list[int]:
        taken = {held.number for held in self._held.values()} | self.settling.keys()
        return [number for number in range(self.total) if number not in taken]

    def _note(self, number: int, cached: Cached | None) -> None:
        """Writes down what a slot has in its cache from now on."""
        before = self._cached.pop(number, None)
        if before is not None:
            self._slots_of[before.session].discard(number)
            if not self._slots_of[before.session]:
                del self._slots_of[before.session]
        if cached is not None:
            self._cached[number] = cached
            self._slots_of.setdefault(cached.session, set()).add(number)

    def _best(self, session: str, now_s: float) -> int:
        """The session's own slot, else an empty one, else the one whose prompt was used longest ago."""

        def cost(number: int) -> tuple[bool, bool, float, int]:
            cached = self._cached.get(number)
            if cached is None:
                return True, False, -math.inf, number
            return cached.session != session, self._kept.get(number, 0.0) > now_s, cached.used_s, number

        free = self._free()
        if not free:
            raise ValueError("no slot is free")
        return min(free, key=cost)


class Ready:
    """The sessions that may go before others at a moment: a free slot has their prompt, and they have not had their
    row yet."""

    def __init__(self, free: Container[int], slots_of: Mapping[str, set[int]], cached: Mapping[int, Cached]) -> None:
        self._free = free
        self._slots_of = slots_of
        self._cached = cached

    def __contains__(self, session: object) -> bool:
        numbers = self._slots_of.get(session, ()) if isinstance(session, str) else ()
        return any(number in self._free and self._cached[number].row < ROW_MAX for number in numbers)
