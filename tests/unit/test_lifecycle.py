"""The one table of a job's life, and its two printed copies."""

import re

import pytest
from lupa import lua51

from broker.lifecycle import ENDED, HELD, IN_LANE, LIVE, TRANSITIONS, Event, State, as_lua, as_mermaid, next_state

# The table of the design, arrow by arrow: a change of the code must be a change here, made on purpose.
ARROWS = """
scheduled release_due queued | scheduled cancel cancelled | scheduled expire expired
queued claim claimed | queued promote queued | queued cancel cancelled | queued expire expired
claimed first_token streaming | claimed promote queued | claimed release queued | claimed recover queued
claimed fail failed | claimed cancel cancelled
streaming finish done | streaming fail failed | streaming cancel cancelled
streaming release queued | streaming recover queued
"""


def arrows() -> set[tuple[State, Event, State]]:
    found = set()
    for arrow in re.split(r"[|\n]", ARROWS.strip()):
        state, event, to = arrow.split()
        found.add((State(state), Event(event), State(to)))
    return found


def test_the_table_has_these_arrows_and_no_other() -> None:
    assert {(s, e, to) for s, row in TRANSITIONS.items() for e, to in row.items()} == arrows()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_pair_is_an_arrow_or_refused(state: State, event: Event) -> None:
    expected = {(s, e): to for s, e, to in arrows()}.get((state, event))
    assert next_state(state, event) is expected


def test_every_state_is_reached_and_every_live_one_can_end() -> None:
    reached = {State.QUEUED, State.SCHEDULED}
    while more := {to for s in reached for to in TRANSITIONS.get(s, {}).values()} - reached:
        reached |= more
    assert reached == set(State)
    for state in LIVE:
        ways = {state}
        while more := {to for s in ways for to in TRANSITIONS.get(s, {}).values()} - ways:
            ways |= more
        assert ways & ENDED, f"{state} never ends"


def test_the_groups_of_states() -> None:
    assert ENDED | LIVE == set(State) and not ENDED & LIVE
    assert set(TRANSITIONS) == LIVE
    assert HELD < IN_LANE < LIVE and State.SCHEDULED not in IN_LANE
    assert {e for row in TRANSITIONS.values() for e in row} == set(Event), "an event that no state knows"


def test_lua_gets_the_same_table() -> None:
    lua = lua51.LuaRuntime()
    table, ended = lua.execute(as_lua() + "return TRANSITIONS, ENDED")
    assert {(State(s), Event(e), State(to)) for s, row in table.items() for e, to in row.items()} == arrows()
    assert {State(s) for s in ended.keys()} == ENDED


def test_the_diagram_shows_every_arrow() -> None:
    lines = as_mermaid().split("\n")
    assert lines[0] == "stateDiagram-v2"
    drawn = set()
    for line in lines[1:]:
        match = re.fullmatch(r"  (\S+) --> (\S+?)(?:: (.+))?", line)
        assert match, line
        if "[*]" not in match.group(1) and "[*]" not in match.group(2):
            drawn |= {(State(match[1]), Event(e), State(match[2])) for e in match[3].split(", ")}
    assert drawn == arrows()
    assert {line.split()[0] for line in lines if line.endswith("--> [*]")} == {s.value for s in ENDED}
    assert [line.split()[2] for line in lines if line.startswith("  [*]")] == ["queued:", "scheduled:"]
