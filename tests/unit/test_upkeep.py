"""When an idle model is probed: never where that would cost a user anything."""

import asyncio
from typing import Any, cast

import pytest

from workers.overlap import Overlap
from workers.readiness import Readiness
from workers.runtimes.base import Runtime
from workers.slots import Slots
from workers.upkeep import CACHED_PROMPT_S, PROBE_DEGRADED_EVERY_S, PROBE_IDLE_EVERY_S, Upkeep

LONG_S = PROBE_IDLE_EVERY_S + 1


async def nothing() -> None:
    """Nobody weighs anything here."""


class Busy:
    """A runtime that says how many generations run, None = it cannot tell."""

    def __init__(self, busy: int | None) -> None:
        self.busy = busy

    async def state(self) -> str:
        return "loaded"

    async def busy_slots(self) -> int | None:
        return self.busy


def upkeep_of(slots: Slots, *, waited_for: bool = False, runtime: Any = None) -> Upkeep:
    quiet: Any = lambda: None  # noqa: E731
    return Upkeep(
        "big", cast(Runtime, runtime), slots, Overlap(2), Readiness(), resident=lambda: True, leaving=lambda: False,
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


@pytest.mark.parametrize(("busy", "wedged"), [(1, True), (0, False), (None, False)])
async def test_only_a_runtime_that_was_asked_and_says_so_is_wedged(busy: int | None, wedged: bool) -> None:
    """An answer was closed just over the limit ago; the runtime was asked last a second ago, just before the limit."""
    slots, now = Slots(1), asyncio.get_running_loop().time()
    slots.take("a", now_s=now - 60)
    slots.give_back("a", clean=False, now_s=now - 30.5)
    upkeep = upkeep_of(slots, runtime=Busy(busy))
    upkeep._busy_asked_at = now - 1
    assert not upkeep.wedged(settle_s=30)
    upkeep._busy_asked_at = now - 3
    await upkeep.ask(settle_s=30)
    assert upkeep.wedged(settle_s=30) is wedged
    assert slots.free == (0 if wedged else 1)
