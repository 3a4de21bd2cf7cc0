"""Cutting and reading server-sent events."""

import pytest

from broker.dialects.sse import Event, EventCutter, read_event


def test_an_event_is_read_as_the_standard_says() -> None:
    assert read_event(b"event: ping\nid: 4\nretry: 9\n: note\ndata:  two spaces\ndata:none\ndata") == Event(
        b"ping", b" two spaces\nnone\n", b""
    )
    assert read_event(b": only a comment") == Event(b"", None, b"")


def test_a_line_that_is_no_field_is_stray_text() -> None:
    assert read_event(b"data: x\nproxy error: gone\nBad") == Event(b"", b"x", b"proxy error: gone\nBad")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events_come_out_whole_whatever_ends_their_lines(line_end: bytes) -> None:
    stream = b"data: a\n\n: b\n\n\ndata: \xc3\xa9\n\ndata: rest".replace(b"\n", line_end)
    for step in range(1, len(stream) + 1):
        cutter = EventCutter()
        cut = b"".join(cutter.cut(stream[at : at + step]) for at in range(0, len(stream), step))
        assert cut.replace(b"\n\n\n", b"\n\n") == b"data: a\n\n: b\n\ndata: \xc3\xa9\n\n"
        assert cutter.rest().lstrip(b"\n") == b"data: rest"


def test_an_unfinished_event_is_bounded() -> None:
    cutter = EventCutter(max_event_bytes=10)
    assert cutter.cut(b"a\n\n12345678") == b"a\n\n" and not cutter.overflowed
    assert cutter.cut(b"90abc") == b"" and cutter.overflowed and cutter.rest() == b""
