"""Who asks for a model now, and whether that is enough to have it in memory."""

from collections.abc import Awaitable, Callable

from broker.records import ModelFacts
from workers.warmth import Warmth


class Demand:
    """What jobs, the last requests, the policy's keep-warm and an operator want of one model. Instants by Redis' clock,
    in ms; each question may raise BrokerUnavailable."""

    def __init__(
        self,
        *,
        now_ms: Callable[[], Awaitable[int]],
        facts: Callable[[], ModelFacts],
        waited_for: Callable[[], bool],
    ) -> None:
        self._now_ms = now_ms
        self._facts = facts
        self._waited_for = waited_for

    async def asked_for(self) -> bool:
        """Whether a request waits for it, or came lately."""
        return self._waited_for() or self._facts().wanted_until > await self._now_ms()

    async def wants(self, warmth: Warmth) -> bool:
        """Whether it should be warm now."""
        now, waited_for, facts = await self._now_ms(), self._waited_for(), self._facts()
        if facts.unloaded_until > now:  # an operator took it out: only a request brings it back
            return waited_for or facts.wanted_until > now
        return warmth.wanted(now, waited_for=waited_for, wanted_until=facts.wanted_until)

    async def lets_go(self, warmth: Warmth, *, idle_ms: float) -> bool:
        """Whether it should leave memory, having been idle for so long."""
        if self._facts().pinned:
            return False
        now, waited_for, facts = await self._now_ms(), self._waited_for(), self._facts()
        return warmth.idle_too_long(now, idle_ms=idle_ms, waited_for=waited_for, wanted_until=facts.wanted_until)
