"""As much of Prometheus as its rules need: what it keeps of scraped pages, PromQL over that, and alerts with `for`.

Queries are read by `promql_parser`, a port of Prometheus' own grammar; what is evaluated here follows Prometheus 3 and
was held against the real one (`test_promql.py` says how). Anything that is not known here is an error, never a guess.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import promql_parser as ql
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain

LOOKBACK_S = 300.0
NAME = "__name__"

Labels = frozenset[tuple[str, str]]
Points = list[tuple[float, float | None]]
"""Instants and values, None = the series ended here."""
Vector = dict[Labels, float]
"""Samples by all of their labels, the name among them."""


class Unknown(Exception):
    """The query uses what is not evaluated here."""


class Scrapes:
    """The series of one target, as scraped pages filled them. Instants are seconds, and only grow."""

    def __init__(self, **target: str) -> None:
        self.target = target
        self.series: dict[str, dict[Labels, Points]] = {}  # by the name, for nobody asks without one
        self.instants: list[float] = []

    def add(self, at_s: float, page: str | None) -> None:
        """Takes a page, None = the target did not answer. A series that is no longer there ends at once."""
        found = {} if page is None else _samples(page)
        found[frozenset({(NAME, "up")})] = float(page is not None)
        now = {labels | frozenset(self.target.items()): value for labels, value in found.items()}
        assert not self.instants or at_s > self.instants[-1]
        self.instants.append(at_s)
        for series in self.series.values():
            for labels, points in series.items():
                if labels not in now and points[-1][1] is not None:
                    points.append((at_s, None))
        for labels, value in now.items():
            self._points(labels).append((at_s, value))

    def put(self, name: str, values: Iterable[float | None], *, every_s: float, **labels: str) -> None:
        """Writes a series by hand; None = there was no sample."""
        points = self._points(frozenset({(NAME, name), *labels.items()}))
        points += [(i * every_s, v) for i, v in enumerate(values) if v is not None]

    def _points(self, labels: Labels) -> Points:
        return self.series.setdefault(dict(labels)[NAME], {}).setdefault(labels, [])


def _samples(page: str) -> dict[Labels, float]:
    read = read_openmetrics if page.endswith("# EOF\n") else read_plain
    return {
        frozenset({(NAME, s.name), *s.labels.items()}): float(s.value) for family in read(page) for s in family.samples
    }


def evaluate(query: str, scrapes: Scrapes, *, at_s: float) -> Vector | float:
    """Gives the value of a query at an instant; raises ValueError for one that is no PromQL, Unknown."""
    return _Evaluation(scrapes, at_s).of(ql.parse(query))


def asked_in(query: str) -> dict[str, set[str]]:
    """The metrics that a query asks for, and by which of their labels it chooses; raises ValueError, and Unknown for
    one that is not asked for by its name."""
    found: dict[str, set[str]] = {}
    for selector in _selectors(ql.parse(query)):
        found.setdefault(selector.name, set()).update(matcher.name for matcher in selector.matchers.matchers)
    return found


def _selectors(node: Any) -> Iterator[Any]:
    match node:
        case ql.VectorSelector():
            if not node.name:
                raise Unknown(f"a selector without a name: {node}")
            yield node
        case ql.MatrixSelector():
            yield from _selectors(node.vector_selector)
        case ql.BinaryExpr():
            yield from (*_selectors(node.lhs), *_selectors(node.rhs))
        case ql.Call():
            for argument in node.args:
                yield from _selectors(argument)
        case ql.AggregateExpr() | ql.ParenExpr() | ql.UnaryExpr():
            yield from _selectors(node.expr)
        case ql.NumberLiteral() | ql.StringLiteral():
            return
        case _:
            raise Unknown(type(node).__name__)


@dataclass
class _Evaluation:
    scrapes: Scrapes
    at_s: float

    def of(self, node: Any) -> Vector | float:
        match node:
            case ql.NumberLiteral():
                return float(node.val)
            case ql.ParenExpr():
                return self.of(node.expr)
            case ql.UnaryExpr():
                found = self.of(node.expr)
                return -found if isinstance(found, float) else {_unnamed(k): -v for k, v in found.items()}
            case ql.VectorSelector():
                return self._instant(node)
            case ql.Call():
                return self._call(node.func.name, node.args)
            case ql.AggregateExpr():
                return self._aggregate(node)
            case ql.BinaryExpr():
                return self._binary(node)
        raise Unknown(type(node).__name__)

    # --- selectors ------------------------------------------------------------------------------------------------

    def _selected(self, node: Any) -> Iterator[tuple[Labels, Points]]:
        if not node.name or node.offset is not None or node.at is not None or node.matchers.or_matchers:
            raise Unknown(f"a selector without a name, or with a modifier: {node}")
        wanted = [_matcher(m) for m in node.matchers.matchers]
        for labels, points in self.scrapes.series.get(node.name, {}).items():
            if not wanted or all(fits(dict(labels)) for fits in wanted):
                yield labels, points

    def _instant(self, node: Any) -> Vector:
        found = {}
        for labels, points in self._selected(node):
            seen = [value for at, value in points if self.at_s - LOOKBACK_S < at <= self.at_s]
            if seen and seen[-1] is not None:
                found[labels] = seen[-1]
        return found

    def _range(self, node: Any) -> tuple[dict[Labels, list[tuple[float, float]]], float]:
        if not isinstance(node, ql.MatrixSelector):
            raise Unknown(f"no range: {node}")
        range_s = node.range.total_seconds()
        found = {}
        for labels, points in self._selected(node.vector_selector):
            seen = [(at, v) for at, v in points if self.at_s - range_s < at <= self.at_s and v is not None]
            if seen:
                found[labels] = seen
        return found, range_s

    # --- functions ------------------------------------------------------------------------------------------------

    def _call(self, name: str, args: list[Any]) -> Vector | float:
        if name in ("rate", "increase"):
            series, range_s = self._range(args[0])
            by = range_s if name == "rate" else 1.0
            start_s, end_s = self.at_s - range_s, self.at_s
            return {_unnamed(k): _risen(p, start_s, end_s, by) for k, p in series.items() if len(p) > 1}
        if name in _OVER_TIME:
            return {
                _unnamed(k): _OVER_TIME[name]([v for _, v in points]) for k, points in self._range(args[0])[0].items()
            }
        if name == "time":
            return float(self.at_s)
        if name == "vector":
            return {frozenset(): self._scalar(args[0])}
        if name == "absent":
            return {} if self._vector(args[0]) else {_equal_labels(args[0]): 1.0}
        if name == "histogram_quantile":
            return _quantiles(self._scalar(args[0]), self._vector(args[1]))
        if name in ("clamp_min", "clamp_max"):
            bound, pick = self._scalar(args[1]), max if name == "clamp_min" else min
            return {_unnamed(k): pick(v, bound) for k, v in self._vector(args[0]).items()}
        raise Unknown(f"the function {name}")

    def _scalar(self, node: Any) -> float:
        found = self.of(node)
        if not isinstance(found, float):
            raise Unknown(f"no number: {node}")
        return found

    def _vector(self, node: Any) -> Vector:
        found = self.of(node)
        if isinstance(found, float):
            raise Unknown(f"no vector: {node}")
        return found

    # --- aggregation ----------------------------------------------------------------------------------------------

    def _aggregate(self, node: Any) -> Vector:
        groups: dict[Labels, Vector] = {}
        for labels, value in self._vector(node.expr).items():
            groups.setdefault(_group_of(labels, node.modifier), {})[labels] = value
        op = str(node.op)
        if op in ("topk", "bottomk"):
            most = int(self._scalar(node.param))
            ranked = (sorted(group.items(), key=lambda kv: kv[1], reverse=op == "topk") for group in groups.values())
            return dict(pair for group in ranked for pair in group[:most])
        if op not in _AGGREGATES:
            raise Unknown(f"the aggregation {op}")
        return {labels: _AGGREGATES[op](list(group.values())) for labels, group in groups.items()}

    # --- operators ------------------------------------------------------------------------------------------------

    def _binary(self, node: Any) -> Vector | float:
        op, left, right = str(node.op), self.of(node.lhs), self.of(node.rhs)
        modifier = node.modifier
        as_bool = modifier is not None and modifier.return_bool
        if op in ("and", "or", "unless"):
            if isinstance(left, float) or isinstance(right, float):
                raise Unknown(f"{op} of numbers")
            return _set_operation(op, left, right, _key_of(modifier))
        calculate = _OPERATORS.get(op)
        if calculate is None:
            raise Unknown(f"the operator {op}")
        if isinstance(left, float) and isinstance(right, float):
            return float(calculate(left, right))
        if isinstance(left, float) or isinstance(right, float):
            vector = right if isinstance(left, float) else left
            assert isinstance(vector, dict)
            found: Vector = {}
            for labels, value in vector.items():
                pair = (left, value) if isinstance(left, float) else (value, right)
                _keep(found, labels, labels, op, calculate(*pair), value, as_bool=as_bool)
            return found
        return _matched(op, left, right, modifier, as_bool=as_bool)


def _matched(op: str, left: Vector, right: Vector, modifier: Any, *, as_bool: bool) -> Vector:
    """Pairs the samples of two vectors: one with one, or with `group_left` many with one."""
    card = "OneToOne" if modifier is None else str(modifier.card).rpartition(".")[2]
    if card not in ("OneToOne", "ManyToOne"):
        raise Unknown(card)
    key, calculate = _key_of(modifier), _OPERATORS[op]
    ones: dict[Labels, tuple[Labels, float]] = {}
    for labels, value in right.items():
        assert key(labels) not in ones, f"many-to-many matching of {op}: {sorted(labels)}"
        ones[key(labels)] = labels, value
    found: Vector = {}
    for labels, value in left.items():
        if key(labels) not in ones:
            continue
        other, there = ones[key(labels)]
        if card == "OneToOne":
            names = _matching(modifier)
            told = labels if names is None else key(labels) if names[0] else _without(labels, names[1])
        else:
            extra = {pair for pair in other if pair[0] in (modifier.group_labels or [])}
            told = _without(labels, [name for name, _ in extra]) | extra
        before = len(found)
        kept = _keep(found, labels, told, op, calculate(value, there), value, as_bool=as_bool)
        assert not kept or len(found) > before, f"two samples of {op} have the same labels: {sorted(told)}"
    return found


def _keep(
    found: Vector, labels: Labels, told: Labels, op: str, result: float | bool, value: float, *, as_bool: bool
) -> bool:
    """Adds what an operator makes of one sample: a comparison keeps the sample or drops it."""
    if op in _COMPARISONS and not as_bool:
        if result:
            found[told] = value
        return bool(result)
    found[_unnamed(told)] = float(result)
    return True


def _set_operation(op: str, left: Vector, right: Vector, key: Callable[[Labels], Labels]) -> Vector:
    if op == "or":
        there = {key(labels) for labels in left}
        return left | {labels: value for labels, value in right.items() if key(labels) not in there}
    there = {key(labels) for labels in right}
    return {labels: value for labels, value in left.items() if (key(labels) in there) == (op == "and")}


def _matching(modifier: Any) -> tuple[bool, list[str]] | None:
    """Whether labels are matched on (else ignored), and which."""
    told = None if modifier is None else modifier.matching
    return None if told is None else (str(told.type).endswith("Include"), list(told.labels))


def _key_of(modifier: Any) -> Callable[[Labels], Labels]:
    told = _matching(modifier)
    if told is None:
        return _unnamed
    on, names = told
    if on:
        return lambda labels: frozenset(pair for pair in labels if pair[0] in names)
    return lambda labels: _without(labels, [NAME, *names])


def _group_of(labels: Labels, modifier: Any) -> Labels:
    if modifier is None:
        return frozenset()
    names = list(modifier.labels)
    if str(modifier.type).endswith("By"):
        return frozenset(pair for pair in labels if pair[0] in names)
    return _without(labels, [NAME, *names])


def _without(labels: Labels, names: Iterable[str]) -> Labels:
    return frozenset(pair for pair in labels if pair[0] not in names)


def _unnamed(labels: Labels) -> Labels:
    return _without(labels, [NAME])


def _matcher(matcher: Any) -> Callable[[dict[str, str]], bool]:
    name, value, op = matcher.name, matcher.value, str(matcher.op).rpartition(".")[2]
    if op in ("Equal", "NotEqual"):
        return lambda told: (told.get(name, "") == value) == (op == "Equal")
    if op in ("Re", "NotRe"):
        pattern = re.compile(value)
        return lambda told: bool(pattern.fullmatch(told.get(name, ""))) == (op == "Re")
    raise Unknown(f"the matcher {op}")


def _equal_labels(node: Any) -> Labels:
    if not isinstance(node, ql.VectorSelector):
        return frozenset()
    return frozenset(
        (m.name, m.value) for m in node.matchers.matchers if str(m.op).endswith(".Equal") and m.name != NAME
    )


def _risen(points: list[tuple[float, float]], start_s: float, end_s: float, by: float) -> float:
    """What a counter has risen in a range, extrapolated to its ends and divided, in the order of Prometheus' steps."""
    values = [value for _, value in points]
    risen = values[-1] - values[0] + sum(a for a, b in pairwise(values) if b < a)
    first, last = points[0][0], points[-1][0]
    sampled = last - first
    average = sampled / (len(points) - 1)
    to_start, to_end = first - start_s, end_s - last
    if to_start >= average * 1.1:
        to_start = average / 2
    if risen > 0 and values[0] >= 0:
        to_start = min(to_start, sampled * values[0] / risen)
    if to_end >= average * 1.1:
        to_end = average / 2
    return risen * ((sampled + to_start + to_end) / sampled / by)


def _quantiles(share: float, buckets: Vector) -> Vector:
    by: dict[Labels, list[tuple[float, float]]] = {}
    for labels, value in buckets.items():
        bound = dict(labels).get("le")
        if bound is not None:
            by.setdefault(_without(labels, [NAME, "le"]), []).append((float(bound), value))
    return {labels: _quantile(share, sorted(told)) for labels, told in by.items()}


def _quantile(share: float, buckets: list[tuple[float, float]]) -> float:
    if not 0 <= share <= 1:
        raise Unknown(f"the quantile {share}")
    if not math.isinf(buckets[-1][0]) or len(buckets) < 2 or not buckets[-1][1]:
        return math.nan
    rank = share * buckets[-1][1]
    at = next(i for i, (_, count) in enumerate(buckets) if count >= rank)
    if at == len(buckets) - 1:
        return buckets[-2][0]
    bound, count = buckets[at]
    if at == 0 and bound <= 0:
        return bound
    start, before = buckets[at - 1] if at else (0.0, 0.0)
    return start + (bound - start) * (rank - before) / (count - before)


_COMPARISONS = {"==", "!=", ">", "<", ">=", "<="}
_OPERATORS: dict[str, Callable[[float, float], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else math.nan if not a or math.isnan(a) else math.copysign(math.inf, a),
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}
_AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "sum": math.fsum,
    "min": min,
    "max": max,
    "avg": lambda values: math.fsum(values) / len(values),
    "count": lambda values: float(len(values)),
}
_OVER_TIME: dict[str, Callable[[list[float]], float]] = {
    "max_over_time": max,
    "min_over_time": min,
    "sum_over_time": math.fsum,
    "avg_over_time": lambda values: math.fsum(values) / len(values),
    "count_over_time": lambda values: float(len(values)),
    "changes": lambda values: float(sum(a != b for a, b in pairwise(values))),
}


# --- rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One alert of a rule file."""

    alert: str
    expr: str
    for_s: float
    labels: dict[str, str]
    annotations: dict[str, str]

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Rule":
        """Takes it out of the parsed YAML; a key that Prometheus does not know is an error."""
        assert told.keys() <= {"alert", "expr", "for", "labels", "annotations"}, told
        for_s = ql.parse_duration(told["for"]).total_seconds() if "for" in told else 0.0
        return cls(told["alert"], told["expr"], for_s, told.get("labels", {}), told.get("annotations", {}))


@dataclass
class Alerts:
    """How one rule goes over time: evaluated at instants in order, as Prometheus does at its interval."""

    rule: Rule
    since: dict[Labels, float] = field(default_factory=dict)

    def look(self, scrapes: Scrapes, *, at_s: float) -> dict[Labels, str]:
        """Evaluates it; gives `pending` or `firing` by the labels of what is wrong."""
        found = evaluate(self.rule.expr, scrapes, at_s=at_s)
        assert isinstance(found, dict), f"{self.rule.alert}: an alert's expression gives a vector"
        active = {_unnamed(labels) for labels in found}
        assert len(active) == len(found), f"{self.rule.alert}: two alerts with the same labels"
        self.since = {labels: self.since.get(labels, at_s) for labels in active}
        return {labels: "firing" if at_s - at >= self.rule.for_s else "pending" for labels, at in self.since.items()}


def firing(rule: Rule, scrapes: Scrapes, *, every_s: float) -> list[dict[str, str]]:
    """What of a rule has fired by the last scrape, evaluated from the first on."""
    alerts, states = Alerts(rule), {}
    at_s, end_s = scrapes.instants[0], scrapes.instants[-1]
    while at_s <= end_s:
        states = alerts.look(scrapes, at_s=at_s)
        at_s += every_s
    return [dict(labels) for labels, state in states.items() if state == "firing"]
