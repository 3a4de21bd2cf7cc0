"""Downgrades: jobs served by another model than the one they asked for. How many there may be, and who stays there.

The cap is judged in the scripts that move a job (`includes/downgrade.lua`), against a window of the last jobs that
asked for the model: a hash with a running number, a sum, and a mark for each downgrade at its job's number modulo the
window. That is the smallest structure that is exact: the sum needs no scan, and a job that falls out of the window
takes its mark with it. Nothing is counted for a model without a cap, so most submits cost what they did before.
"""

import asyncio
from typing import Any

from broker.policies import Active
from broker.policy import Lane
from broker.records import Downgrades
from broker.store import Store

WINDOW = 200
"""So many of the last jobs that asked for a model are looked at."""

BINDING_FROM = 20
"""The cap binds once so many jobs have asked: before, one downgrade would be a large share."""

STICKY = "sticky"
"""Why a job entered a fallback that no refusal led it to: its session stays there."""


def rules(active: Active, asked_model: str, to: Lane) -> list[Any]:
    """What the scripts must know of a model's downgrades: share, window, from when it binds, how long sessions stay.

    A model that is on its way out has no cap: its waiting jobs shall go. No session stays in a remote lane.
    """
    model = active.policy.models.get(asked_model)
    if model is None:
        return [1, WINDOW, BINDING_FROM, 0]
    sticky_ms = model.sticky_promotion_ms if to.trust == "local" else 0
    return [model.max_downgrade_share, WINDOW, BINDING_FROM, sticky_ms]


async def on_fallback(store: Store, model: str, session: str) -> bool:
    """Whether a session that asks for the model stays on its fallback now."""
    until, now = await asyncio.gather(store.command("ZSCORE", store.keys.sticky(model), session), store.now_ms())
    return until is not None and float(until) > now


async def sessions_on_fallback(store: Store, model: str) -> int:
    """How many sessions that asked for the model stay on its fallback now."""
    return int(await store.command("ZCOUNT", store.keys.sticky(model), f"({await store.now_ms()}", "+inf"))


async def read(store: Store, model: str) -> Downgrades:
    """Reads how many of the last jobs that asked for a model are downgrades."""
    return Downgrades.from_hash(await store.hash(store.keys.downgrades(model)))
