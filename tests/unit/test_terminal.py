"""Foreign words on a terminal: a runtime may set neither its title, nor its clipboard, nor a line of ours."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from api import inspect_text, job_log, top_view
from api.status_table import status_table
from api.terminal import harmless
from api.tune_text import tune_text
from broker.dead import Letter
from broker.inspection.hosts import HostLook, LockLook, ModelHere
from broker.inspection.jobs import Found
from broker.inspection.keys import FamilyLook, Keys
from broker.inspection.lanes import LaneLook, Lanes
from broker.inspection.story import Story
from broker.inspection.timeline import Step
from broker.lifecycle import State
from broker.records import JobRecord
from broker.status import HostStatus, JobStatus, LaneStatus, ModelStatus, SilentHost, Snapshot
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, another, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

EVIL = "\x1b]52;c;ZXZpbA==\x07\nnote: all is well\r\x9b2J\u202e\u2066\u2028\ud800"
TAME = r"\x1b]52;c;ZXZpbA==\x07\x0anote: all is well\x0d\x9b2J\u202e\u2066\u2028\ud800"


def test_what_commands_a_terminal_is_spelled_out_and_the_rest_stays() -> None:
    assert harmless(EVIL) == TAME
    assert harmless("größer 大 🦙 \\x1b") == "größer 大 🦙 \\x1b"


MODEL = {
    "name": "big", "policy_version": 1, "lanes": [], "hosts": [],
    "models": [{"name": "big", "state": "quarantined", "reason": EVIL, "quarantine_ms": 5}],
}  # fmt: skip
JOB = {
    "id": "x", "state": "failed", "lane": "big", "asked": "big", "served_by": "", "attempt": 1, "promotions": 0,
    "submitted_at": 1, "claimed_at": 0, "first_token_at": 0, "ended_at": 2, "metadata": {"note": EVIL},
    "error": {"code": "runtime_failed", "message": EVIL},
}  # fmt: skip


def snapshot(words: str) -> Snapshot:
    """As a gateway may tell it that repeats whatever it has heard."""
    return Snapshot(
        models=(
            ModelStatus(name=f"a{words}", state="quarantined", reason=words, outside_hours=words),
            ModelStatus(name="b", label=words, state="waking", reason=words),
        ),
        lanes=(
            LaneStatus(
                name=f"lane{words}", model=words, fallback=words, waiting=1, retiring=True,
                jobs=(JobStatus(id=words, caller=words, state=words, host=words),),
            ),
        ),
        hosts=(HostStatus(name=words, memory_note=words, models=(words,), draining=True),),
        silent=(SilentHost(name=f"s{words}"),),
    )  # fmt: skip


def rows(words: str) -> str:
    """The cells of `gateway top`, a line for each."""
    told = snapshot(words)
    every = (top_view.model_rows, top_view.lane_rows, top_view.job_rows, top_view.host_rows)
    shown = [row for of in every for row in of(told, sort=0, backwards=False, only="")]
    return "\n".join(cell for row in shown for cell in row.cells)


def job(words: str) -> JobRecord:
    return JobRecord(id=words, lane=words, model=words, caller=words, owner=words, state=State.CLAIMED, error=words)


def story(words: str) -> Story:
    step = Step(at_ms=1, after_ms=0, took_ms=0, step=words, words=words)
    return Story(
        at_ms=1, job=job(words), steps=(step,), troubles=(words,), error=words, models={words: words}
    )  # fmt: skip


def logged(words: str) -> str:
    return job_log.as_text([job_log.Entry(1, words, words, {words: words}, [words, "  here.py:1"], around=True)])


def lanes(words: str) -> str:
    lane = LaneLook(name=words, model=words, priority=words, held_by={words: 1}, fallback=words)
    return inspect_text.lanes(Lanes(at_ms=1, policy_version=1, lanes=(lane,)))


def hosts(words: str) -> str:
    here = HostLook(
        name=words, alive=True, beat_age_ms=1, memory_total=1, memory_source=words,
        models=(ModelHere(name=words, state=words, reason=words.strip()),),
    )  # fmt: skip
    return inspect_text.hosts([here, HostLook(name=words, alive=False, beat_age_ms=1)], 1)


def letters(words: str) -> str:
    letter = Letter("1-1", 1, words, words, words, words, words, words, words, words, 0)
    return inspect_text.dead([letter], 1)


def keys(words: str) -> str:
    family = FamilyLook(pattern=words, type=words, lifetime=words)
    return inspect_text.keys(Keys(families=[family], faults={words: words}))


def tuned(words: str) -> str:
    told = {"since": "a", "until": "b", "zone": "UTC", "policy_version": 1, "proposals": [], "fragment": {}}
    return tune_text({**told, "advice": [words], "unknown": [words]})


TEXTS: dict[str, Callable[[str], str]] = {
    "status": lambda words: status_table(snapshot(words), wide=True),
    "top": rows,
    "inspect lanes": lanes,
    "inspect jobs": lambda words: inspect_text.jobs(Found(at_ms=1, jobs=(job(words),)), 5),
    "inspect job": lambda words: inspect_text.story(story(words)),
    "inspect hosts": hosts,
    "inspect locks": lambda words: inspect_text.locks([LockLook(model=words, holder=words, boot=words)]),
    "inspect dead": letters,
    "inspect keys": keys,
    "logs": logged,
    "tune": tuned,
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_for_people_holds_a_command_or_a_line_that_is_not_ours(name: str) -> None:
    text = TEXTS[name](EVIL)
    assert all(line.isprintable() for line in text.split("\n"))
    assert not any(line.startswith("note: all is well") for line in text.split("\n"))
    assert len(text.split("\n")) == len(TEXTS[name]("word").split("\n"))


def test_columns_stand_under_each_other_whatever_was_spelled_out() -> None:
    told = replace(snapshot(EVIL), models=(ModelStatus(name="a\x1b[2J", state="warm"), ModelStatus(name="b")))
    head, first, second = status_table(told).splitlines()[:3]
    assert head.index("STATE") == first.index("warm") == second.index("absent")
    head, first, second = inspect_text.table(("A", "B"), [("a\x1b[2J", "x"), ("b", "y")])
    assert head.index("B") == first.index("x", 8) == second.index("y")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model", "unload", "big"], MODEL),
        (["model", "warm", "big"], MODEL),
        (["job", "show", "x"], JOB),
        (["job", "list"], {"data": [JOB], "next": ""}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_what_the_gateway_repeats_of_a_runtime_is_a_line_of_text(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, words: list[str], told: dict[str, Any]
) -> None:
    async with another(json.dumps(told).encode()) as url:
        monkeypatch.setenv("GATEWAY_URL", url)
        ran = await asyncio.to_thread(gateway, *words)
    assert TAME in ran.out + ran.err and all(line.isprintable() for line in (ran.out + ran.err).split("\n"))
