"""What the day's counters say of each model, and of jobs that moved or were refused. Pure: the scripts wrote them,
`usage.today` reads them."""

from dataclasses import dataclass, field, replace

from broker.figures import Day, counts


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


def by_model(day: Day) -> dict[str, Today]:
    """Sums the day up by model."""
    found: dict[str, Today] = {}

    def add(model: str, **more: int) -> None:
        was = found.get(model, Today())
        found[model] = replace(was, **{name: getattr(was, name) + value for name, value in more.items()})

    for one in counts(day):
        if one.figure == "tokens_in":
            add(one.by.model, prompt_tokens=one.amount)
        elif one.figure == "tokens_cached":
            add(one.by.model, cached_tokens=one.amount)
        elif one.judged:
            in_time = one.amount if one.judged == "in_time" else 0
            asked = in_time if one.by.model == one.by.asked_model else 0
            add(one.by.asked_model, judged=one.amount, in_time_any=in_time, in_time_asked=asked)
    return found


@dataclass(frozen=True)
class Moves:
    """What was counted since midnight UTC: `promoted` by `<lane> <lane it went to>`, `refused` by `<lane> <code>`,
    `put_back` by lane. Who compares two of them sees what happened in between."""

    promoted: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    put_back: dict[str, int] = field(default_factory=dict)


def moves(day: Day) -> Moves:
    """Sums up what happened to jobs on the day, whoever's they were."""
    found = Moves()
    for one in counts(day):
        if one.figure == "promoted":
            _add(found.promoted, f"{one.by.lane} {one.detail}", one.amount)
        elif one.figure == "refused":
            _add(found.refused, f"{one.by.lane} {one.detail}", one.amount)
        elif one.figure == "put_back":
            _add(found.put_back, one.by.lane, one.amount)
    return found


def _add(sums: dict[str, int], name: str, amount: int) -> None:
    sums[name] = sums.get(name, 0) + amount
