"""Whether a model should be in memory now. Pure: the clock and the demand are passed in."""

from broker.policy import Model
from broker.policy.hours import HoursNow


class Warmth:
    """One model's wish to be in memory. Instants and durations in ms."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._within = HoursNow(model.hours)

    def kept(self, now_ms: int) -> bool:
        """Whether it is to be warm though nobody asks: kept warm, and within its active hours if it has any."""
        return self._model.keep_warm and self._within(now_ms)

    def active(self, now_ms: int) -> bool:
        """Whether people are expected: its active hours go on. A model without any says nothing about that."""
        return self._model.active_hours is not None and self._within(now_ms)

    def wakes_for_batch(self, now_ms: int) -> bool:
        """Whether batch work may wake it now."""
        asked = self._model.wake_for_batch
        return not self.active(now_ms) if asked == "outsideHours" else asked

    def wanted(self, now_ms: int, *, waited_for: bool, wanted_until: int) -> bool:
        """Whether it should be warm: somebody waits for it, asked for it lately, or it is kept warm."""
        return waited_for or wanted_until > now_ms or self.kept(now_ms)

    def idle_too_long(self, now_ms: int, *, idle_ms: float, waited_for: bool, wanted_until: int) -> bool:
        """Whether it should leave memory: nobody wants it, and nothing has run on it for `idleUnloadMs`."""
        too_long = idle_ms > self._model.idle_unload_ms
        return too_long and not self.wanted(now_ms, waited_for=waited_for, wanted_until=wanted_until)
