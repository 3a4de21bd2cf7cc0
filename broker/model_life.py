"""A model's life on a host: its states, and what leads from one to another. One table.

The worker's waker moves it; docs/concepts.md has its picture from `as_mermaid`, `/metrics` its states.
"""

from typing import Final

STATES: Final[dict[str, str]] = {
    "warm": "it has given a first token, and takes jobs",
    "degraded": "it is loaded, and its first tokens are slow: batch work only, people's jobs go elsewhere",
    "waking": "it is loaded and tried, under a lock that one host has at a time",
    "unloading": "its memory is given back; it takes no job any more",
    "cold": "it is not in memory",
    "quarantined": "it failed, and is left alone for a while, with a reason",
    "absent": "no live host may serve it",
}

ARROWS: Final[dict[str, dict[str, str]]] = {
    "cold": {"waking": "somebody asks, or it is kept warm", "quarantined": "it failed elsewhere, or never finds room"},
    "waking": {
        "warm": "its first token came",
        "degraded": "its first token was slow",
        "quarantined": "it failed to load",
        "cold": "no room now, or the lock was lost",
    },
    "warm": {
        "degraded": "two slow first tokens",
        "unloading": "idle, evicted, or by hand",
        "cold": "its runtime is gone",
        "quarantined": "its runtime refuses us",
    },
    "degraded": {
        "warm": "a quick first token",
        "unloading": "idle, evicted, or by hand",
        "cold": "its runtime is gone",
        "quarantined": "its runtime refuses us",
    },
    "unloading": {"cold": "the memory is back", "quarantined": "its runtime broke"},
    "quarantined": {"waking": "the pause is over", "cold": "nobody wants it any more"},
}
"""From a state to others, with why. *absent* is nobody's state: there is no host to have it."""


def as_mermaid() -> str:
    """The picture of the table."""
    lines = ["stateDiagram-v2", "  [*] --> cold"]
    lines += [f"  {state} --> {to}: {why}" for state, arrows in ARROWS.items() for to, why in arrows.items()]
    return "\n".join(lines)


def as_markdown() -> str:
    """The states and what they say, for people."""
    return "\n".join(["| state | it says |", "|---|---|", *(f"| *{state}* | {why} |" for state, why in STATES.items())])
