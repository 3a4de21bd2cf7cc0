"""How fast a model reads and writes, learned from real answers: uncached prompt tokens and answer tokens a second.

The runtime's own timings count first. Without them a prompt's reading time is what its first token took beyond the
model's usual first token, believed only where enough was read for it. One odd answer (a stall, a clock that jumped)
must not turn a prediction over, so a figure counts for at most STEP_MAX times what is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from broker.records import ModelFacts

EWMA = 0.2
STEP_MAX = 4.0
"""One answer counts as at most so many times faster or slower than what is known."""

TPS_MIN, TPS_MAX = 1.0, 1_000_000.0
"""Rates outside of this are no rates, in tokens a second."""

TIMED_TOKENS_MIN = 64
"""Fewer uncached tokens than this say nothing of a rate, even by the runtime's own clock: a batch costs its start."""

CLOCKED_TOKENS_MIN = 256
"""The same by our own clock, where everything else that takes time before a first token has to be small beside it."""

CLOCKED_SHARE_MIN = 0.5
"""By our own clock, reading must have taken this share of a usual first token at least, or it drowns in the noise."""

WRITTEN_TOKENS_MIN = 16
"""Answers with fewer tokens say nothing of how fast they come."""


@dataclass(frozen=True)
class Answer:
    """What is known of one answer. Times in ms; `usual_ms` = first token of a short prompt, 0 = not known;
    `new_session` = no slot here had served its session before."""

    usage: Mapping[str, int]
    timings: Mapping[str, Any]
    first_token_ms: float
    total_ms: float
    usual_ms: float = 0.0
    new_session: bool = False


@dataclass
class Rates:
    """What one host learned of one model since it started, on top of what Redis knew; 0 = nothing yet."""

    rates_of: str  # the model's definition: under its name the policy may have other weights by now
    service_ms: float = 0.0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0

    @classmethod
    def known(cls, facts: ModelFacts, definition: str) -> "Rates":
        """Begins with what Redis knows, if that is of the same definition."""
        if facts.rates_of != definition:
            return cls(definition)
        return cls(definition, facts.service_ms, facts.prefill_tps, facts.decode_tps)

    def note(self, answer: Answer) -> None:
        """Takes one whole answer in."""
        before = self.service_ms
        self.service_ms = before + EWMA * (answer.total_ms - before) if before else answer.total_ms
        self.prefill_tps = learned(self.prefill_tps, prefill_tps(answer))
        self.decode_tps = learned(self.decode_tps, decode_tps(answer))

    def told(self, before: ModelFacts) -> dict[str, float | str]:
        """The fields of ModelFacts that are known; where Redis has those of another definition, the others too."""
        numbers = {"service_ms": self.service_ms, "prefill_tps": self.prefill_tps, "decode_tps": self.decode_tps}
        other = before.rates_of != self.rates_of
        return {"rates_of": self.rates_of} | {name: round(n, 1) for name, n in numbers.items() if n or other}


def learned(known: float, measured: float | None) -> float:
    """Moves what is known towards what was measured, if that is a rate at all. Tokens a second, 0 = not known."""
    if measured is None or not TPS_MIN <= measured <= TPS_MAX:
        return known
    if not known:
        return measured
    return known + EWMA * (min(max(measured, known / STEP_MAX), known * STEP_MAX) - known)


def prefill_tps(answer: Answer) -> float | None:
    """How fast the prompt was read, in uncached tokens a second; None = this answer does not tell."""
    read, took_ms = _number(answer.timings, "prompt_n"), _number(answer.timings, "prompt_ms")
    if took_ms > 0:
        return read * 1000 / took_ms if read >= TIMED_TOKENS_MIN else None
    cached = answer.usage.get("cached_tokens")
    if cached is None and not answer.new_session:  # some of the prompt was in the cache, and nobody says how much
        return None
    read = answer.usage.get("prompt_tokens", 0) - (cached or 0)
    took_ms = answer.first_token_ms - answer.usual_ms
    if not answer.usual_ms or read < CLOCKED_TOKENS_MIN or took_ms < answer.usual_ms * CLOCKED_SHARE_MIN:
        return None
    return read * 1000 / took_ms


def decode_tps(answer: Answer) -> float | None:
    """How fast the answer was written, in tokens a second; None = this answer does not tell."""
    written, took_ms = _number(answer.timings, "predicted_n"), _number(answer.timings, "predicted_ms")
    if took_ms <= 0:
        written = answer.usage.get("completion_tokens", 0) - 1  # the first token ends the reading
        took_ms = answer.total_ms - answer.first_token_ms
    return written * 1000 / took_ms if written >= WRITTEN_TOKENS_MIN and took_ms > 0 else None


def prefill_ms(tokens: int, tps: float) -> float:
    """How long so many uncached tokens take to read; 0 where the rate is not known."""
    return tokens * 1000 / tps if tps > 0 else 0.0


def _number(figures: Mapping[str, Any], name: str) -> float:
    value = figures.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
