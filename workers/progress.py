"""How far a load under way is, by the runtime's own figures, for whoever waits for it."""

import asyncio
import logging
from collections.abc import Callable

from workers.runtimes.base import Runtime

log = logging.getLogger("warmlane.progress")

ASK_EVERY_S = 1.0


async def follow(runtime: Runtime, note: Callable[[float], None], *, every_s: float = ASK_EVERY_S) -> None:
    """Notes the progress of a load, 0..1, until cancelled. It is only shown: what goes wrong here ends no load."""
    while True:
        await asyncio.sleep(every_s)
        try:
            told = await runtime.progress()
        except Exception:
            log.exception("event=progress_unknown runtime=%s", runtime.kind)
            return
        if told is not None:
            note(min(1.0, max(0.0, told)))
