"""First-token times as counts in fixed buckets, so that days, callers and hosts add up and the memory is bounded.

A bucket is named by its upper bound in ms. Up to 16 ms each has its own; from there on there are eight in every
doubling: 18, 20, … 32, 36, … Percentiles are told within ERROR of the exact ones (nearest rank). `bound_of` is the rule
by which `includes/usage.lua` counts.
"""

import math
from collections.abc import Mapping

ERROR = 0.06
"""The most by which a percentile may differ from the exact one, as a share of it."""

_EXACT_BITS = 4


def bound_of(ms: int) -> int:
    """Gives the bucket of a time."""
    step = _step(ms)
    return -(-ms // step) * step


def percentile(counts: Mapping[int, int], share: float) -> int | None:
    """Gives the time within which this share of the first tokens came; None where there were none."""
    left = math.ceil(share * sum(counts.values()))
    for bound in sorted(counts):
        left -= counts[bound]
        if left <= 0 and counts[bound]:
            return _middle(bound)
    return None


def _step(ms: int) -> int:
    """How wide the bucket of a time is."""
    return 1 << max(0, (ms - 1).bit_length() - _EXACT_BITS) if ms > 0 else 1


def _middle(bound: int) -> int:
    """The time that is told for a bucket: as far from its ends as it can be, in shares of them."""
    least = bound - _step(bound) + 1
    return round(2 * least * bound / (least + bound)) if bound else 0
