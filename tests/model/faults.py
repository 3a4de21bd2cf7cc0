"""Mistakes that somebody could make in the Lua verbs, one at a time, to see whether the model test notices.

Each replaces one piece of a verb's final text. A piece that is no longer there fails loudly: the fault must be planted
anew, or it would prove nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from broker import scripts


@dataclass(frozen=True)
class Fault:
    """One mistake: in which verbs, which text, and what stands there instead."""

    name: str
    verbs: tuple[str, ...]
    right: str
    wrong: str


FAULTS = [
    Fault(
        "the cap check removed",
        ("submit", "promote", "release_due"),
        "return waiting(lane, group) < bound",
        "return true",
    ),
    Fault(
        "end ignores the attempt",
        ("end",),
        "local refusal = fence(KEYS[1], ARGV[7])\n",
        "local refusal = nil\n",
    ),
    Fault(
        "promote keeps the old entry",
        ("promote",),
        "leave(KEYS[1], group, ARGV[6])\n",
        "\n",
    ),
    Fault(
        "recover does not check the state",
        ("recover",),
        'local to, wrong = check(KEYS[1], "recover")\nif not to then return wrong end\n'
        "local refusal = fence(KEYS[1], ARGV[7])\nif refusal then return refusal end\n",
        'if redis.call("HGET", KEYS[1], "attempt") ~= ARGV[7] then return redis.error_reply("STALE") end\n',
    ),
    Fault(
        "emit writes before it refuses",
        ("emit",),
        'if seq > last + 1 then return redis.error_reply("GAP " .. last .. " then " .. ARGV[3]) end\n\n'
        'redis.call("XADD", KEYS[2], ARGV[2] .. "-" .. ARGV[3], "kind", "content", "data", ARGV[4])\n',
        'redis.call("XADD", KEYS[2], ARGV[2] .. "-" .. ARGV[3], "kind", "content", "data", ARGV[4])\n\n'
        'if seq > last + 1 then return redis.error_reply("GAP " .. last .. " then " .. ARGV[3]) end\n',
    ),
    Fault(
        "release reuses the entry",
        ("release",),
        '  leave(lane, group, redis.call("HGET", job, "entry"))\n  local entry = enter(lane, group, job, id)\n',
        '  local entry = redis.call("HGET", job, "entry")\n  redis.call("XACK", lane, group, entry)\n',
    ),
    Fault(
        "attach sets seen for a stream:false waiter",
        ("attach",),
        'if ARGV[5] == "1" then redis.call("HSET"',
        'if true then redis.call("HSET"',
    ),
]


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Runs the verbs with the fault in them."""
    load = scripts.load

    def wrong(name: str, *, shebang: bool) -> scripts.Script:
        script = load(name, shebang=shebang)
        if name not in fault.verbs:
            return script
        assert script.text.count(fault.right) == 1, f"{name} no longer reads so; plant anew: {fault.right}"
        return scripts.Script(name, script.text.replace(fault.right, fault.wrong), "changed")

    with mock.patch.object(scripts, "load", wrong):
        yield
