"""How ready a resident model is: its first-token times, and whether they make it degraded. Pure."""

SLOW_IN_A_ROW = 2
EWMA = 0.3

PROBE_PATIENCE = 3.0
"""A probe may take this many first-token budgets before it counts as failed rather than slow."""

PROBE_LEAST_S = 10.0


def probe_within_s(budget_ms: int) -> float:
    """How long a probe may take at most, where a first token should take no longer than `budget_ms`."""
    return max(PROBE_LEAST_S, PROBE_PATIENCE * budget_ms / 1000)


class Readiness:
    """What the first tokens of one model on this host say. Times in ms, 0 = none was seen yet; the budget is
    `firstTokenBudgetMs` as the policy has it at that moment."""

    def __init__(self) -> None:
        self.first_token_ms = 0.0
        self.first_token_ewma_ms = 0.0
        self.slow = 0  # in a row
        self.words = ""  # why it is slow, "" = the last one was good

    def woke(self, ms: float, *, budget_ms: int) -> None:
        """Takes the last probe of a wake: a model that is slow right after its load is not given a second chance."""
        self._note(ms)
        self.slow = SLOW_IN_A_ROW if ms > budget_ms else 0
        self.words = _slow_words(ms, budget_ms) if self.slow else ""

    def measured(self, ms: float, *, budget_ms: int) -> None:
        """Takes a probe, or a real first token that counts as one."""
        self._note(ms)
        if ms > budget_ms:
            self.slow += 1
            self.words = _slow_words(ms, budget_ms)
        else:
            self.slow, self.words = 0, ""

    def failed(self, words: str) -> None:
        """Takes a probe that gave no first token."""
        self.slow += 1
        self.words = words

    def stuck(self) -> None:
        """Hears that no probe can tell, because every slot still works on an answer that was closed long ago."""
        self.slow = max(self.slow, SLOW_IN_A_ROW)
        self.words = "the runtime still works on answers that were closed long ago"

    def verdict(self, state: str) -> str:
        """Says what a resident model should be, `warm` or `degraded`: two slow ones in a row make it degraded, a good
        one restores it; between the two it stays what it is."""
        if state == "warm" and self.slow >= SLOW_IN_A_ROW:
            return "degraded"
        if state == "degraded" and self.slow == 0:
            return "warm"
        return state

    def _note(self, ms: float) -> None:
        self.first_token_ms = ms
        before = self.first_token_ewma_ms
        self.first_token_ewma_ms = ms if not before else before + EWMA * (ms - before)


def _slow_words(ms: float, budget_ms: int) -> str:
    return f"first token after {ms:.0f} ms, budget {budget_ms} ms"
