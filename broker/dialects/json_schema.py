"""Words in which the dialects say, as JSON schemas, what their readers take and what their answers are.

A `*_schema` page stands beside its reader, and a test holds the two together: what one refuses the other refuses. What
a schema cannot say (two values that must agree) its description does, and the reader alone refuses.
"""

from typing import Any

Schema = dict[str, Any]

REFS = "#/components/schemas/"


def ref(name: str) -> Schema:
    """Points at a named schema."""
    return {"$ref": REFS + name}


def any_value(words: str = "") -> Schema:
    """Takes everything: it is the runtime's to judge."""
    return {"description": words} if words else {}


def text(words: str = "", **more: Any) -> Schema:
    """A string."""
    return {"type": "string", **_said(words), **more}


def name(words: str) -> Schema:
    """A string that is not empty."""
    return text(words, minLength=1)


def flag(words: str = "") -> Schema:
    """True or false."""
    return {"type": "boolean", **_said(words)}


def whole(words: str = "", *, least: int | None = None, most: int | None = None) -> Schema:
    """A whole number, which is written without a fraction."""
    bounds = {key: bound for key, bound in (("minimum", least), ("maximum", most)) if bound is not None}
    return {"type": "integer", **_said(words), **bounds}


def number(words: str = "") -> Schema:
    """Any number."""
    return {"type": "number", **_said(words)}


def one_of(*values: Any, words: str = "") -> Schema:
    """One of these values."""
    return {"enum": list(values), **_said(words)}


def list_of(items: Schema, words: str = "", *, least: int = 0) -> Schema:
    """An array."""
    return {"type": "array", "items": items, **_said(words), **({"minItems": least} if least else {})}


def thing(required: dict[str, Schema], optional: dict[str, Schema] | None = None, words: str = "") -> Schema:
    """An object; keys beyond those named are allowed."""
    found: Schema = {"type": "object", **_said(words)}
    if required or optional:
        found["properties"] = {**required, **(optional or {})}
    return {**found, "required": list(required)} if required else found


def some(*choices: Schema, words: str = "") -> Schema:
    """Whatever one of these takes."""
    return {"anyOf": list(choices), **_said(words)}


def maybe(schema: Schema) -> Schema:
    """The same or null, which means as much as leaving it out."""
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    said = {"description": schema["description"]} if "description" in schema else {}
    return {"anyOf": [{key: value for key, value in schema.items() if key != "description"}, {"type": "null"}], **said}


def nothing(words: str = "") -> Schema:
    """Left out, or as good as left out."""
    return {"enum": [None, False, 0, "", [], {}], **_said(words)}


def _said(words: str) -> Schema:
    return {"description": words} if words else {}
