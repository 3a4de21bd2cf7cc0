"""How much a request may hold beside its bytes: what is cheap to send and dear to walk through, here and in a worker.

A body of 15 MB of `"a":1,` once kept the api busy for six seconds, and the worker for longer than its lease.
"""

from broker.dialects.json_splice import Member, scan
from broker.errors import BadRequest

DEPTH_MAX = 200
"""Objects and lists within each other, the body itself among them. Well below what Python's own stack bears, which
depends on who reads: what the api can read, a worker must be able to read and to write anew."""
KEYS_MAX = 1_000
"""Of the body and of its options: the walks over these are Python's."""
MESSAGES_MAX = 10_000
TOOLS_MAX = 1_024
STOPS_MAX = 64

COUNTED_FROM_BYTES = 1 << 20
"""A smaller body cannot hold enough to matter, so its characters are not counted."""
BRACKETS_MAX = 250_000
COMMAS_MAX = 2_000_000
"""Of a larger body, text and all: a prompt with so many is longer than any context."""

_NO_BRACKETS = bytes(range(256)).translate(None, b"[]{}")
MOST = {
    "messages": MESSAGES_MAX,
    "input": MESSAGES_MAX,
    "tools": TOOLS_MAX,
    "functions": TOOLS_MAX,
    "stop": STOPS_MAX,
    "stop_sequences": STOPS_MAX,
    "options": KEYS_MAX,
}


def too_many_values(text: bytes) -> bool:
    """Whether JSON is not to be read at all: its parser would keep the whole process waiting for seconds."""
    if len(text) <= COUNTED_FROM_BYTES:
        return False
    return text.count(b"[") + text.count(b"{") > BRACKETS_MAX or text.count(b",") > COMMAS_MAX


def read_request(body: bytes) -> list[Member]:
    """Lists the top-level members of a client's request; raises BadRequest, also where it holds too much."""
    if too_many_values(body):
        raise BadRequest("the body holds too many values")
    members = scan(body, most=KEYS_MAX)
    for member in members:
        most, value = MOST.get(member.key), member.value
        if most is None or (type(value) is not list and type(value) is not dict) or len(value) <= most:
            continue
        if type(value) is dict or type(value[0]) is not int:  # numbers of tokens may be as many as the context holds
            raise BadRequest(f"{member.key} may hold {most:,} items at most", member.key)
    if len(body.translate(None, _NO_BRACKETS)) > 2 * DEPTH_MAX and _too_deep([member.value for member in members]):
        raise BadRequest(f"the body is nested too deeply: {DEPTH_MAX} levels at most")
    return members


def _too_deep(values: list[object]) -> bool:
    """Goes down level by level; the values themselves are on the second."""
    level = [value for value in values if type(value) is dict or type(value) is list]
    for _ in range(DEPTH_MAX - 1):
        if not level:
            return False
        level = [
            below
            for value in level
            for below in (value.values() if type(value) is dict else value)
            if type(below) is dict or type(below) is list
        ]
    return bool(level)
