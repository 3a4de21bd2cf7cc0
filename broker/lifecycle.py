"""A job's life: states, events, and the one table of transitions.

Lua gets its copy of the table from `as_lua`, ARCHITECTURE.md its diagram from `as_mermaid`; nobody keeps a second one.
"""

from enum import StrEnum


class State(StrEnum):
    """Where a job is. The hash field `state` holds exactly one of these words."""

    SCHEDULED = "scheduled"  # accepted, its start lies in the future; in no lane. release_due moves it on.
    QUEUED = "queued"  # waits in exactly one lane; a worker's claim moves it on.
    CLAIMED = "claimed"  # a worker holds it under a lease; the runtime has produced nothing yet.
    STREAMING = "streaming"  # the first token is in the log.
    DONE = "done"  # the runtime gave a finish reason. Kept for the keep time.
    FAILED = "failed"  # it ended with an error that its client was told. Kept for the keep time.
    CANCELLED = "cancelled"  # the caller did not want it any more. Kept for the keep time.
    EXPIRED = "expired"  # it waited until its give-up instant. Kept for the keep time.


class Event(StrEnum):
    """What moves a job. Each is one Lua verb, but for finish and fail, which are `end`."""

    RELEASE_DUE = "release_due"
    CLAIM = "claim"
    FIRST_TOKEN = "first_token"
    PROMOTE = "promote"
    RELEASE = "release"
    RECOVER = "recover"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"
    EXPIRE = "expire"


ENDED = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.EXPIRED})
LIVE = frozenset(State) - ENDED
IN_LANE = frozenset({State.QUEUED, State.CLAIMED, State.STREAMING})
HELD = frozenset({State.CLAIMED, State.STREAMING})

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.SCHEDULED: {
        Event.RELEASE_DUE: State.QUEUED,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.EXPIRED,
    },
    State.QUEUED: {
        Event.CLAIM: State.CLAIMED,
        Event.PROMOTE: State.QUEUED,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.EXPIRED,
    },
    State.CLAIMED: {
        Event.FIRST_TOKEN: State.STREAMING,
        Event.PROMOTE: State.QUEUED,
        Event.RELEASE: State.QUEUED,
        Event.RECOVER: State.QUEUED,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
    },
    State.STREAMING: {
        Event.FINISH: State.DONE,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
        Event.RELEASE: State.QUEUED,  # while unseen, or where the answer can be gone on from
        Event.RECOVER: State.QUEUED,  # the same
    },
}


def next_state(state: State, event: Event) -> State | None:
    """Gives the state that `event` leads to from `state`, or None where the table has no arrow."""
    return TRANSITIONS.get(state, {}).get(event)


def as_lua() -> str:
    """Prints the table as the Lua text that every verb includes."""
    rows = []
    for state, events in TRANSITIONS.items():
        arrows = ", ".join(f'{event.value} = "{to.value}"' for event, to in events.items())
        rows.append(f"  {state.value} = {{ {arrows} }},")
    ended = ", ".join(f"{state.value} = true" for state in sorted(ENDED))
    return "local TRANSITIONS = {\n" + "\n".join(rows) + "\n}\nlocal ENDED = { " + ended + " }\n"


def as_mermaid() -> str:
    """Prints the table as the diagram of ARCHITECTURE.md."""
    lines = ["stateDiagram-v2", "  [*] --> queued: submit", "  [*] --> scheduled: submit, starts later"]
    for state, events in TRANSITIONS.items():
        by_target: dict[State, list[str]] = {}
        for event, to in events.items():
            by_target.setdefault(to, []).append(event.value)
        lines += [f"  {state.value} --> {to.value}: {', '.join(names)}" for to, names in by_target.items()]
    lines += [f"  {state.value} --> [*]" for state in State if state in ENDED]
    return "\n".join(lines)
