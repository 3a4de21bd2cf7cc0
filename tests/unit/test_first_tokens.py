"""Percentiles out of buckets: as near to the exact ones as is said, and the same whichever way the buckets add up."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from lupa import lua51

from broker import scripts
from broker.first_tokens import ERROR, bound_of, percentile

TIMES = st.one_of(st.integers(0, 40), st.integers(0, 5_000), st.integers(0, 30 * 86_400_000))


def exact(times: list[int], share: float) -> int:
    """Nearest rank."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


@given(st.lists(TIMES, min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_percentile_is_as_near_as_it_says(times: list[int], share: float) -> None:
    found, wanted = percentile(Counter(map(bound_of, times)), share), exact(times, share)
    assert found is not None and abs(found - wanted) <= ERROR * wanted


def test_the_error_is_no_smaller_than_it_must_be_said() -> None:
    """Over every time up to 20 s, one by one: a tenth less would be wrong."""
    worst = max(abs((percentile({bound_of(ms): 1}, 0.5) or 0) - ms) / ms for ms in range(1, 20_000))
    assert 0.9 * ERROR < worst <= ERROR


@given(st.lists(st.lists(TIMES, max_size=20), max_size=5))
def test_days_callers_and_hosts_add_up(parts: list[list[int]]) -> None:
    together: Counter[int] = Counter()
    for part in parts:
        together.update(Counter(map(bound_of, part)))
    assert together == Counter(bound_of(ms) for part in parts for ms in part)


def test_there_are_few_buckets() -> None:
    """From nothing to ten minutes, tried one by one below 20 s: a day of one caller stays small."""
    bounds = {bound_of(ms) for ms in [*range(20_000), *range(20_000, 600_001, 10)]}
    assert len(bounds) == 139 and bounds >= {0, 1, 16, 18, 32, 36, 64, 72}


def test_no_first_tokens_have_no_percentile() -> None:
    assert percentile({}, 0.5) is None and percentile({18: 0}, 0.99) is None


def test_the_scripts_count_by_the_same_rule() -> None:
    lua = lua51.LuaRuntime()
    include = scripts.load("end", shebang=False).text
    begin, end = include.index("local function bucket_of"), include.index("-- How long a job that is held")
    ms = 'local function ms(number) return string.format("%.0f", number) end\n'
    rule = lua.execute(ms + include[begin:end] + "return bucket_of")
    samples = [*range(3_000), *(2**bits + near for bits in range(11, 33) for near in (-1, 0, 1, 2))]
    assert [int(rule(took)) for took in samples] == [bound_of(took) for took in samples]
