"""Counting the lines of a file that nobody holds as a whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.files import Lines


@given(st.lists(st.sampled_from([b"", b" ", b"\t\r", b"a", b"bc ", b" d"]), max_size=12), st.integers(1, 5))
def test_lines_are_counted_however_the_parts_are_cut(lines: list[bytes], step: int) -> None:
    whole, counter = b"\n".join(lines), Lines()
    for at in range(0, len(whole), step):
        counter.take(whole[at : at + step])
    assert counter.count == sum(1 for line in lines if line.strip())


@pytest.mark.parametrize(
    ("parts", "count"), [([b"a"], 1), ([b"a\n", b"\n"], 1), ([b"a", b"b", b"\nc"], 2), ([b"\n\n"], 0)]
)
def test_a_line_that_two_parts_share_is_one(parts: list[bytes], count: int) -> None:
    counter = Lines()
    for part in parts:
        counter.take(part)
    assert counter.count == count
