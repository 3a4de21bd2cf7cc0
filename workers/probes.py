"""What a real first token says about the health of a model. Pure."""

from workers.rates import prefill_ms

PASSIVE_PROMPT_TOKENS = 512
"""A real first token counts as a probe only when at most this many prompt tokens had to be read for it."""


def passive_probe_ms(ms: float, *, prompt_tokens: int, cached_tokens: int, prefill_tps: float) -> float | None:
    """What a probe would have measured (ms): the first token of a job less the reading of its uncached prompt.

    None where it says nothing: the prompt was long, or nobody knows how long it was (0). `prefill_tps` is learned, in
    tokens a second; 0 = not known, then nothing is taken off. A tenth is always left, because the rate is a mean.
    """
    uncached = prompt_tokens - cached_tokens
    if prompt_tokens <= 0 or uncached > PASSIVE_PROMPT_TOKENS:
        return None
    return max(ms - prefill_ms(max(0, uncached), prefill_tps), ms / 10)
