"""Pictures of a policy as Mermaid text, drawn from the lanes that the policy really has: `python -m broker.pictures`.

docs/concepts.md prints them; so may anybody for their own file:
`python -m broker.pictures lanes policy.yaml`, `python -m broker.pictures instants policy.yaml`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from broker.errors import PolicyInvalid
from broker.policy import Lane, Policy


def lanes(policy: Policy) -> str:
    """Names, the lanes that they lead to, and where a job may go from there, up to its model.

    A dotted arrow is a move; one into a remote lane asks first whether the request may leave.
    """
    lines = ["flowchart LR"]
    for rule in policy.routing:
        if rule.match.lane and rule.match.lane not in policy.all_lanes():
            lines.append(f'  {_id("name", rule.match.lane)}(["{rule.match.lane}"]) --> {_id("lane", rule.target)}')
    for lane in policy.all_lanes().values():
        words = f"lane {lane.name}<br/>{lane.max_queue:,} may wait, {lane.priority}"
        lines.append(f'  {_id("lane", lane.name)}["{words}"] --> {_id("model", lane.model)}')
    for lane in policy.all_lanes().values():
        fallback = policy.lane(lane.fallback) if lane.fallback else None
        if fallback is not None:
            lines.append(f'  {_id("lane", lane.name)} -. "{_move(lane, fallback)}" .-> {_id("lane", fallback.name)}')
    for name, model in policy.models.items():
        slots = f"{model.max_concurrent} slot{'s'[: model.max_concurrent != 1]}"
        lines.append(f'  {_id("model", name)}[["model {name}<br/>{slots}, {model.trust}"]]')
    return "\n".join(lines)


def _move(lane: Lane, to: Lane) -> str:
    if to.trust == "remote" and lane.trust != "remote":
        return "full, and it may leave"
    return f"full, or not in time: {lane.cold_start_budget_ms / 1000:g} s"


def instants(policy: Policy, lane: Lane) -> str:
    """What happens to a job that waits in a lane, and when, counted from its submit."""
    told = [(0, "it enters the lane, and the model is woken if it is cold")]
    told.append((policy.header_hold_ms, "its stream gets its headers, and heartbeats from then on"))
    if lane.fallback is not None:
        told.append((lane.cold_start_budget_ms, f"not served yet: it moves to {lane.fallback}"))
    told.append((lane.max_wait_ms, "still not served: it is given up, and its client is told"))
    lines = ["timeline", f"  title A job that waits in lane {lane.name}"]
    return "\n".join(lines + [f"  {at_ms / 1000:g} s : {words.replace(':', ',')}" for at_ms, words in sorted(told)])


def _id(kind: str, name: str) -> str:
    """A name that Mermaid takes for a node."""
    return f"{kind}_{''.join(c if c.isalnum() else '_' for c in name)}"


KINDS: Final[dict[str, Callable[[Policy], str]]] = {
    "lanes": lanes,
    "instants": lambda policy: instants(policy, next(iter(policy.all_lanes().values()))),
}


def main() -> None:
    """Prints a picture of a policy file: its lanes, or the instants of its first lane."""
    words = sys.argv[1:]
    if len(words) != 2 or words[0] not in KINDS:
        sys.exit(f"usage: python -m broker.pictures {'|'.join(KINDS)} POLICY.YAML")
    try:
        policy = Policy.parse(Path(words[1]).read_text())
    except (PolicyInvalid, OSError) as error:
        sys.exit(str(error))
    print(KINDS[words[0]](policy))


if __name__ == "__main__":
    main()
