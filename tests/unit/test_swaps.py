"""What one host decides its turns by: facts of its own models, as its own loads have shown them."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from broker.lanes import WANTED_FOR_MS
from broker.records import ModelFacts, Waiting
from tests.support.jump_loop import passes, run_in_virtual_time
from workers.swaps import NOTED_FOR_MS, Swaps
from workers.turns import Turn

NOW_MS = 1_000_000
GB = 1 << 30


def model(name: str, state: str, **more: Any) -> Any:
    definition = SimpleNamespace(min_stay_ms=0, weight=1.0)
    slots = SimpleNamespace(total=1, idle=True)
    told = SimpleNamespace(
        name=name, state=state, model=definition, slots=slots, leaving=False, ours=True, resident=state == "warm",
        makes_room_for="", since_ms=0,
        memory_bytes=2 * GB if state == "warm" else 0, stayed_ms=90_000.0, told_anew=lambda: None, kick=lambda: None,
    )  # fmt: skip
    vars(told).update(more)
    return told


@pytest.mark.parametrize(("here_ms", "makes_room"), [(30_000, True), (1_000, False)])
def test_how_long_a_load_takes_is_what_it_takes_here(here_ms: float, makes_room: bool) -> None:
    """A job that can only be served in time if room is made now ends the batch; on this host's disk a load takes as
    long as it takes, whatever another host told last."""
    job = Waiting(job="j", lane="cold", entry="1-0", submitted=NOW_MS - 1_000, promote_at=NOW_MS + 31_000)
    waiting = {"cold": [job], "warm": [Waiting(job="k", lane="warm", entry="2-0", submitted=NOW_MS)]}

    async def decided() -> bool:
        swaps = Swaps(
            {name: model(name, state) for name, state in (("warm", "warm"), ("cold", "cold"))},
            now_ms=lambda: NOW_MS,
            waiting=lambda name: waiting[name],
            waited_for=lambda name: True,
            drained=lambda: False,
            facts=lambda name: ModelFacts(load_ms=5_000),
            load_ms=lambda name: here_ms if name == "cold" else 5_000,
            warm_elsewhere=lambda name: False,
            need=lambda waker: GB,
            headroom=lambda: 0,
            loading=lambda: [],
        )
        swaps.look()
        return swaps.makes_room("warm", "cold")

    assert run_in_virtual_time(decided(), at_most_s=1) is makes_room


@pytest.mark.parametrize(
    ("headroom_gb", "under_way", "told"),
    [
        (3.1, ["loads"], ("waits for the memory of loads", NOW_MS + 20_000 + 60_000)),  # 10 of its 30 s are over
        (3.2, ["loads"], ("", 0)),  # it fits beside
        (3.1, [], ("", 0)),  # it waits for its runtime, and nobody knows yet whose memory it gets
    ],
)
def test_who_needs_the_memory_of_a_load_under_way_is_in_line(
    headroom_gb: float, under_way: list[str], told: tuple[str, int]
) -> None:
    """What the load has taken already makes no difference: it gets what it needs, and the other its minimum stay
    later, though it was told to make room once before."""

    async def held_up() -> tuple[str, int]:
        loads = model("loads", "waking", since_ms=NOW_MS - 10_000)
        loads.model.min_stay_ms = 60_000
        swaps = Swaps(
            {"loads": loads, "cold": model("cold", "cold")},
            now_ms=lambda: NOW_MS,
            waiting=lambda name: [],
            waited_for=lambda name: True,
            drained=lambda: False,
            facts=lambda name: ModelFacts(),
            load_ms=lambda name: 30_000,
            warm_elsewhere=lambda name: False,
            need=lambda waker: 2 * GB if waker.name == "loads" else GB,
            headroom=lambda: int(headroom_gb * GB),
            loading=lambda: under_way,
        )
        swaps._turns["loads"] = Turn("cold", begun_ms=1, over=True)
        found = swaps.held_up("cold")
        assert loads.makes_room_for == ""
        return found

    assert run_in_virtual_time(held_up(), at_most_s=1) == told


@pytest.mark.parametrize(
    ("asked_at_s", "given"),
    [
        (range(6), False),  # a burst
        (range(0, 61, 10), False),  # they stopped a minute before its turn
        (range(0, 600, 180), False),  # each alone
        ([0, 55, 119], True),
        (range(0, 600, 10), True),
        (range(0, 600, 40), True),
    ],
)
def test_who_nobody_waits_for_gets_a_seat_only_while_its_requests_keep_coming(
    asked_at_s: Iterable[int], given: bool
) -> None:
    """All of them go to its fallback at once; for the model that holds the memory people wait without end."""
    busy = model("warm", "warm", stayed_ms=0.0, slots=SimpleNamespace(total=1, idle=False))
    cold = model("cold", "cold", kicks=[])
    cold.kick = lambda: cold.kicks.append(now_s)
    now_s, wanted_until = 0, 0

    async def room_made_at() -> list[int]:
        nonlocal now_s, wanted_until
        swaps = Swaps(
            {"warm": busy, "cold": cold},
            now_ms=lambda: NOW_MS + now_s * 1000,
            waiting=lambda name: [],
            waited_for=lambda name: name == "warm",
            drained=lambda: False,
            facts=lambda name: ModelFacts(wanted_until=wanted_until if name == "cold" else 0),
            load_ms=lambda name: 9_000,
            warm_elsewhere=lambda name: False,
            need=lambda waker: GB,
            headroom=lambda: 0,
            loading=lambda: [],
        )
        for now_s in range(600):
            busy.stayed_ms = 100_000.0 + now_s * 1000
            at_ms = NOW_MS + now_s * 1000
            if now_s in asked_at_s and at_ms + WANTED_FOR_MS > wanted_until:
                wanted_until = at_ms + NOTED_FOR_MS
            await passes(1)
            swaps.look()
            if swaps.given_room("cold"):
                assert swaps.held_up("cold")[0] == "waits for the memory of warm"
                busy.slots.idle = True
                await passes(1)
                swaps.look()
                assert cold.kicks == [now_s, now_s], "once to say whose memory it waits for, once to take it"
                assert swaps.held_up("cold")[0] == ""
                return [now_s]
        return []

    made_at = run_in_virtual_time(room_made_at(), at_most_s=700)
    assert bool(made_at) is given
    assert all(120 <= at_s <= 160 for at_s in made_at)
