"""What one host decides its turns by: facts of its own models, as its own loads have shown them."""

from types import SimpleNamespace
from typing import Any

import pytest

from broker.records import ModelFacts, Waiting
from tests.support.jump_loop import run_in_virtual_time
from workers.swaps import Swaps

NOW_MS = 1_000_000
GB = 1 << 30


def model(name: str, state: str, **more: Any) -> Any:
    definition = SimpleNamespace(min_stay_ms=0, weight=1.0)
    slots = SimpleNamespace(total=1, idle=True)
    told = SimpleNamespace(
        name=name, state=state, model=definition, slots=slots, leaving=False, ours=True, resident=state == "warm",
        makes_room_for="",
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
        )
        swaps.look()
        return swaps.makes_room("warm", "cold")

    assert run_in_virtual_time(decided(), at_most_s=1) is makes_room
