"""How much a request may hold: what is just within a limit is read, and what is beyond it is refused in a sentence."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from broker.dialects.bounds import COMMAS_MAX, DEPTH_MAX, KEYS_MAX, MESSAGES_MAX, STOPS_MAX, TOOLS_MAX, read_request
from broker.errors import BadRequest


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_depth_has_a_limit_that_every_reader_stays_below(start: str, end: str) -> None:
    """The interpreter's own limit depends on who calls, so a body that the api read might break a worker."""

    def nested(depth: int) -> bytes:
        return b'{"x":[1,2,"[[[[{{{{"],"a":%s1%s}' % (start.encode() * (depth - 1), end.encode() * (depth - 1))

    assert read_request(nested(DEPTH_MAX))[1].key == "a"
    for depth in (DEPTH_MAX + 1, 100_000):
        with pytest.raises(BadRequest, match="nested too deeply"):
            read_request(nested(depth))
    flat = b'{"a":[%s]}' % b",".join([b'{"b":[]}'] * 1000)
    assert len(read_request(flat)[0].value) == 1000


@pytest.mark.parametrize(
    "more",
    [
        lambda: {"messages": [{"role": "user", "content": "x"}] * MESSAGES_MAX},
        lambda: {"tools": [{"type": "function", "function": {"name": "f"}}] * TOOLS_MAX},
        lambda: {"stop": ["x"] * STOPS_MAX},
        lambda: {f"k{i}": 1 for i in range(KEYS_MAX - 3)},
    ],
)
def test_what_is_just_within_a_limit_is_read(more: Callable[[], dict[str, Any]]) -> None:
    body = json.dumps({"model": "big", "messages": [{"role": "user", "content": "x"}], "stream": True, **more()})
    assert read_request(body.encode())


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        (b'"functions":[%s]' % b",".join([b"{}"] * (TOOLS_MAX + 1)), "functions may hold 1,024 items at most"),
        (b'"options":{%s}' % b",".join(b'"%d":1' % n for n in range(KEYS_MAX + 1)), "options may hold 1,000 items"),
        (b'"x":[%s]' % (b"1," * COMMAS_MAX + b"1,1"), "too many values"),
        (b'"input":[%s]' % b",".join([b"7"] * (MESSAGES_MAX + 1)), ""),  # as many tokens as the context holds
        (b'"x":[%s]' % b",".join([b"1"] * MESSAGES_MAX * 2), ""),  # the runtime's to judge
    ],
    ids=["functions", "options", "commas", "tokens", "anything"],
)
def test_what_is_beyond_a_limit_is_refused(held: bytes, sentence: str) -> None:
    body = b'{"model":"big",%s}' % held
    if sentence:
        with pytest.raises(BadRequest, match=sentence):
            read_request(body)
    else:
        assert read_request(body)
