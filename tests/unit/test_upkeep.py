"""When an idle model is probed, never where that would cost a user anything; and when a runtime counts as stuck."""

import asyncio
from typing import Any, cast

import pytest

from workers.overlap import Overlap
from workers.readiness import Readiness
from workers.runtimes.base import Runtime, State
from workers.slots import Slots
from workers.upkeep import CACHED_PROMPT_S, PROBE_DEGRADED_EVERY_S, PROBE_IDLE_EVERY_S, Upkeep

LONG_S = PROBE_IDLE_EVERY_S + 1


async def nothing() -> None:
    """Nobody weighs anything here."""


class Busy:
    """A runtime that is loaded, and says how many of its slots are busy."""

    def __init__(self, busy: int | None) -> None:
        self.busy = busy

    async def state(self) -> State:
        return "loaded"

    async def busy_slots(self) -> int | None:
        return self.busy


def upkeep_of(slots: Slots, *, waited_for: bool = False, busy: int | None = None) -> Upkeep:
    quiet: Any = lambda: None  # noqa: E731
    return Upkeep(
        "big", cast(Runtime, Busy(busy)), slots, Overlap(2), Readiness(), resident=lambda: True, leaving=lambda: False,
        waited_for=lambda: waited_for, weigh=nothing, kick=quiet, changed=quiet,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("idle_s", "waited_for", "prompts_used_s_ago", "degraded", "due"),
    [
        (LONG_S, False, [], False, True),
        (PROBE_IDLE_EVERY_S - 1, False, [], False, False),
        (LONG_S, True, [], False, False),  # the slot is that job's
        (LONG_S, False, [60], False, True),  # the other slot holds nobody's prompt
        (LONG_S, False, [60, 60], False, False),  # it would cost one of two sessions its prompt
        (LONG_S, False, [60, CACHED_PROMPT_S + 1], False, True),  # that one does not come back
        (PROBE_DEGRADED_EVERY_S + 1, False, [60, 60], True, True),  # nothing else can show that it is good again
    ],
)
async def test_when_a_model_is_probed(
    idle_s: float, waited_for: bool, prompts_used_s_ago: list[float], degraded: bool, due: bool
) -> None:
    slots, now = Slots(2), asyncio.get_running_loop().time()
    users = [f"u{number}" for number in range(len(prompts_used_s_ago))]
    for user, ago_s in zip(users, prompts_used_s_ago, strict=True):
        slots.take(user, now_s=now - ago_s, session=user)
    for user, ago_s in zip(users, prompts_used_s_ago, strict=True):
        slots.give_back(user, clean=True, now_s=now - ago_s, tokens=2_000, estimate=2_000, served=True)
    upkeep = upkeep_of(slots, waited_for=waited_for)
    upkeep._probed_at = now - 3_600
    assert upkeep.probe_due(degraded=degraded, idle_since=now - idle_s) is due


@pytest.mark.parametrize(("busy", "stuck"), [(1, True), (0, False), (None, False)])
async def test_a_runtime_that_cannot_tell_what_it_does_is_not_called_stuck(busy: int | None, stuck: bool) -> None:
    """An Ollama says nothing of a closed answer: its slot comes back after the time that it is given, and until it is
    asked next nobody may take the model for a slow one. One that says itself that it is still at it is stuck."""
    slots, now = Slots(1), asyncio.get_running_loop().time()
    upkeep = upkeep_of(slots, busy=busy)
    slots.take("u", now_s=now - 60)
    slots.give_back("u", clean=False, now_s=now - 20)
    await upkeep.ask(settle_s=30)
    assert slots.free == (busy == 0)
    assert upkeep.stuck(settle_s=10) is stuck
    upkeep._busy_asked_at = now - 60
    await upkeep.ask(settle_s=10)
    assert slots.free == (busy != 1)
