"""Which real first tokens count as probes."""

import pytest

from workers.probes import passive_probe_ms


@pytest.mark.parametrize(
    ("why", "ms", "prompt", "cached", "tps", "probe_ms"),
    [
        ("a short prompt", 300, 100, 0, 0, 300),
        ("a long one, of which all but little was cached", 300, 99_000, 98_500, 0, 300),
        ("just short enough", 300, 512, 0, 0, 300),
        ("too much had to be read", 300, 513, 0, 0, None),
        ("nobody knows how much had to be read", 9_000, 0, 0, 100, None),
        ("reading the prompt is not what is judged", 5_500, 256, 0, 100, 2_940),
        ("but a tenth of it is left: the rate is a mean", 1_000, 512, 0, 100, 100),
        ("a cached prompt takes no time to read", 300, 100, 100, 10, 300),
        ("a runtime that counts more as cached than there was", 300, 100, 120, 10, 300),
    ],
)
def test_a_first_token_counts_as_a_probe_less_the_reading_of_its_prompt(
    why: str, ms: float, prompt: int, cached: int, tps: float, probe_ms: float | None
) -> None:
    assert passive_probe_ms(ms, prompt_tokens=prompt, cached_tokens=cached, prefill_tps=tps) == probe_ms, why
