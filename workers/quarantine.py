"""How long a model is set aside after a failed load: pauses that grow, and at most five loads in any hour.

What failed lately stands in Redis with the other facts of the model, so neither a restart of the worker nor another
host starts the count anew; a load that succeeds does, and so does `gateway model reset`. The rule is pure, and
`Quarantine` reads and writes by it.
"""

import json
import logging
from collections.abc import Awaitable, Callable, Sequence

from broker.hosts import NOT_FAILED
from broker.records import ModelFacts

log = logging.getLogger("warmlane.quarantine")

HOUR_MS = 3_600_000
PER_HOUR = 5
"""So many loads of a model that fails are tried within any hour."""

GROWTH = 6
"""Each pause is so many times the one before: five seconds, half a minute, three minutes, then a quarter of an hour."""

FIRST_S = 5.0
MOST_S = 900.0
UNREACHABLE_MOST_S = 30.0
"""The longest pause where no load was tried, because nobody was there to load it: looking again costs nothing."""


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


class Quarantine:
    """The failed loads of one model, as they stand in Redis; each call may raise BrokerUnavailable."""

    def __init__(
        self,
        name: str,
        *,
        now_ms: Callable[[], Awaitable[int]],
        facts: Callable[[], ModelFacts],
        learn: Callable[..., Awaitable[None]],
    ) -> None:
        self._name = name
        self._now_ms = now_ms
        self._facts = facts
        self._learn = learn

    @property
    def words(self) -> str:
        """What failed last."""
        return self._facts().failure

    async def goes_on(self) -> bool:
        """Whether no load may be tried yet."""
        until = self._facts().quarantined_until
        return until > 0 and until > await self._now_ms()

    async def begin(self, words: str, *, tried: bool = True) -> None:
        """Notes a failure and the pause after it; not `tried` = nobody was there to load anything."""
        facts, now = self._facts(), await self._now_ms()
        failures, failed_at = facts.failures + 1, failed_within_hour(facts.failed_at, now)
        if tried:
            failed_at.append(now)
        most_s = MOST_S if tried else UNREACHABLE_MOST_S
        pause = pause_ms(failed_at, now, failures=failures, first_s=FIRST_S, most_s=most_s)
        await self._learn(
            self._name,
            failures=failures,
            failure=words,
            quarantined_until=now + pause,
            failed_at=json.dumps(failed_at[-PER_HOUR:]),
        )
        log.warning(
            "event=quarantine model=%s failures=%d pause_s=%.0f reason=%s", self._name, failures, pause / 1000, words
        )

    async def pause(self, words: str, *, for_s: float) -> None:
        """Sets it aside for a moment though nothing failed, so that its requests go elsewhere meanwhile."""
        await self._learn(self._name, failure=words, quarantined_until=await self._now_ms() + int(for_s * 1000))

    async def forget(self) -> None:
        """Lets the next failure be the first: what failed was another definition."""
        if self._facts().failure:
            await self._learn(self._name, **NOT_FAILED)
