"""Adds a span's counters up, over callers, lanes, models or days, and tells them as plain data. Pure.

`asked` requests were `refused` or became jobs, which were counted when they ended: `done`, `failed`, `cancelled` or
`expired`. Under a model stand the jobs that asked for it, also those that another one served (`by_other`); tokens and
slot time stand under the model that served. Tokens are what clients are told of whole answers: the runtimes' own
figures, of one that several attempts made those of the whole. Of what failed or was cancelled nobody knows them, and
`untold` of the done jobs' runtimes told none. `queued_ms` is what jobs waited in lanes, also between attempts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from broker.figures import ENDS, By, Count
from broker.first_tokens import ERROR, percentile

BY = ("day", "caller", "lane", "model")
"""What usage can be told by, in the order in which it is told."""

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

_SERVED = frozenset({"tokens_in", "tokens_cached", "tokens_out", "running_ms"})
"""Figures of the model that served, where all others are of the one that was asked for."""


@dataclass
class Used:
    """The figures of one row."""

    counts: Counter[str] = field(default_factory=Counter)
    failed_by: Counter[str] = field(default_factory=Counter)
    refused_by: Counter[str] = field(default_factory=Counter)
    first_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, one: Count) -> None:
        """Adds a counter."""
        as_asked = one.by.model == one.by.asked_model
        self.counts[one.figure] += one.amount
        if one.figure == "failed":
            self.failed_by[one.detail] += one.amount
        elif one.figure == "refused":
            self.refused_by[one.detail] += one.amount
        elif one.figure == "done" and not as_asked:
            self.counts["by_other"] += one.amount
        if one.judged:
            self.counts["judged"] += one.amount
            self.counts[one.judged] += one.amount
            if one.judged != "no_token":
                self.first_tokens[one.first_token_ms] += one.amount
            if one.judged == "in_time" and as_asked:
                self.counts["in_time_asked"] += one.amount

    def as_json(self) -> dict[str, Any]:
        """Gives the row, always with the same keys in the same order."""
        n = self.counts
        return {
            "asked": sum(n[end] for end in ENDS) + n["refused"],
            **{name: n[name] for name in ("done", "failed", "cancelled", "expired", "refused")},
            "by_other": n["by_other"],
            "promotions": n["promoted"],
            **{name: n[name] for name in ("judged", "in_time", "in_time_asked")},
            "in_time_share": n["in_time"] / n["judged"] if n["judged"] else None,
            "in_time_asked_share": n["in_time_asked"] / n["judged"] if n["judged"] else None,
            **{f"first_token_{name}_ms": percentile(self.first_tokens, share) for name, share in SHARES.items()},
            **{name: n[name] for name in ("tokens_in", "tokens_cached", "tokens_out", "untold")},
            **{name: n[name] for name in ("queued_ms", "running_ms")},
            "failed_by": dict(sorted(self.failed_by.items())),
            "refused_by": dict(sorted(self.refused_by.items())),
        }


class Report:
    """What was used in some days, by some of `BY`; of one caller only, if `caller` is given."""

    def __init__(self, by: Sequence[str], *, caller: str | None = None) -> None:
        self.by = tuple(name for name in BY if name in by)
        self._caller = caller
        self._total = Used()
        self._rows: dict[tuple[str, ...], Used] = {}

    def count(self, day: date, one: Count) -> None:
        """Adds a counter of a day; none twice."""
        for used in self._rows_of(day, one.by, one.by.model if one.figure in _SERVED else one.by.asked_model):
            used.add(one)

    def as_json(self, first: date, last: date) -> dict[str, Any]:
        """Gives rows and total as plain data."""
        return {
            "since": first.isoformat(),
            "until": last.isoformat(),
            "zone": "UTC",
            "by": list(self.by),
            "caller": self._caller,
            "first_token_error": ERROR,
            "rows": [
                dict(zip(self.by, names, strict=True)) | self._rows[names].as_json() for names in sorted(self._rows)
            ],
            "total": self._total.as_json(),
        }

    def _rows_of(self, day: date, by: By, model: str) -> tuple[Used, ...]:
        if self._caller not in (None, by.caller):
            return ()
        names = {"day": day.isoformat(), "caller": by.caller, "lane": by.lane, "model": model}
        return self._rows.setdefault(tuple(names[name] for name in self.by), Used()), self._total
