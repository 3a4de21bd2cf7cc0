"""Two models that cannot be in memory together, under steady mixed load, over hours of virtual time."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from workers import turns
from workers.memory import SAFETY, Resident, evictions
from workers.turns import Asker, Seat, Turn, Wish, held_up_by, may_take, take_turns

GB = 1 << 30
CARD = 24 * GB
TICK_MS = 250
MIN_STAY_MS = 60_000
HOUR_MS = 3_600_000


@dataclass
class Sim:
    """One model: what it needs, what waits for it, what runs."""

    name: str
    footprint: int
    load_ms: int
    slots: int
    service_ms: int
    every_ms: float  # a job arrives this often
    max_queue: int = 40
    line: list[int] = field(default_factory=list)  # submits of the jobs that wait
    running: list[int] = field(default_factory=list)  # their ends
    state: str = "cold"
    warm_at: int = 0
    idle_at: int = 0
    loaded: list[int] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    refused: int = 0
    next_at: float = 0.0

    @property
    def starved_ms(self) -> int:
        return max(self.waits, default=0)


class Box:
    """One host with one card. Its decisions are those of the worker: `take_turns`, `may_take`, `evictions`."""

    def __init__(self, models: list[Sim], seed: int, *, with_turns: bool = True) -> None:
        self.models = {m.name: m for m in models}
        self.now = 1_000_000
        self.turns: dict[str, Turn] = {}
        self._decided_by: list[str] = []
        self._with_turns = with_turns
        self._rng = random.Random(seed)
        for m in models:
            m.next_at = self.now + self._rng.expovariate(1 / m.every_ms)

    def run(self, for_ms: int) -> None:
        end = self.now + for_ms
        while self.now < end:
            for m in self.models.values():
                self._arrive(m)
                m.running = [at for at in m.running if at > self.now]
                if m.state == "waking" and m.warm_at <= self.now:
                    m.state, m.idle_at = "warm", self.now
            self._decide()
            for m in self.models.values():
                self._claim(m)
            for m in self.models.values():
                self._wake(m)
            assert self._headroom() >= 0
            self.now += TICK_MS

    def _decide(self) -> None:
        if self._with_turns:
            headroom = self._headroom() + sum(m.footprint for m in self.models.values() if m.state == "waking")
            self.turns = take_turns(self.turns, self._seats(), self._askers(), headroom=headroom, now_ms=self.now)
        self._decided_by = self._states()

    def _states(self) -> list[str]:
        return [m.state for m in self.models.values()]

    def _arrive(self, m: Sim) -> None:
        while m.next_at <= self.now:
            m.next_at += self._rng.expovariate(1 / m.every_ms)
            if len(m.line) < m.max_queue:
                m.line.append(self.now)
            else:
                m.refused += 1

    def _claim(self, m: Sim) -> None:
        while m.state == "warm" and m.line and len(m.running) < m.slots:
            turn = self.turns.get(m.name)
            if turn is not None and turn.over:
                return
            m.waits.append(self.now - m.line.pop(0))
            m.running.append(self.now + round(m.service_ms * self._rng.uniform(0.5, 1.5)))
            m.idle_at = max(m.running)
            if turn is not None:
                self.turns[m.name] = turns.started(turn)

    def _wake(self, m: Sim) -> None:
        if m.state != "cold" or not m.line:
            return
        if self._decided_by != self._states():  # another has just gone, or begun to load
            self._decide()
        if held_up_by(m.name, list(self._seats()), self.turns):
            return
        assert not self._with_turns or self._fits_by_turns(m), "it would be called unfit, and its requests be refused"
        others = [
            Resident(
                o.name, o.footprint, o.load_ms, 1.0, self._idle_ms(o), self.now - o.warm_at, MIN_STAY_MS,
                o.state == "warm" and self._may_take(m, o),
            )
            for o in self.models.values()
            if o is not m and o.state == "warm"
        ]  # fmt: skip
        going = evictions(m.footprint, self._headroom(), others)
        if going is None:
            return
        for name in going:
            assert not self.models[name].running, "a busy model was evicted"
            assert self.now - self.models[name].warm_at >= MIN_STAY_MS, "it had not had its minimum stay"
            self.models[name].state = "cold"
        m.state, m.warm_at = "waking", self.now + m.load_ms
        m.loaded.append(self.now)

    def _fits_by_turns(self, m: Sim) -> bool:
        loading = [o.name for o in self.models.values() if o.state == "waking"]
        return not loading or m.footprint * SAFETY <= self._headroom()

    def _may_take(self, mine: Sim, theirs: Sim) -> bool:
        turn = self.turns.get(theirs.name)
        if turn is not None and turn.over and turn.to == mine.name:
            return True
        wish = Wish(waited_for=bool(theirs.line))
        return may_take(Wish(waited_for=True), wish, now_ms=self.now, others_wait=False)

    def _headroom(self) -> int:
        return CARD - sum(m.footprint for m in self.models.values() if m.state != "cold")

    def _idle_ms(self, m: Sim) -> float:
        return 0.0 if m.running else self.now - m.idle_at + 1

    def _seats(self) -> Iterator[Seat]:
        for m in self.models.values():
            waking = m.state == "waking"
            if waking or m.state == "warm":
                yield Seat(
                    m.name, round(m.footprint * (SAFETY if waking else 1)), self.now - m.warm_at, MIN_STAY_MS, m.slots,
                    busy=waking or bool(m.running), waited_for=bool(m.line), service_ms=m.service_ms, worth=m.load_ms,
                )  # fmt: skip

    def _askers(self) -> Iterator[Asker]:
        for m in self.models.values():
            if m.line and m.state in ("cold", "waking"):
                give_up = [at + 600_000 for at in m.line]
                yield Asker(m.name, m.footprint, m.line[0], give_up, m.load_ms, loading=m.state == "waking")


def big(every_ms: float) -> Sim:
    return Sim("deep-coder", 21 * GB, 45_000, 2, 20_000, every_ms)


def small(every_ms: float) -> Sim:
    return Sim("coder-small", round(6.5 * GB), 8_000, 4, 3_000, every_ms)


def bound_ms(mine: Sim, other: Sim, *, lines: float = 1) -> float:
    """The longest wait: what runs drains, the other loads, stays, has its batch, drains, and mine loads; then those
    before it in the line are served, in so many turns of its own."""
    away = turns.BATCH_MS + other.load_ms + MIN_STAY_MS + 1.5 * (mine.service_ms + other.service_ms) + mine.load_ms
    return lines * (away + MIN_STAY_MS + turns.BATCH_MS)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 3))])
def test_steady_mixed_load_neither_swaps_all_the_time_nor_starves_anybody(seed: int) -> None:
    """Four hours in which each model could keep the card busy for itself for half of the time."""
    deep, little = big(every_ms=40_000), small(every_ms=3_000)
    Box([deep, little], seed, with_turns=True).run(4 * HOUR_MS)

    swaps_an_hour = (len(deep.loaded) + len(little.loaded)) / 4
    cycle_ms = 2 * MIN_STAY_MS + deep.load_ms + little.load_ms
    assert 4 <= swaps_an_hour <= 2 * HOUR_MS / cycle_ms, f"{swaps_an_hour} swaps an hour"
    assert deep.starved_ms <= bound_ms(deep, little), f"deep-coder waited {deep.starved_ms / 1000:.0f} s"
    assert little.starved_ms <= bound_ms(little, deep, lines=2), f"coder-small waited {little.starved_ms / 1000:.0f} s"
    assert len(deep.waits) >= 0.9 * 4 * HOUR_MS / deep.every_ms and len(little.waits) > 3_000


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_a_flood_for_one_model_does_not_starve_the_other(seed: int) -> None:
    """The one gets many times what it can serve; whoever asks for the other is served within one turn."""
    deep, little = big(every_ms=120_000), small(every_ms=200)
    Box([deep, little], seed).run(3 * HOUR_MS)

    assert little.refused > 1_000, "it was no flood"
    assert deep.starved_ms <= bound_ms(deep, little)
    assert len(deep.waits) >= 0.8 * 3 * HOUR_MS / deep.every_ms
    assert little.starved_ms <= bound_ms(little, deep)
    assert len(deep.loaded) + len(little.loaded) <= 3 * 2 * HOUR_MS / (2 * MIN_STAY_MS)


def test_without_turns_the_second_would_starve() -> None:
    """What the turns are for: never evicting a busy model is not enough."""
    deep, little = big(every_ms=120_000), small(every_ms=200)
    Box([deep, little], 1, with_turns=False).run(HOUR_MS)
    assert len(deep.loaded) == 0 or len(little.loaded) == 0


def test_models_that_fit_together_never_make_room() -> None:
    deep, little = big(every_ms=40_000), small(every_ms=3_000)
    little.footprint = GB
    Box([deep, little], 1).run(HOUR_MS)
    assert (len(deep.loaded), len(little.loaded)) == (1, 1)
    assert little.starved_ms < 15_000
