"""What the day's counters say of each model. Pure: the scripts wrote them, `status.usage_today` reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Today:
    """One model since midnight UTC.

    `prompt_tokens` were served by it, `cached_tokens` of them from its runtime's cache. `judged` are interactive jobs
    that asked for it and ended: their first token was in time if it came within the cold-start budget of the lane that
    they asked for (or the client's own, if sooner), counted from their start. `in_time_asked` had it in time from the
    model asked for, `in_time_any` from that one or another.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    judged: int = 0
    in_time_asked: int = 0
    in_time_any: int = 0


def by_model(usage: Mapping[str, int]) -> dict[str, Today]:
    """Sums the counters up by model."""
    found: dict[str, Today] = {}
    for field, value in usage.items():
        match field.split(":"):
            case ["tokens_in", _, model, cached]:
                was = found.get(model, Today())
                more = value if cached == "true" else 0
                found[model] = replace(
                    was, prompt_tokens=was.prompt_tokens + value, cached_tokens=was.cached_tokens + more
                )
            case ["first_token", model, how]:
                was = found.get(model, Today())
                found[model] = replace(
                    was,
                    judged=was.judged + value,
                    in_time_asked=was.in_time_asked + (value if how == "asked" else 0),
                    in_time_any=was.in_time_any + (value if how in ("asked", "other") else 0),
                )
    return found
