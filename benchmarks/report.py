"""Turns the rounds' figures into the table of budgets: medians over the rounds, ratios of medians."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Round = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """One line of the table: a ratio or a figure, how it is had, and its two limits."""

    figure: str
    value: Callable[["Medians"], float]
    must: float
    stretch: float
    at_least: bool = False
    unit: str = "x"

    def verdict(self, value: float) -> str:
        """`stretch`, `ok` or `NOT`."""
        for word, limit in (("stretch", self.stretch), ("ok", self.must)):
            if (value >= limit) if self.at_least else (value <= limit):
                return word
        return "NOT"


class NotMeasured(Exception):
    """A figure that this run doesn't have."""


class Medians:
    """Looks a figure up in every round and gives the median."""

    def __init__(self, rounds: list[Round]) -> None:
        self._rounds = rounds

    def __call__(self, path: str) -> float:
        """`path` is rival.group.…, as in the JSON file."""
        found = [v for r in self._rounds if (v := _look(r, path.split("."))) is not None]
        if not found:
            raise NotMeasured(path)
        return statistics.median(found)

    def added(self, rival: str, case: str, point: str) -> float:
        """What a rival adds to the first token of a direct call."""
        name = f"first-token.{case}.first.{point}"
        return max(self(f"{rival}.{name}") - self(f"direct.{name}"), 0.1)

    def worst(self, path: str) -> float:
        """The smallest over the rounds: for what must hold in every one."""
        found = [v for r in self._rounds if (v := _look(r, path.split("."))) is not None]
        if not found:
            raise NotMeasured(path)
        return min(found)


def _look(tree: Any, path: list[str]) -> float | None:
    for step in path:
        if not isinstance(tree, dict) or step not in tree:
            return None
        tree = tree[step]
    return float(tree) if isinstance(tree, int | float) else None


def _litellm_ratio(case: str, point: str) -> Callable[[Medians], float]:
    return lambda m: m.added("litellm", case, point) / m.added("warmlane", case, point)


def _pings(case: str) -> Callable[[Medians], float]:
    return lambda m: m.added("warmlane", case, "p50") / m(f"ping.{case}.p50")


def _share(path: str, of: str) -> Callable[[Medians], float]:
    return lambda m: m(f"warmlane.{path}") / max(m(f"{of}.{path}"), 1e-9)


CHUNKS = "flat.streams.chunks_per_s"

BUDGETS = [
    Budget("added first token p50 hot ÷ PING hot", _pings("hot"), 30, 20),
    Budget("added first token p50 idle ÷ PING idle", _pings("idle"), 13, 10),
    Budget("LiteLLM's added first token ÷ ours, p50 hot", _litellm_ratio("hot", "p50"), 20, 34, True),
    Budget("LiteLLM's added first token ÷ ours, p99 hot", _litellm_ratio("hot", "p99"), 20, 37, True),
    Budget("LiteLLM's added first token ÷ ours, p50 idle", _litellm_ratio("idle", "p50"), 6, 10, True),
    Budget("probe beside 16 x 50 tok/s: p99 ÷ p50",
           lambda m: m("warmlane.load.probe_16.first.p99") / m("warmlane.load.probe_16.first.p50"), 3, 2),
    Budget("probe beside 16 x 50 tok/s: LiteLLM's p99 ÷ ours",
           lambda m: m("litellm.load.probe_16.first.p99") / m("warmlane.load.probe_16.first.p99"), 50, 100, True),
    Budget("probe beside 64 x 50 tok/s: p99 ÷ its p99 alone",
           lambda m: m("warmlane.load.probe_64.first.p99") / m("warmlane.load.alone.first.p99"), 4, 2.5),
    Budget("chunks/s flat out, 64 streams: share of direct", _share(CHUNKS, "direct"), 0.40, 0.60, True),
    Budget("chunks/s flat out, 64 streams: times LiteLLM's", _share(CHUNKS, "litellm"), 50, 85, True),
    Budget("CPU per token flat out ÷ nginx", _share("flat.cpu_us", "nginx"), 5.5, 3.8),
    Budget("CPU per token, 64 x 50 tok/s ÷ nginx", _share("load.cpu_64_us", "nginx"), 5.5, 3.8),
    Budget("non-streaming req/s, 16 at once: times LiteLLM's", _share("plain.answers.per_s", "litellm"), 60, 100, True),
    Budget("non-streaming req/s, 16 at once: share of nginx", _share("plain.answers.per_s", "nginx"), 0.13, 0.22, True),
    Budget("submit → claimed, idle warm lane, p99", lambda m: m("warmlane.claim.p99") / 1e3, 1, 0.5, unit=" ms"),
    Budget("refusal when full, p99 at 500/s", lambda m: m("warmlane.refusal.total.p99") / 1e3, 10, 3, unit=" ms"),
    Budget("promotion lateness p99, 1,000 waiting", lambda m: m("broker.lateness_ms.p99"), 20, 5, unit=" ms"),
    Budget("submit: 10 → 10,000 waiting", lambda m: m("broker.growth.submit"), 1.5, 1.1),
    Budget("choose + claim: 10 → 10,000 waiting", lambda m: m("broker.growth.claim"), 1.5, 1.1),
    Budget("promote: 10 → 10,000 waiting", lambda m: m("broker.growth.promote"), 1.5, 1.1),
    Budget("8 clients that stop reading: others' first token p50",
           lambda m: m("warmlane.stalled.stopped.first.p50") / m("warmlane.stalled.reading.first.p50"), 1.3, 1.05),
    Budget("replay log equals the client's bytes (worst round)",
           lambda m: m.worst("warmlane.replay.equal") / m("warmlane.replay.streams"), 1, 1, True, unit=" of all"),
    Budget("memory of the replay log ÷ payload", lambda m: m("warmlane.replay.memory_ratio"), 1.3, 1.23),
    Budget("RSS: LiteLLM ÷ (api + worker)",
           lambda m: m("litellm.memory.all") / (m("warmlane.memory.api") + m("warmlane.memory.worker")),
           3.5, 5.5, True),
]  # fmt: skip


def budget_lines(rounds: list[Round]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Gives the table's lines, and the same for the JSON file."""
    medians = Medians(rounds)
    lines = [f"{'figure':<54} {'measured':>12} {'must':>9} {'stretch':>9}  verdict"]
    rows: dict[str, dict[str, Any]] = {}
    for b in BUDGETS:
        sign = "≥" if b.at_least else "≤"
        try:
            value = b.value(medians)
            shown, verdict = f"{value:.2f}{b.unit}", b.verdict(value)
            rows[b.figure] = {"value": value, "must": b.must, "stretch": b.stretch, "verdict": verdict}
        except NotMeasured:
            shown, verdict = "-", "not measured"
        lines.append(f"{b.figure:<54} {shown:>12} {sign + f'{b.must:g}':>9} {sign + f'{b.stretch:g}':>9}  {verdict}")
    return lines, rows


# What is shown of each rival beside the budgets: name, path, divided by, unit.
SHOWN = [
    ("first token hot p50", "first-token.hot.first.p50", 1, "µs"),
    ("first token hot p99", "first-token.hot.first.p99", 1, "µs"),
    ("first token idle p50", "first-token.idle.first.p50", 1, "µs"),
    ("first token idle p99", "first-token.idle.first.p99", 1, "µs"),
    ("probe alone p50", "load.alone.first.p50", 1, "µs"),
    ("probe alone p99", "load.alone.first.p99", 1, "µs"),
    ("probe beside 16 x 50 tok/s p50", "load.probe_16.first.p50", 1, "µs"),
    ("probe beside 16 x 50 tok/s p99", "load.probe_16.first.p99", 1, "µs"),
    ("probe beside 64 x 50 tok/s p50", "load.probe_64.first.p50", 1, "µs"),
    ("probe beside 64 x 50 tok/s p99", "load.probe_64.first.p99", 1, "µs"),
    ("the 64 streams' own first token p50", "load.streams_64.first.p50", 1, "µs"),
    ("the 64 streams' own first token p99", "load.streams_64.first.p99", 1, "µs"),
    ("a token's way beside 64 x 50 tok/s p50", "load.streams_64.token.p50", 1, "µs"),
    ("tokens of 64 x 50 tok/s delivered", "load.delivered_64", 0.01, "%"),
    ("CPU per token, 64 x 50 tok/s", "load.cpu_64_us", 1, "µs"),
    ("chunks/s flat out, 64 streams", "flat.streams.chunks_per_s", 1000, "k"),
    ("CPU per token flat out", "flat.cpu_us", 1, "µs"),
    ("non-streaming req/s, 16 at once", "plain.answers.per_s", 1000, "k"),
    ("resident memory, all processes", "memory.all", 1, "MB"),
]


def rival_lines(rounds: list[Round], rivals: list[str]) -> list[str]:
    """Gives the medians of every rival side by side."""
    medians = Medians(rounds)
    lines = [f"{'medians of the rounds':<42} {'':>3}" + "".join(f"{name:>12}" for name in rivals)]
    for name, path, divisor, unit in SHOWN:
        cells = []
        for rival in rivals:
            try:
                cells.append(_number(medians(f"{rival}.{path}") / divisor))
            except NotMeasured:
                cells.append("-")
        lines.append(f"{name:<42} {unit:>3}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
