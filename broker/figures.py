"""What is counted of jobs, and by whom and what: the grammar of a day's counters, for their readers.

Each caller, lane, model asked for and model that served has a hash of its own for each day. A job that ended: `done`,
`cancelled`, `expired` or `failed/<code>`, and behind it, where its first token was judged, `/in_time/<ms>` or
`/late/<ms>` (a bucket of `first_tokens`) or `/no_token`. `tokens_in` (and `tokens_cached` of them), `tokens_out`;
`untold`, a done job whose runtime told no tokens; `queued_ms`, `running_ms`. A move: `promoted/<lane>`, `released`,
`put_back` (for interactive work), `recovered/queued`, `recovered/continued` (its answer is gone on from),
`recovered/failed`. A refused request: `refused/<code>`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

NOBODY = "-"
"""Stands where a refused request had no caller, no lane or no model that we know. No key has this name."""

ENDS = frozenset({"done", "cancelled", "expired", "failed"})


@dataclass(frozen=True)
class By:
    """Under which names something is counted."""

    caller: str
    lane: str
    asked_model: str
    model: str

    @property
    def spelled(self) -> str:
        """As it stands in the name of a key."""
        return f"{self.caller}:{self.lane}:{self.asked_model}:{self.model}"

    @classmethod
    def read(cls, spelled: bytes) -> "By | None":
        """Reads what `spelled` gave; None for anything else, such as the counters of an older version."""
        names = spelled.decode().rsplit(":", 3)
        return cls(*names) if len(names) == 4 else None


Day = Iterable[tuple[By, Mapping[bytes, bytes]]]
"""The hashes of a day."""


@dataclass(frozen=True)
class Count:
    """One counter: what it counts, in which detail (a code, a lane), how much; and how the first token was judged, and
    the bucket of its time, 0 = there was none or nobody judged."""

    by: By
    figure: str
    amount: int
    detail: str = ""
    judged: str = ""
    first_token_ms: int = 0


def counts(day: Day) -> Iterator[Count]:
    """Reads the counters of a day."""
    for by, figures in day:
        for field, value in figures.items():
            figure, *more = field.decode().split("/")
            detail = more.pop(0) if more and (figure == "failed" or figure not in ENDS) else ""
            judged, bound = more[0] if more else "", int(more[1]) if len(more) > 1 else 0
            yield Count(by, figure, int(value), detail, judged, bound)
