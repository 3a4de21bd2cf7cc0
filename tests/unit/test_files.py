"""Counting the lines of a file that nobody holds as a whole."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import files
from broker.files import Lines, Place
from broker.records import FileRecord
from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace


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


@given(
    st.lists(st.text(alphabet="ab\n", max_size=9).map(str.encode), min_size=1, max_size=8).filter(any),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_lines_are_read_from_any_place_however_the_parts_are_cut(parts: list[bytes], bytes_max: int) -> None:
    parts = [part for part in parts if part]
    lines = b"".join(parts).split(b"\n")
    expected = [line[: bytes_max + 1] for line in (lines if lines[-1] else lines[:-1])]

    async def read() -> None:
        store = Store.fake(fake_redis(), namespace=new_namespace())
        record = FileRecord(id="file-1", parts=len(parts), bytes=sum(map(len, parts)))
        await store.command("RPUSH", store.keys.parts(record.id), *parts)
        found = [one async for one in files.lines_of(store, record, Place(), bytes_max=bytes_max)]
        assert [line for line, _, _ in found] == expected
        for number, (line, begins, after) in enumerate(found):
            again = files.lines_of(store, record, begins, bytes_max=bytes_max)
            assert (await anext(again))[0] == line
            await again.aclose()
            rest = [one async for one, _, _ in files.lines_of(store, record, after, bytes_max=bytes_max)]
            assert rest == expected[number + 1 :]
        await store.close()

    asyncio.run(read())
