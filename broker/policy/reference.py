"""The keys of a policy file as tables for people, made of the same JSON Schema that editors read: docs/policy.md."""

from typing import Any, Final

from broker.policy.policy import Policy

SECTIONS: Final[dict[str, tuple[str, str]]] = {
    "": ("The file", "What stands at the top level."),
    "Model": ("`models.NAME`", "One entry for each model, by the name that clients ask for."),
    "LaneEntry": (
        "`lanes.NAME`",
        "A line of its own, or changes to that of a model. What is left out is as its model has it.",
    ),
    "Rule": ("`routing`", "A list; the first rule that fits decides."),
    "Match": ("`routing[].match`", "What a request must be; every key that is given must fit."),
    "Remote": ("`remote`", "What of a request may leave the machine, if it may leave at all."),
    "Redaction": ("`remote.redact[]`", "What is replaced in the copy that leaves."),
    "RemoteOfModel": ("`models.NAME.remote`", "Only takes away from what `remote` allows."),
    "Webhooks": ("`webhooks`", "Where webhooks may go beside the public internet."),
}
"""A heading and a sentence for each part of the file, by the name of its model; the file itself has none."""

_MS: Final = (("day", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000))
_NAME: Final = "a-z0-9"
"""Names of models, lanes and redactions have a pattern that begins with these."""


def as_markdown() -> str:
    """One table for each part, with every key that it may have."""
    schema = Policy.json_schema()
    parts = {"": schema, **schema["$defs"]}
    assert parts.keys() == SECTIONS.keys(), "a part of the policy has no section in the reference"
    return "\n\n".join(_section(name, parts[name]) for name in SECTIONS)


def _section(name: str, part: dict[str, Any]) -> str:
    title, words = SECTIONS[name]
    required = part.get("required", ())
    rows = [_row(key, told, must=key in required) for key, told in part["properties"].items()]
    head = ["| key | type | default | meaning | bounds |", "|---|---|---|---|---|"]
    return "\n".join([f"### {title}", "", words, "", *head, *rows])


def _row(key: str, told: dict[str, Any], *, must: bool) -> str:
    default = "must be there" if must else _default(key, told)
    cells = [f"`{key}`", _type(told), default, told["description"], _bounds(key, told)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(key: str, told: dict[str, Any]) -> str:
    if told.get("default") is None:
        return ""
    return _figure(key, told["default"])


def _type(told: dict[str, Any]) -> str:
    """In words: `integer`, `name`, `list of text`, one of some words, or the part that stands there."""
    if "anyOf" in told:
        kinds = [_type(kind) for kind in told["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in told:
        return SECTIONS[told["$ref"].rpartition("/")[2]][0]
    if "enum" in told:
        words = [f"`{str(word).lower() if word is True or word is False else word}`" for word in told["enum"]]
        return ", ".join(words)
    if isinstance(told.get("type"), list):
        return " or ".join(_word(kind) for kind in told["type"])
    if told.get("type") == "array":
        return f"list of {_type(told['items'])}"
    if "patternProperties" in told:
        [entry] = told["patternProperties"].values()
        return f"{_type(entry)} by name"
    if told.get("type") == "string" and _NAME in told.get("pattern", ""):
        return "name"
    return _word(told.get("type", ""))


def _word(kind: str) -> str:
    return {"string": "text", "object": "options by name", "boolean": "`true`, `false`"}.get(kind, kind)


def _bounds(key: str, told: dict[str, Any]) -> str:
    """What the schema says of a value: the least, the most, how many, or which form."""
    for kind in told.get("anyOf", ()):
        found = _bounds(key, kind)
        if found:
            return found
    words = []
    if "exclusiveMinimum" in told:
        words.append(f"more than {told['exclusiveMinimum']}, up")
    elif "minimum" in told:
        words.append(f"from {_figure(key, told['minimum'])}")
    if "maximum" in told:
        words.append(f"to {_figure(key, told['maximum'])}")
    counts = (
        ("minProperties", "at least {}"),
        ("maxItems", "at most {}"),
        ("maxLength", "at most {} characters"),
        ("minLength", "not empty"),
    )
    words += [text.format(told[bound]) for bound, text in counts if bound in told]
    if told.get("type") == "string" and "pattern" in told and _NAME not in told["pattern"]:
        words.append(f"`{told['pattern']}`")
    return ", ".join(words).replace(", to ", " to ")


def _figure(key: str, value: Any) -> str:
    """As one writes it in the file, and an instant or length of milliseconds also as one says it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f"`{value}`"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if key.endswith("Ms") and value:
        unit, length = next(
            ((unit, length) for unit, length in _MS if value >= length and value % length == 0), ("", 1)
        )
        if unit:
            return f"{text} ({value // length} {unit}{'s' if unit == 'day' and value > length else ''})"
    return text
