"""The text of `gateway tune`: YAML to be merged into a policy file, its reasons as comments. Made of what
`GET /v1/tune` told, and nothing else."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from api.terminal import text_of

WIDTH = 110

_KINDS = {
    "since": str, "until": str, "zone": str, "policy_version": int,
    "proposals": list, "fragment": dict, "advice": list, "unknown": list,
}  # fmt: skip


def is_tuning(told: Mapping[str, Any]) -> bool:
    """Whether this is what `GET /v1/tune` tells: another program may answer in JSON too."""
    return all(isinstance(told.get(name), kind) for name, kind in _KINDS.items())


def tune_text(told: Mapping[str, Any]) -> str:
    """Gives the proposals as a part of a policy file, each under its reason, and behind them what no number mends and
    what could not be judged."""
    days = f"{told['since']} to {told['until']}" if told["since"] != told["until"] else told["since"]
    head = (
        f"From {days} (days of {told['zone']}), for version {told['policy_version']} of the policy. Nothing is applied."
    )
    lines = list(_comment(head, ""))
    if not told["proposals"]:
        lines.append("# Nothing to propose.")
    lines += _mapping(told["fragment"], (), told["proposals"])
    for title, sentences in (("No number mends this:", told["advice"]), ("Not known:", told["unknown"])):
        if sentences:
            lines.append(f"# {title}")
        for sentence in sentences:
            lines += _comment(sentence, "", first="- ")
    return text_of(lines)


def _mapping(there: Mapping[str, Any], path: tuple[str, ...], proposals: list[Mapping[str, Any]]) -> Iterator[str]:
    indent = "  " * len(path)
    for name, value in there.items():
        here = (*path, name)
        found = [one for one in proposals if one["key"] == ".".join(here)]
        if name == "routing" and not path:
            yield "routing:"
            for one in found:
                yield from _comment(one["why"], "  ")
                yield f"  - match: {_plain(one['proposed']['match'])}"
                yield f"    target: {_plain(one['proposed']['target'])}"
        elif not found:
            yield f"{indent}{_plain(name)}:"
            yield from _mapping(value, here, proposals)
        elif isinstance(value, dict):
            yield f"{indent}{_plain(name)}:"
            yield from _comment(found[0]["why"], indent + "  ")
            yield from (f"{indent}  {key}: {_plain(said)}" for key, said in value.items())
        else:
            yield from _comment(found[0]["why"], indent)
            yield f"{indent}{name}: {_plain(value)}  # now {_plain(found[0]['now'])}"


def _comment(sentence: str, indent: str, *, first: str = "") -> list[str]:
    lead = f"{indent}# "
    later = lead + " " * len(first)
    words = " ".join(sentence.split())
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent=lead + first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain(value: Any) -> str:
    """A value on one line of YAML, in quotes where it needs them."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("...\n").strip()
