"""`remote:`, what of a request may leave the machine, and what each remote model may get of it.

What is not allowed is refused, and a secret is refused whatever is allowed. A model's own `remote:` only takes away: no
model gets more than the file's.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.json_schema import WithJsonSchema

from broker.policy.part import Part

Kind = Literal["systemPrompts", "toolOutput", "fileContext", "images"]

MAX_BYTES = 20 * 1024 * 1024
"""No policy lets more leave than a request may hold at all."""

REDACTIONS_MAX = 50

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def _redaction_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("a redaction's name is 1 to 64 lower-case letters, digits, '.', '_' and '-'")
    return value


def _pattern(value: str) -> str:
    try:
        found = re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    if found.search("") is not None:
        raise ValueError("matches nothing at all, so it would be found everywhere")
    return value


Pattern = Annotated[str, Field(max_length=1000), AfterValidator(_pattern), WithJsonSchema({"type": "string"})]
RedactionName = Annotated[
    str, AfterValidator(_redaction_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"})
]


class Redaction(Part):
    """Something that is replaced in the copy that leaves."""

    name: RedactionName = Field(description="By what the audit record names it.")
    pattern: Pattern = Field(description="A regular expression (Python's) for what is replaced.")
    replacement: str = Field("[redacted]", max_length=200, description="What stands there instead, word for word.")


class Remote(Part):
    """What may go to remote models, for a request that may leave at all."""

    allow: list[Kind] = Field(
        default_factory=list,
        description="What may leave beside plain text: systemPrompts, toolOutput, fileContext, images.",
    )
    max_bytes: int = Field(
        262_144, ge=1, le=MAX_BYTES, description="A request with a longer body than this does not leave."
    )
    redact: list[Redaction] = Field(
        default_factory=list, max_length=REDACTIONS_MAX, description="What is replaced in the copy that leaves."
    )


class RemoteOfModel(Part):
    """What one remote model gets: at most what `remote:` allows."""

    allow: list[Kind] | None = Field(None, description="Of what `remote:` allows, only this goes to the model.")
    max_bytes: int | None = Field(None, ge=1, le=MAX_BYTES, description="A tighter bound than that of `remote:`.")


def narrowed(remote: Remote, model: RemoteOfModel | None) -> Remote:
    """What one model may get: both must allow it."""
    if model is None:
        return remote
    allow = remote.allow if model.allow is None else [kind for kind in remote.allow if kind in model.allow]
    limit = remote.max_bytes if model.max_bytes is None else min(remote.max_bytes, model.max_bytes)
    return remote.model_copy(update={"allow": allow, "max_bytes": limit})
