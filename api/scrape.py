"""How a scraper asks for figures: which of the two texts that we speak its `Accept` prefers."""

from collections.abc import Iterable

_OPENMETRICS = "application/openmetrics-text"
_VERSIONS = frozenset({"", "1.0.0"})
_PLAIN = frozenset({"text/plain", "text/*", "*/*"})


def wants_openmetrics(accepts: Iterable[str]) -> bool:
    """Whether OpenMetrics 1.0.0 is asked for by name, and plain text not rather. What is no number counts as 0."""
    best, plain = 0.0, 0.0
    for part in ",".join(accepts).split(","):
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        told = dict(parameter.split("=", 1) for parameter in parameters if "=" in parameter)
        weight = _weight(told.get("q", "1"))
        if kind == _OPENMETRICS and told.get("version", "").strip('"') in _VERSIONS:
            best = max(best, weight)
        elif kind in _PLAIN:
            plain = max(plain, weight)
    return best > 0 and best >= plain


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0
