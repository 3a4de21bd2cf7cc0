"""Mistakes that somebody could make in the Lua verbs, one at a time, to see whether the model test notices.

Each replaces one piece of a verb's final text. A piece that is no longer there fails loudly: the fault must be planted
anew, or it would prove nothing.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from broker import scripts


@dataclass(frozen=True)
class Fault:
    """One mistake: in which verbs, what is looked for (a pattern that fits once), and what stands there instead."""

    name: str
    verbs: tuple[str, ...]
    right: str
    wrong: str
    slow: bool = False  # it takes long to find


FAULTS = [
    Fault(
        "a retry leaves the dead letter",
        ("submit",),
        r"  if letter then redis\.call\(\"XDEL\".*\n",
        "",
        slow=True,
    ),
    Fault(
        "an asynchronous job is in no list",
        ("submit",),
        r"if named\.mode == \"async\" and not named\.batch then list_job.*\n",
        "",
    ),
    Fault(
        "a request is tried again twice",
        ("submit",),
        r"  if again then return \{ \"attached\", again \} end\n",
        "",
        slow=True,
    ),
    Fault(
        "the cap check removed",
        ("submit",),
        r"if waits < bound and .* then return nil end",
        "if true then return nil end",
    ),
    Fault(
        "end ignores the attempt",
        ("end",),
        r"local refusal = holds\(.*\)\nif refusal then return refusal end\n",
        "",
    ),
    Fault(
        "promote keeps the old entry",
        ("promote",),
        r"\nleave\(KEYS\[1\], .*\)\n",
        "\n",
    ),
    Fault(
        "recover does not check the state",
        ("recover",),
        r"local to, wrong = follow\(.*\)\nif not to .*\nlocal refusal = holds\(.*\)\nif refusal .*\n",
        'if f.attempt ~= ARGV[7] then return redis.error_reply("STALE") end\n',
    ),
    Fault(
        "emit writes before it refuses",
        ("emit",),
        r"(if seq > last \+ 1 then return .*\n)\n(redis\.call\(\"XADD\".*\n)",
        r"\2\n\1",
        slow=True,
    ),
    Fault(
        "release reuses the entry",
        ("release",),
        r"leave\(lane, group, f\[1\]\)\n((?:  hold_.*\n)+)  local entry = enter\(.*\)\n",
        r'\1  local entry = f[1]\n  redis.call("XACK", lane, group, entry)\n',
    ),
    Fault(
        "the cap on downgrades removed",
        ("submit", "promote"),
        r"return jobs < from or .*\n",
        "return true\n",
        slow=True,
    ),
    Fault(
        "promote does not mark the downgrade",
        ("promote",),
        r"if number > 0 then count_moved\(.*\n",
        "",
    ),
    Fault(
        "a downgrade that falls out of the window keeps its mark in the sum",
        ("submit",),
        r"local change = -redis\.call\(\"HDEL\", (.*)\)\n",
        r'redis.call("HDEL", \1)\n  local change = 0\n',
    ),
    Fault(
        "a lost answer that stands is dropped",
        ("release", "recover"),
        r"  if continue_by then\n(    redis\.call\(\"HSET\", job, \"continues\".*\n)  else\n",
        r"  if continue_by then\n\1  end\n  do\n",
        slow=True,
    ),
    Fault(
        "the claim of an answer that goes on counts its frames anew",
        ("claim",),
        r"\n  last = f\[16\]\n",
        "\n",
        slow=True,
    ),
    Fault(
        "an answer goes on from a log that has grown since it was judged",
        ("release", "recover"),
        r"  if f\.last_seq ~= from then .*\n",
        "",
        slow=True,
    ),
    Fault(
        "a job is put back for ever",
        ("release",),
        r"tonumber\(told\[1\] or 0\) >= put_backs_max or ",
        "",
        slow=True,
    ),
    Fault(
        "a job is put back that gives up",
        ("release",),
        r" or tonumber\(told\[2\]\) < now \+ tonumber\(ARGV\[15\]\) then",
        " then",
        slow=True,
    ),
    Fault(
        "a put-back is not counted",
        ("release",),
        r"if put_backs_max > 0 then redis\.call\(\"HINCRBY\".*\n",
        "",
    ),
    Fault(
        "another model finishes the sentence",
        ("promote",),
        r"if tonumber\(f\[10\] or 0\) > 0 then return .*\n",
        "",
        slow=True,
    ),
    Fault(
        "half an answer waits as long as a whole one",
        ("release", "recover", "claim", "postpone", "attach", "rejoin", "detach"),
        r"  elseif f\[1\] == \"queued\" and tonumber\(f\[8\] or 0\) > 0 then.*\n.*\n",
        "",
        slow=True,
    ),
    Fault(
        "an answer that goes on has its first token once more",
        ("first_token",),
        r"if tonumber\(f\[5\] or 0\) == 0 then (redis.*) end\n",
        r"\1\n",
        slow=True,
    ),
    Fault(
        "an answer that stands starts again before its next first token",
        ("release", "recover"),
        r" or tonumber\(f\.continues or 0\) > 0\n",
        "\n",
        slow=True,
    ),
    Fault(
        "attach sets seen for a stream:false waiter",
        ("attach",),
        r"if sees == \"1\" then (redis\.call\(\"HSET\", job, \"seen\")",
        r"if true then \1",
    ),
    Fault(
        "a retry takes a job that has a reader",
        ("rejoin",),
        r"f\[1\] and not ended and \(ours or .*\) then",
        "f[1] and not ended then",
    ),
    Fault(
        "a retry is led to a job that its client knows",
        ("detach",),
        r"  settle_retries\(index, now, fingerprint, ARGV\[2\], false\)\n",
        "",
        slow=True,
    ),
    Fault(
        "an answer that was heard is handed out again",
        ("end",),
        r"to == \"done\" and not heard",
        'to == "done"',
    ),
    Fault(
        "two retries get the same ended answer",
        ("rejoin",),
        r"ended and \(fetched_by == .*\) then",
        "ended then",
        slow=True,
    ),
    Fault(
        "the fair share is not looked at",
        ("submit",),
        r"if waits < bound and shared_by > 1 and own >= share then",
        "if false then",
        slow=True,
    ),
    Fault(
        "the fair share counts places of other lanes too",
        ("submit",),
        r"return redis\.call\(\"ZLEXCOUNT\", (root \.\. \"waits:\" \.\. caller), .*\n",
        r'return redis.call("ZCARD", \1)\n',
    ),
    Fault(
        "who was refused is forgotten",
        ("submit",),
        r"line_up\(root, lane, caller, now\) end\n  note_active\(root, lane, caller, now\)\n",
        "line_up(root, lane, caller, now) end\n",
        slow=True,
    ),
    Fault(
        "a caller runs more jobs than it may",
        ("claim",),
        r"if max_running > 0 and .* then",
        "if false then",
        slow=True,
    ),
    Fault(
        "an ended job goes on holding its place",
        ("end", "cancel", "expire"),
        r"hold_no_more\(root_of\(k\.job, id\), .*\)\n",
        "\n",
    ),
    Fault(
        "a promoted job holds a place in the lane that it left",
        ("promote",),
        r"hold_waiting\(root, f\[11\], ARGV\[8\], id\)",
        "hold_waiting(root, f[11], f[5], id)",
    ),
    Fault(
        "a job that ends is not counted",
        ("cancel",),
        r"  count_end\(p\.day, .*\n",
        "",
    ),
    Fault(
        "the outbox is not written with the end",
        ("end", "cancel", "expire", "release", "recover"),
        r"  owe\(root_of\(k\.job, id\), .*\n",
        "",
    ),
    Fault(
        "an event stays in the outbox",
        ("webhook_gather",),
        r"redis\.call\(\"XDEL\", KEYS\[1\], .*\n",
        "",
    ),
    Fault(
        "who lost a delivery may still say how it went",
        ("webhook_note",),
        r" or f\[2\] ~= ARGV\[4\] then",
        " then",
        slow=True,
    ),
    Fault(
        "slot time before a put-back counts as waiting",
        ("release",),
        r"  if ran > 0 then redis\.call\(\"HINCRBY\", job, \"held_ms\", .*\n",
        "",
        slow=True,
    ),
    Fault(
        "a late first token counts as in time",
        ("end",),
        r"first > by and \"/late/\"",
        'first > by + 10000 and "/late/"',
        slow=True,
    ),
    Fault(
        "promote counts under the lane that the job goes to",
        ("promote",),
        r"lane = f\[5\], asked_model",
        "lane = ARGV[8], asked_model",
    ),
    Fault(
        "a new request ends a job of its session that is read",
        ("submit",),
        r"grace >= 0 and redis\.call\(\"ZCOUNT\", readers.*\) == 0 then",
        "grace >= 0 then",
        slow=True,
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
        text, places = re.subn(fault.right, fault.wrong, script.text)
        assert places == 1, f"{name} fits {places} times; plant anew: {fault.right}"
        return scripts.Script(name, text, "changed")

    with mock.patch.object(scripts, "load", wrong):
        yield
