"""Letting a job in where Redis may be away for a moment, for a client that waits and for one that does not."""

import asyncio
from collections.abc import Awaitable, Callable

from broker import errors, jobs
from broker.admission import Admitted
from broker.store import Store

DOOR_OUTAGE_S = 5.0
"""How long a request waits at the door while Redis is away; it holds nothing yet and may as well try elsewhere."""
DOOR_PAUSE_S = 0.1
JOIN_TRIES = 3
"""How often a request looks for a place of its own because the earlier job that it was led to is gone."""


async def let_in(
    store: Store,
    job_id: str,
    admit: Callable[[], Awaitable[Admitted]],
    *,
    why_not: Callable[[], type[Exception] | None],
) -> Admitted:
    """Admits a job, again while Redis is away: then it may be in, its reply lost, and is looked for before anything can
    refuse it. `why_not` says why nobody waits for that any more, None while somebody does."""
    loop, unsure = asyncio.get_running_loop(), False
    began = loop.time()
    while True:
        try:
            if unsure and (known := await jobs.find(store, job_id)) is not None:
                return Admitted(known.id, known.lane)
            return await admit()
        except (errors.RedisFull, errors.PolicyUnreadable):
            raise  # that takes a person, and to ask a full Redis again and again would only fill it more
        except errors.BrokerUnavailable:
            unsure = True
            if loop.time() - began > DOOR_OUTAGE_S:
                raise
            if (why := why_not()) is not None:
                raise why from None
            await asyncio.sleep(DOOR_PAUSE_S)
