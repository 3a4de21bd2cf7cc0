"""`gateway top`, by Textual's own headless pilot: what it shows, its keys, and that old never passes for new."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from api import cli_top
from api.exit_codes import Failed
from api.top import TONES, Table, Top
from api.top_view import JOBS, LANES, MODELS, host_rows, job_rows, lane_rows, model_rows, summary
from broker.status import JobStatus, LaneStatus, SilentHost, Snapshot
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, gateway
from tests.unit.test_status_table import DEEP, HOST, SMALL

__all__ = ["a_person_who_has_set_nothing", "gateway"]

TEAM = Snapshot(
    at_ms=1_000,
    policy_version=3,
    models=(DEEP, replace(SMALL, state="waking", progress=0.5, state_ms=4_000)),
    lanes=(
        LaneStatus(
            name="deep-coder", model="deep-coder", waiting=2, max_queue=6, running=1, oldest_waiting_ms=30_000,
            cold_start_budget_ms=25_000, fallback="coder-small",
        ),
        LaneStatus(name="coder-small", model="coder-small", waiting=12, max_queue=12, oldest_waiting_ms=3_000),
    ),
    hosts=(HOST,),
)  # fmt: skip


class Gate:
    """A gateway that answers as told, and the clock of whoever asks."""

    def __init__(self, *snapshots: Snapshot) -> None:
        self.told: list[Snapshot | Failed] = list(snapshots)
        self.now = 100.0
        self.asked = 0

    async def ask(self) -> dict[str, Any]:
        self.asked += 1
        told = self.told.pop(0) if len(self.told) > 1 else self.told[0]
        if isinstance(told, Failed):
            raise told
        return json.loads(json.dumps(told.as_json()))  # type: ignore[no-any-return]

    def top(self) -> Top:
        """The screen before it; it looks again only when somebody presses `r`."""
        return Top(self.ask, url="http://box:8400", every_s=3_600, clock=lambda: self.now)


def cells(app: Top, table: str) -> list[list[str]]:
    shown = app.query_one(f"#{table}", Table)
    return [[str(cell) for cell in shown.get_row_at(at)] for at in range(shown.row_count)]


def state_line(app: Top) -> str:
    return str(app.query_one("#state", Static).content)


async def until_asked(pilot: Pilot[None], gate: Gate, times: int) -> None:
    while gate.asked < times:
        await pilot.pause()
    await pilot.pause()


async def test_models_lanes_and_hosts_stand_on_one_screen() -> None:
    gate = Gate(TEAM)
    app = gate.top()
    async with app.run_test(size=(140, 40)) as pilot:
        await until_asked(pilot, gate, 1)
        small, deep = cells(app, "models")
        assert deep[:7] == ["deep-coder", "warm", "-", "1180ms", "2/6", "0/2", "31.8G"]
        assert small[:2] == ["coder-small", "waking"] and "50% after 4s" in small[7]
        assert cells(app, "lanes")[1] == [
            "deep-coder", "2/6", "###.......", "30s", "1", "deep-coder", "coder-small after 25s"
        ]  # fmt: skip
        assert cells(app, "hosts")[0][0] == "gpu1" and "coder-small, deep-coder" in cells(app, "hosts")[0]
        line = state_line(app)
        assert "http://box:8400" in line and "live" in line and "policy 3   1 host   14 waiting   1 running" in line


def test_a_host_that_fell_silent_is_marked_and_counted() -> None:
    team = replace(TEAM, silent=(SilentHost(name="box2", beat_age_ms=12_000),))
    silent, live = host_rows(team, sort=1, backwards=False, only="")  # by the age of the heartbeat
    assert silent.cells == ("box2 (silent)", "12s", "-", "-", "-", "-", "-") and silent.tone == "silent"
    assert live.cells[0] == "gpu1" and TONES["silent"] == "red"
    assert [row.name for row in host_rows(team, sort=0, backwards=False, only="BOX")] == ["box2"]
    assert summary(team).startswith("policy 3   1 host, 1 silent   ")
    assert summary(replace(team, hosts=())).startswith("policy 3   no host is alive, 1 silent   ")


def test_a_host_that_takes_no_work_says_why() -> None:
    old = replace(TEAM, hosts=(replace(TEAM.hosts[0], policy_unread=4),))
    (row,) = host_rows(old, sort=0, backwards=False, only="")
    assert (row.cells[0], row.tone) == ("gpu1 (too old for policy 4)", "draining")


async def test_keys_sort_the_table_that_has_the_focus() -> None:
    gate = Gate(TEAM)
    app = gate.top()
    async with app.run_test(size=(140, 40)) as pilot:
        await until_asked(pilot, gate, 1)

        def order(table: str) -> list[str]:
            return [row[0] for row in cells(app, table)]

        assert order("models") == ["coder-small", "deep-coder"]
        await pilot.press("s")  # by state: the best first
        assert order("models") == ["deep-coder", "coder-small"] and order("lanes") == ["coder-small", "deep-coder"]
        await pilot.press("S")
        assert order("models") == ["coder-small", "deep-coder"]
        await pilot.press("tab", "s", "s", "s")  # the lanes, by the oldest
        assert order("lanes") == ["deep-coder", "coder-small"]
        labels = [str(column.label) for column in app.query_one("#lanes", Table).ordered_columns]
        assert labels[3] == "OLDESTv" and labels[0] == "LANE "


async def test_a_filter_leaves_what_has_the_words_in_it_and_escape_ends_it() -> None:
    gate = Gate(TEAM)
    app = gate.top()
    async with app.run_test(size=(140, 40)) as pilot:
        await until_asked(pilot, gate, 1)
        await pilot.press("slash", *"DEEP")
        assert [row[0] for row in cells(app, "models")] == ["deep-coder"]
        assert [row[0] for row in cells(app, "lanes")] == ["deep-coder"]
        await pilot.press("enter")
        assert not app.query_one("#filter", Input).has_class("open") and "only 'DEEP'" in state_line(app)
        await pilot.press("escape")
        assert len(cells(app, "models")) == 2


async def test_the_chosen_row_stays_chosen_when_figures_change() -> None:
    later = replace(TEAM, at_ms=2_000, models=(replace(DEEP, waiting=5), SMALL, replace(SMALL, name="aaa")))
    gate = Gate(TEAM, later)
    app = gate.top()
    async with app.run_test(size=(140, 40)) as pilot:
        await until_asked(pilot, gate, 1)
        await pilot.press("down")
        assert app.query_one("#models", Table).chosen == "deep-coder"
        await pilot.press("r")
        await until_asked(pilot, gate, 2)
        assert app.query_one("#models", Table).chosen == "deep-coder"
        assert cells(app, "models")[-1][4] == "5/6"


async def test_foreign_words_command_no_terminal() -> None:
    """Those of a runtime in a cell, and those of whatever answers in its place in the first line."""
    gate = Gate(replace(TEAM, models=(replace(DEEP, state="cold", reason="\x1b]0;mine\x07"),)))
    app = gate.top()
    async with app.run_test(size=(140, 40)) as pilot:
        await until_asked(pilot, gate, 1)
        assert cells(app, "models")[0][7] == r"\x1b]0;mine\x07"
        gate.told = [Failed("the gateway says \x1b]52;c;aa\x07", 3)]
        await pilot.press("r")
        await until_asked(pilot, gate, 2)
        assert r"the gateway says \x1b]52;c;aa\x07" in state_line(app)


async def test_another_program_s_answer_is_no_empty_gateway() -> None:
    async def ask() -> dict[str, Any]:
        return {"models": [{"name": "llama3"}]}

    app = Top(ask, url="http://box:8400", every_s=3_600)
    async with app.run_test(size=(140, 40)) as pilot:
        while "asking" in state_line(app):
            await pilot.pause()
        assert "NO CONNECTION" in state_line(app) and "is no warmlane gateway" in state_line(app)


async def test_old_figures_are_called_stale_and_a_lost_connection_says_so() -> None:
    """The worst that a screen can do is to show yesterday as now."""
    gate = Gate(TEAM)
    app = Top(gate.ask, url="http://box:8400", every_s=0.5, clock=lambda: gate.now)
    async with app.run_test(size=(140, 40)) as pilot:
        await until_asked(pilot, gate, 1)
        gate.now += 60  # the gateway answers, and tells the same moment again
        await until_asked(pilot, gate, gate.asked + 1)
        assert "STALE: nothing new for 60s" in state_line(app) and app.query_one("#models").has_class("old")
        gate.told = [Failed("The gateway at http://box:8400 can't be reached.", 3)]
        await until_asked(pilot, gate, gate.asked + 1)
        line = state_line(app)
        assert "CONNECTION LOST, figures are 60s old" in line and "can't be reached" in line and "live" not in line
        assert app.query_one("#state").has_class("lost") and len(cells(app, "models")) == 2
        gate.told = [replace(TEAM, at_ms=9_000)]
        await until_asked(pilot, gate, gate.asked + 1)
        assert "live" in state_line(app) and not app.query_one("#models").has_class("old")


async def test_a_gateway_that_never_answered_is_no_empty_gateway() -> None:
    gate = Gate(TEAM)
    gate.told = [Failed("nobody answers", 3)]
    app = gate.top()
    async with app.run_test() as pilot:
        await until_asked(pilot, gate, 1)
        assert "NO CONNECTION" in state_line(app) and "nobody answers" in state_line(app)


async def test_q_ends_it() -> None:
    gate = Gate(TEAM)
    app = gate.top()
    async with app.run_test() as pilot:
        await until_asked(pilot, gate, 1)
        await pilot.press("q")
    assert app.return_code == 0


def test_every_column_sorts_both_ways() -> None:
    for make, columns in ((model_rows, MODELS), (lane_rows, LANES)):
        for sort in range(len(columns)):
            there = [row.name for row in make(TEAM, sort=sort, backwards=False, only="")]
            back = [row.name for row in make(TEAM, sort=sort, backwards=True, only="")]
            assert sorted(there) == sorted(back) == ["coder-small", "deep-coder"]
    assert [row.tone for row in lane_rows(TEAM, sort=0, backwards=False, only="")] == ["full", "late"]
    assert host_rows(replace(TEAM, hosts=()), sort=0, backwards=False, only="") == []
    assert "no host is alive" in summary(replace(TEAM, hosts=()))


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def without_textual(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "textual", None)
    monkeypatch.setitem(sys.modules, "textual.app", None)
    monkeypatch.delitem(sys.modules, "api.top", raising=False)
    yield


def test_without_textual_it_says_what_to_install(gateway: Gateway, without_textual: None) -> None:
    gateway("top").complains(2, "pip install 'warmlane[top]'", "gateway status --watch")


def test_it_needs_a_terminal(gateway: Gateway) -> None:
    gateway("top").complains(2, cli_top.NO_TERMINAL)


RUNS = JobStatus(
    id="01RUNS", caller="anna", state="streaming", tokens=120, submitted_at=2_000, first_token_at=2_800, host="gpu1",
    give_up_at=90_000,
)  # fmt: skip
WAITS = JobStatus(
    id="01WAITS", caller="ci-bot", state="queued", priority="batch", position=1, tokens=9_000, submitted_at=30_000,
    promote_at=45_000, give_up_at=600_000, first_token_in_ms=4_000,
)  # fmt: skip
LATE = JobStatus(state="queued", position=2, submitted_at=31_000, promote_at=38_500)


async def test_jobs_stand_there_with_their_age_their_place_and_what_comes_next() -> None:
    """Of somebody else's, one without a right to that sees neither the id nor the name."""
    deep, small = TEAM.lanes
    team = replace(TEAM, at_ms=40_000, lanes=(replace(deep, jobs=(RUNS, WAITS, LATE)), small))
    app = Gate(team).top()
    async with app.run_test(size=(160, 50)) as pilot:
        await pilot.pause()
        assert cells(app, "jobs") == [
            ["38s", "01RUNS", "anna", "deep-coder", "streaming", "on gpu1", "after 800ms", "-", "120"],
            ["10s", "01WAITS", "ci-bot", "deep-coder", "queued (batch)", "1.", "~14s", "moves in 5s", "9000"],
            ["9s", "-", "-", "deep-coder", "queued", "2.", "-", "moves, 2s late", "0"],
        ]
    rows = job_rows(team, sort=0, backwards=False, only="")
    assert [row.tone for row in rows] == ["warm", "waits", "late"] and len({row.name for row in rows}) == 3
    assert [row.cells[1] for row in job_rows(team, sort=0, backwards=False, only="CI-BOT")] == ["01WAITS"]
    due_first = next(at for at, column in enumerate(JOBS) if column.head == "UNLESS SERVED")
    assert [row.cells[1] for row in job_rows(team, sort=due_first, backwards=False, only="")] == [
        "-",
        "01WAITS",
        "01RUNS",
    ]
    gives_up = replace(WAITS, promote_at=0)
    (row,) = job_rows(replace(team, lanes=(replace(deep, jobs=(gives_up,)),)), sort=0, backwards=False, only="")
    assert row.cells[7] == "ends in 9m"
