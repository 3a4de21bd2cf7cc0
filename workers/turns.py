"""Who gives memory to whom, and when, where models do not fit together. Pure.

A wish for memory is one of three, the strongest first: jobs wait for the model; it was asked for within the last
minute; it is kept warm. `may_take` compares two of them while the one that holds the memory has nothing to do.

Under steady load it always has something to do. So it gets a *turn*: it stays for `minStayMs` at least; once others
need its memory it may start one more batch of jobs, bounded in number and in time; then it claims no more, drains, and
makes room. Nobody's job has a privilege beyond the batch, whatever its session, and nobody who waits starves. A model
that nobody waits for, since all its requests go to its fallback, gets its turn later, and only while they keep coming.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from broker.policy.long_waits import BATCH_MS
from workers.memory import SAFETY

BATCH_PER_SLOT = 4
"""So many jobs per slot a resident model may still start once another needs its memory and its minimum stay is over,
and for no longer than BATCH_MS."""

LAST_CHANCE_MS = 2_000
"""A job that waits for the other model ends the batch when it would otherwise miss its deadline within this."""

ASKED_STAYS = 5
"""Who is asked for, but whose jobs go elsewhere meanwhile, waits for so many minimum stays instead of one."""

ASKED_LEAST_MS = 120_000
"""And at least so long; for all that time it must have been asked for again before its last request was forgotten."""

ASKED_AGAIN_MS = 15_000
"""And its last batch is asked of the other only while its requests still come: the last one no longer ago."""

ROOM_KEPT_MS = 30_000
"""For so long a model that has drained leaves its slots empty for one that does not come; then it goes on."""


@dataclass(frozen=True)
class Wish:
    """How much a model wants to be in memory."""

    waited_for: bool = False
    wanted_until: int = 0  # instant, ms
    kept: bool = False  # kept warm, and within its active hours
    weight: float = 1.0


@dataclass(frozen=True)
class Seat:
    """A model that is in memory. Sizes in bytes, durations in ms."""

    name: str
    footprint: int
    stayed_ms: float
    min_stay_ms: int
    slots: int
    busy: bool  # something runs on it, or settles
    waited_for: bool = False
    service_ms: float = 0
    worth: float = 0  # what a reload costs, times its weight
    pinned: bool = False

    def stayed(self, turn: "Turn") -> bool:
        """Whether it has had its minimum stay, as far as the one that wants its memory is concerned."""
        return self.stayed_ms >= (self.asked_stay_ms if turn.asked_only else self.min_stay_ms)

    @property
    def asked_stay_ms(self) -> int:
        """How long it stays at least where nobody waits for the one that wants its memory."""
        return max(ASKED_LEAST_MS, ASKED_STAYS * self.min_stay_ms)


@dataclass(frozen=True)
class Asker:
    """A model that is not in memory and does not fit beside those that are. Instants and durations in ms."""

    name: str
    need: int  # bytes
    since_ms: int  # when the job that waits longest was submitted; of two askers the earlier is first
    deadlines: Sequence[int] = ()  # of the jobs that wait: their promotion, their giving up
    load_ms: float = 0  # 0 = not known
    waits: bool = True  # False: it was asked for, but no job waits for it now
    asked_for_ms: float = 0  # for how long it has been asked for, again and again
    asked_ago_ms: float = 0  # since its last request
    loading: bool = False  # its room is being made: it asks for no more seats


@dataclass(frozen=True)
class Turn:
    """How a model that is in memory makes room for another. Instants in ms."""

    to: str
    asked_only: bool = False
    begun_ms: int = 0  # when its last batch began; 0 = it is within its minimum stay
    started: int = 0  # jobs of that batch
    over: bool = False  # it claims no more
    drained_ms: int = 0  # since when it has had nothing to do after that


@dataclass(frozen=True)
class Asked:
    """Requests for a model that came again and again: each before the one before it was forgotten. Instants in ms."""

    since: int
    forgotten_at: int


def asked_on(before: Asked | None, *, noted_at: int, forgotten_at: int) -> Asked:
    """Goes on with such requests, or begins anew, by when the last of them was noted and until when it counts."""
    if before is None or noted_at > before.forgotten_at:
        return Asked(noted_at, forgotten_at)
    return replace(before, forgotten_at=forgotten_at)


def may_take(mine: Wish, theirs: Wish, *, now_ms: int, others_wait: bool) -> bool:
    """Whether a model that wants memory may have that of an idle one which has had its minimum stay.

    Otherwise two of them would evict each other for as long as both are wanted. Who is waited for takes from whom
    nobody waits for; of two that were asked for, the one that was asked for last stays. Who is only kept warm comes
    back when the box is idle: nobody waits for anything (`others_wait`), and the other was not asked for lately and is
    not kept warm itself, or is worth less.
    """
    if theirs.waited_for:
        return False
    if mine.waited_for:
        return True
    if mine.wanted_until > now_ms:
        return theirs.wanted_until < mine.wanted_until
    if others_wait or theirs.wanted_until > now_ms:
        return False
    return not theirs.kept or theirs.weight < mine.weight


def take_turns(
    before: Mapping[str, Turn], seats: Iterable[Seat], askers: Iterable[Asker], *, headroom: float, now_ms: int
) -> dict[str, Turn]:
    """Decides which models in memory make room, for whom, and how far they are with it: a turn by the seat's name.

    `before` is what was decided last. Whoever is not in the answer goes on as if nobody wanted its memory: nobody does,
    or its memory would not be enough.
    """
    free = {seat.name: seat for seat in seats if not seat.pinned}
    after: dict[str, Turn] = {}
    for asker in sorted(askers, key=lambda a: (not a.loading, not a.waits, a.since_ms, a.name)):
        found = _seats_for(asker, before, free, headroom)
        if found is None:
            continue
        headroom += sum(seat.footprint for seat in found) - asker.need * SAFETY
        for seat in found:
            del free[seat.name]
            turn = before.get(seat.name)
            if turn is None or turn.to != asker.name:
                turn = Turn(asker.name)
            after[seat.name] = _go_on(replace(turn, asked_only=not asker.waits), seat, asker, now_ms)
    return after


def held_up_by(asker: str, seats: Iterable[Seat], turns: Mapping[str, Turn]) -> list[str]:
    """Names the models whose memory it is to get and cannot have yet, where jobs wait for it or they make room."""
    of_its = [(seat, turns[seat.name]) for seat in seats if seat.name in turns and turns[seat.name].to == asker]
    return [seat.name for seat, turn in of_its if (turn.over or not turn.asked_only) and not _is_free(seat, turn)]


def room_in_ms(asker: str, seats: Iterable[Seat], turns: Mapping[str, Turn]) -> float:
    """The least time until it gets the memory that it waits for: what is left of minimum stays, and of what runs."""
    names = held_up_by(asker, seats := list(seats), turns)
    held = [seat for seat in seats if seat.name in names]
    return max((max(0.0, s.min_stay_ms - s.stayed_ms) + (s.service_ms if s.busy else 0.0) for s in held), default=0.0)


def _is_free(seat: Seat, turn: Turn) -> bool:
    return not seat.busy and seat.stayed(turn) and (turn.over or not seat.waited_for)


def _seats_for(
    asker: Asker, before: Mapping[str, Turn], free: Mapping[str, Seat], headroom: float
) -> list[Seat] | None:
    """The models that must go so that it fits; None where nobody can make it fit. Who makes room for it already goes
    on doing so; of the others those that have nothing to do, then those that are the least worth."""

    def makes_room(seat: Seat) -> bool:
        return seat.name in before and before[seat.name].to == asker.name

    if asker.loading:
        return [seat for seat in free.values() if makes_room(seat)]
    missing, found = asker.need * SAFETY - headroom, list[Seat]()
    for seat in sorted(free.values(), key=lambda s: (not makes_room(s), s.busy or s.waited_for, s.worth, s.name)):
        if missing <= 0:
            break
        found.append(seat)
        missing -= seat.footprint
    if missing > 0:
        return None
    for seat in list(found[:-1]):  # whoever turns out not to be needed stays
        if missing + seat.footprint <= 0:
            missing += seat.footprint
            found.remove(seat)
    return found


def _go_on(turn: Turn, seat: Seat, asker: Asker, now_ms: int) -> Turn:
    if turn.asked_only and not asker.loading and not _is_due(turn, seat, asker):
        return Turn(asker.name, asked_only=True)  # whatever was begun for jobs that went elsewhere
    if turn.over:
        return _drain(turn, seat, now_ms)
    if not seat.stayed(turn):
        return turn
    if not turn.begun_ms:
        turn = replace(turn, begun_ms=now_ms)
    over = (
        turn.started >= BATCH_PER_SLOT * seat.slots
        or now_ms - turn.begun_ms >= BATCH_MS
        or _is_last_chance(seat, asker, now_ms)
    )
    return replace(turn, over=over)


def _is_due(turn: Turn, seat: Seat, asker: Asker) -> bool:
    """Whether one that nobody waits for has its turn all the same: a fallback would keep it out for ever otherwise."""
    comes_again = turn.over or asker.asked_ago_ms <= ASKED_AGAIN_MS
    return seat.stayed(turn) and asker.asked_for_ms >= seat.asked_stay_ms and comes_again


def _drain(turn: Turn, seat: Seat, now_ms: int) -> Turn:
    if seat.busy:
        return replace(turn, drained_ms=0)
    if not turn.drained_ms:
        return replace(turn, drained_ms=now_ms)
    if now_ms - turn.drained_ms >= ROOM_KEPT_MS:  # its own jobs must not wait for one that cannot come
        return replace(turn, begun_ms=now_ms, started=0, over=False, drained_ms=0)
    return turn


def _is_last_chance(seat: Seat, asker: Asker, now_ms: int) -> bool:
    """Whether a job that waits would be served in time if room were made now, and not much later."""
    if not asker.load_ms:
        return False
    warm_ms = now_ms + asker.load_ms + (seat.service_ms if seat.busy else 0.0)
    return any(0 <= deadline - warm_ms <= LAST_CHANCE_MS for deadline in asker.deadlines)


def started(turn: Turn) -> Turn:
    """Counts a job that was started in the batch."""
    return replace(turn, started=turn.started + 1) if turn.begun_ms else turn
