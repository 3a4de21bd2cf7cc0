"""The turns of one host's models: gathers the facts that `turns` decides by, and tells each model what to do."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from broker.lanes import WANTED_FOR_MS
from broker.policies import Active
from broker.records import ModelFacts, Waiting
from workers.memory import SAFETY
from workers.turns import Asked, Asker, Seat, Turn, asked_on, held_up_by, room_in_ms, started, take_turns
from workers.waker import Waker

log = logging.getLogger("warmlane.swaps")

LOOK_EVERY_S = 0.1
"""How old what was decided may be; a job that starts is counted at once."""

NOTED_FOR_MS = WANTED_FOR_MS * 5 // 4
"""A request that is noted keeps its model wanted for so long; those of the next quarter of a minute are not noted."""


class Swaps:
    """Has models that are in memory make room, in bounded turns, for others that jobs wait for."""

    def __init__(
        self,
        wakers: Mapping[str, Waker],
        *,
        now_ms: Callable[[], int],
        waiting: Callable[[str], Iterable[Waiting]],
        waited_for: Callable[[str], bool],
        drained: Callable[[], bool],
        facts: Callable[[str], ModelFacts],
        load_ms: Callable[[str], float],
        warm_elsewhere: Callable[[str], bool],
        need: Callable[[Waker], int],
        headroom: Callable[[], int],
        loading: Callable[[], Collection[str]],
    ) -> None:
        """`waiting` gives the jobs known to wait for a model; `need` and `headroom` are bytes, `load_ms` is what
        its loads take on this host; 0 = unknown. `headroom` leaves out what models under way, whose names `loading`
        gives, have taken: they are asked what they need."""
        self._wakers = wakers
        self._now_ms = now_ms
        self._waiting = waiting
        self._waited_for = waited_for
        self._drained = drained
        self._facts = facts
        self._load_ms = load_ms
        self._warm_elsewhere = warm_elsewhere
        self._need = need
        self._headroom = headroom
        self._loading = loading
        self._active: Active | None = None
        self._turns: dict[str, Turn] = {}
        self._seats: list[Seat] = []
        self._held: set[str] = set()  # models whose turn has not come
        self._asked: dict[str, Asked] = {}
        self._looked_at = -LOOK_EVERY_S
        self._loop = asyncio.get_running_loop()

    def follow(self, active: Active) -> None:
        """Takes over a policy."""
        self._active = active

    def look(self) -> None:
        """Decides anew, if the last decision is not fresh; called before jobs are claimed."""
        if self._loop.time() - self._looked_at >= LOOK_EVERY_S:
            self._decide()

    def _decide(self) -> None:
        self._looked_at = self._loop.time()
        askers = [asker for asker in map(self._asker, list(self._wakers.values())) if asker is not None]
        if not askers and not self._turns:
            return
        there = [w for w in self._wakers.values() if w.ours and not w.leaving]
        under_way = [w for w in there if w.state == "waking" and w.name in self._loading()]
        arrived = [w for w in there if self._has_arrived(w)]
        self._seats = [self._seat(w) for w in there if w.resident] + [self._seat_to_be(w) for w in under_way]
        self._seats += [replace(self._seat(w), stayed_ms=0, busy=True) for w in arrived]
        for waker in under_way + arrived:  # what it agreed to in an earlier stay is done
            if (turn := self._turns.get(waker.name)) is not None and turn.begun_ms:
                del self._turns[waker.name]
        headroom, now_ms = self._headroom(), self._now_ms()
        self._turns = take_turns(self._turns, self._seats, askers, headroom=headroom, now_ms=now_ms)
        self._tell(askers)

    def started(self, name: str) -> None:
        """Counts a job that was claimed for a model."""
        turn = self._turns.get(name)
        if turn is not None:
            self._turns[name] = started(turn)
            self._looked_at = -LOOK_EVERY_S

    def held_up(self, name: str) -> tuple[str, int]:
        """Says why a model cannot be woken yet, though it should be: whose memory it waits for, "" if nobody's; and the
        earliest instant (ms) at which it may get that."""
        self._decide()  # it may have begun to ask just now
        holders = held_up_by(name, self._seats, self._turns)
        if not holders:
            return "", 0
        at_ms = self._now_ms() + int(room_in_ms(name, self._seats, self._turns))
        return f"waits for the memory of {' and '.join(holders)}", at_ms

    def makes_room(self, name: str, asker: str) -> bool:
        """Whether a model has had its turn and gives its memory to this one."""
        turn = self._turns.get(name)
        return turn is not None and turn.over and turn.to == asker

    def given_room(self, asker: str) -> bool:
        """Whether any model makes room for this one."""
        return any(turn.over and turn.to == asker for turn in self._turns.values())

    def _tell(self, askers: Iterable[Asker]) -> None:
        for name, waker in self._wakers.items():
            turn = self._turns.get(name)
            to = turn.to if turn is not None and turn.over else ""
            if waker.makes_room_for != to:
                was, waker.makes_room_for = waker.makes_room_for, to
                log.info("event=%s model=%s for=%s", "makes_room" if to else "goes_on", name, to or was)
                waker.told_anew()
                if to in self._wakers:
                    self._wakers[to].kick()
        held = {a.name for a in askers if held_up_by(a.name, self._seats, self._turns)}
        for name in self._held - held:  # its turn has come
            if name in self._wakers:
                self._wakers[name].kick()
        self._held = held

    def _asker(self, waker: Waker) -> Asker | None:
        name, facts, now = waker.name, self._facts(waker.name), self._now_ms()
        loading = waker.state == "waking"
        asked = self._asked_since(name, facts.wanted_until, now)
        if not waker.ours or self._drained() or self._has_arrived(waker):
            return None
        if not (loading or waker.state in ("cold", "quarantined")) or waker.leaving:
            return None
        waits = self._waited_for(name)
        if not loading and (
            not (waits or facts.wanted_until > now) or facts.quarantined_until > now or self._warm_elsewhere(name)
        ):
            return None
        need = self._need(waker)
        if not need:
            return None
        jobs = list(self._waiting(name))
        return Asker(
            name,
            need,
            since_ms=min((job.submitted for job in jobs), default=now),
            deadlines=[at for job in jobs for at in self._deadlines(job)],
            load_ms=self._load_ms(name),
            waits=waits,
            asked_for_ms=now - asked.since,
            asked_ago_ms=max(0, now + WANTED_FOR_MS - asked.forgotten_at),
            loading=loading,
        )

    def _asked_since(self, name: str, wanted_until: int, now: int) -> Asked:
        """Keeps account of the requests for a model, by what they leave of themselves. An operator's wish counts as
        requests that come until it is over."""
        noted_at = min(now, wanted_until - NOTED_FOR_MS)
        self._asked[name] = asked_on(self._asked.get(name), noted_at=noted_at, forgotten_at=wanted_until)
        return self._asked[name]

    def _has_arrived(self, waker: Waker) -> bool:
        """Whether its load is over and it is about to be called warm: its memory is occupied, no more promised."""
        return waker.state == "waking" and bool(waker.memory_bytes) and waker.name not in self._loading()

    def _deadlines(self, job: Waiting) -> list[int]:
        lane = self._active.lane(job.lane) if self._active is not None else None
        give_up = [job.submitted + lane.max_wait_ms] if lane is not None else []
        return [job.promote_at, *give_up] if job.promote_at else give_up

    def _seat(self, waker: Waker) -> Seat:
        facts = self._facts(waker.name)
        return Seat(
            waker.name,
            waker.memory_bytes,
            waker.stayed_ms,
            waker.model.min_stay_ms,
            waker.slots.total,
            busy=not waker.slots.idle,
            waited_for=self._waited_for(waker.name),
            service_ms=facts.service_ms,
            worth=self._load_ms(waker.name) * waker.model.weight,
            pinned=facts.pinned,
        )

    def _seat_to_be(self, waker: Waker) -> Seat:
        """A load under way: whoever needs its memory gets it after its minimum stay, and is not sent away meanwhile."""
        left_ms = max(1.0, self._load_ms(waker.name) - (self._now_ms() - waker.since_ms))
        footprint = int(self._need(waker) * SAFETY)
        return replace(self._seat(waker), footprint=footprint, stayed_ms=-left_ms, busy=True)
