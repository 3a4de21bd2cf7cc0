"""What `promtool check metrics` and the OpenMetrics specification say of a page, as sentences; none of a clean one."""

import math
import re
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain

PREFIX = "gateway_"
EOF = "# EOF\n"

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_TYPES = {"counter", "gauge", "histogram", "summary"}
_OTHER_UNITS = set(
    "ms us ns millis milliseconds microseconds nanoseconds minutes hours days weeks kb mb gb kib mib gib kilobytes "
    "megabytes gigabytes bits percent percents millijoules celsius fahrenheit milli micro nano".split()
)
"""Prometheus' base units are seconds, bytes and ratios."""
_SUFFIXES = {
    "counter": {"_total"},
    "histogram": {"_bucket", "_count", "_sum"},
    "summary": {"_count", "_sum"},
    "gauge": {""},
}
_OURS_ALONE = {"total", "bucket", "count", "sum", "created"}
_TARGET_LABELS = {"job", "instance"}


def problems(page: str) -> list[str]:
    """Reads a page in either format and says what is wrong with it."""
    openmetrics = page.endswith(EOF)
    found = [f"the line {line!r} comes twice" for line, n in Counter(_series(page)).items() if n > 1]
    for word in ("HELP", "TYPE", "UNIT"):
        names = Counter(re.findall(rf"^# {word} (\S+)", page, re.MULTILINE))
        found += [f"{name} has {n} lines of {word}" for name, n in names.items() if n > 1]
    typed = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    helped = set(re.findall(r"^# HELP (\S+) \S", page, re.MULTILINE))
    found += [f"{name} has no help" for name in typed - helped]
    if not openmetrics:  # there the family's name is without it, and the parser sees to its samples
        counters = re.findall(r"^# TYPE (\S+) counter$", page, re.MULTILINE)
        found += [f"{name} is a counter and does not end in _total" for name in counters if not name.endswith("_total")]
    for family in (read_openmetrics if openmetrics else read_plain)(page):
        found += [f"{family.name}: {what}" for what in _of_family(family, openmetrics=openmetrics)]
    return found


def _series(page: str) -> list[str]:
    """Each sample's name and labels, as written."""
    lines = (line for line in page.splitlines() if line and not line.startswith("#"))
    return [re.split(r" [-+0-9.eInfNa]+( # .*)?$", line)[0] for line in lines]


def _of_family(family: Metric, *, openmetrics: bool) -> Iterator[str]:
    words = family.name.split("_")
    if not family.name.startswith(PREFIX) or not _NAME.fullmatch(family.name):
        yield "the name is not in snake case behind our prefix"
    if family.type not in _TYPES:
        yield f"the type is {family.type}"
        return
    if family.type in words:
        yield "the name holds the type"
    if words[-1] in _OURS_ALONE:
        yield f"the name ends in _{words[-1]}"
    if wrong := _OTHER_UNITS & set(words):
        yield f"the name holds a unit that is no base unit: {', '.join(wrong)}"
    if not family.documentation.endswith("."):
        yield "the help is no sentence"
    if openmetrics and family.unit and not family.name.endswith(f"_{family.unit}"):
        yield f"the unit {family.unit} is not in the name"
    if openmetrics and not family.unit and words[-1] in ("seconds", "bytes", "ratio"):
        yield "the unit is not declared"
    told_of = {frozenset(sample.labels) - {"le"} for sample in family.samples}
    if len(told_of) > 1:
        yield f"its samples have different labels: {told_of}"
    for sample in family.samples:
        if sample.name.removeprefix(family.name) not in _SUFFIXES[family.type]:
            yield f"{sample.name} is no sample of a {family.type}"
        if "le" in sample.labels and not sample.name.endswith("_bucket"):
            yield "le is the label of a bucket"
        if wrong := (set(sample.labels) - {"le"}) & (_TARGET_LABELS | {"quantile"}):
            yield f"Prometheus sets these labels itself: {wrong}"
        if any(not _NAME.fullmatch(label) for label in sample.labels):
            yield f"labels are in snake case: {sample.labels}"
        if not all(sample.labels.values()):
            yield f"an empty label is none: {sample.labels}"
        if math.isnan(sample.value) or (family.type != "gauge" and sample.value < 0):
            yield f"{sample.value} is no value of a {family.type}"
        if sample.exemplar is not None and not (openmetrics and sample.name.endswith("_bucket")):
            yield "exemplars belong to buckets"
    if family.type == "histogram":
        yield from _of_buckets(family)


def _of_buckets(family: Metric) -> Iterator[str]:
    by: dict[frozenset[tuple[str, str]], dict[str, list[tuple[float, float]]]] = {}
    for sample in family.samples:
        labels = frozenset((k, v) for k, v in sample.labels.items() if k != "le")
        part = sample.name.removeprefix(family.name)
        by.setdefault(labels, {}).setdefault(part, []).append((float(sample.labels.get("le", 0)), sample.value))
    for labels, parts in by.items():
        bounds = [bound for bound, _ in parts.get("_bucket", [])]
        counts = [count for _, count in parts.get("_bucket", [])]
        if not bounds or not math.isinf(bounds[-1]):
            yield f"no +Inf bucket: {dict(labels)}"
        elif bounds != sorted(set(bounds)) or counts != sorted(counts):
            yield f"the buckets do not rise: {dict(labels)}"
        elif "_sum" not in parts or [counts[-1]] != [count for _, count in parts.get("_count", [])]:
            yield f"sum or count is missing or wrong: {dict(labels)}"
