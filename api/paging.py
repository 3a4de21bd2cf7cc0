"""Pages of a list: how long they may be, and what OpenAI's clients read of their ends."""

from typing import Any

from broker import errors


def checked(limit: int, most: int) -> int:
    """How many may be listed at once; raises BadRequest."""
    if not 1 <= limit <= most:
        raise errors.BadRequest(f"limit must be 1 to {most}", "limit")
    return limit


def ends_of(page: list[dict[str, Any]]) -> dict[str, Any]:
    """The ids between which the next pages lie."""
    return {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
