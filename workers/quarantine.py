"""How long a model is set aside after a failed load: pauses that grow, and at most five loads in any hour. Pure.

What failed lately stands in Redis with the other facts of the model, so neither a restart of the worker nor another
host starts the count anew; a load that succeeds does, and so does `gateway model reset`.
"""

import json
from collections.abc import Sequence

HOUR_MS = 3_600_000
PER_HOUR = 5
"""So many loads of a model that fails are tried within any hour."""

GROWTH = 6
"""Each pause is so many times the one before: five seconds, half a minute, three minutes, then a quarter of an hour."""


def failed_within_hour(told: str, now_ms: int) -> list[int]:
    """Reads the failed loads of the last hour from `ModelFacts.failed_at`, oldest first; nonsense is left out."""
    try:
        instants = json.loads(told or "[]")
    except ValueError:
        return []
    found = sorted(at for at in instants if isinstance(at, int)) if isinstance(instants, list) else []
    return [at for at in found if now_ms - HOUR_MS < at <= now_ms][-PER_HOUR:]


def pause_ms(failed_at: Sequence[int], now_ms: int, *, failures: int, first_s: float, most_s: float) -> int:
    """Says for how long no load is tried after one that has just failed.

    `failed_at` holds the failed loads of the last hour, this one included if one was tried; `failures` counts all
    failures since the last success.
    """
    grown_s = min(most_s, first_s * GROWTH ** min(failures - 1, 10))
    if len(failed_at) < PER_HOUR:
        return int(grown_s * 1000)
    return max(int(grown_s * 1000), failed_at[-PER_HOUR] + HOUR_MS - now_ms)
