"""The Anthropic dialect's list of models: what a client may ask for, page by page."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from broker.errors import BadRequest

LIMIT: Final = 20
LIMIT_MAX: Final = 1000
UNKNOWN_DATE: Final = "1970-01-01T00:00:00Z"
"""What this dialect says of a model whose release nobody knows."""


def model(name: str, *, display_name: str, context_tokens: int | None) -> dict[str, Any]:
    """Shows a name that can be asked for."""
    return {
        "type": "model",
        "id": name,
        "display_name": display_name,
        "created_at": UNKNOWN_DATE,
        "lifecycle": "active",
        "max_input_tokens": context_tokens,
    }


def page_of(names: Sequence[str], asked: Mapping[str, str]) -> tuple[list[str], bool]:
    """Gives the names of a page and whether there are more of them in its direction; raises BadRequest.

    `asked` are the words of the query: `limit`, and `after_id` or `before_id` with a name of another page.
    """
    limit, after, before = (asked.get(key, "") for key in ("limit", "after_id", "before_id"))
    size = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 5 else 0
    if limit and not 1 <= size <= LIMIT_MAX:
        raise BadRequest(f"limit must be a whole number from 1 to {LIMIT_MAX}", "limit")
    if after and before:
        raise BadRequest("after_id and before_id exclude each other", "before_id")
    size = size or LIMIT
    if before:
        end = _place(names, before, "before_id")
        start = max(0, end - size)
        return list(names[start:end]), start > 0
    start = _place(names, after, "after_id") + 1 if after else 0
    return list(names[start : start + size]), start + size < len(names)


def models_page(models: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Writes a page."""
    return {
        "data": models,
        "has_more": has_more,
        "first_id": models[0]["id"] if models else None,
        "last_id": models[-1]["id"] if models else None,
    }


def _place(names: Sequence[str], name: str, key: str) -> int:
    if name not in names:
        raise BadRequest(f"{key} names no model of the list", key)
    return names.index(name)
