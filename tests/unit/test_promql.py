"""The evaluator of the alert tests: each thing it does, on series written by hand.

The same cases are put to the real Prometheus by the last test, where its `promtool` is at hand.
"""

import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.prometheus import promtool
from tests.support.promql import Alerts, Rule, Scrapes, Unknown, asked_in, evaluate, firing

EVERY_S = 15.0
END_S = 600.0
COUNT = 41

SERIES: list[tuple[str, dict[str, str], list[float | None]]] = [
    ("depth", {"lane": "big"}, [4.0] * COUNT),
    ("depth", {"lane": "small"}, [1.0] * COUNT),
    ("budget", {"lane": "big"}, [5.0] * COUNT),
    ("budget", {"lane": "small"}, [10.0] * COUNT),
    ("state", {"model": "a", "state": "warm"}, [1.0] * COUNT),
    ("state", {"model": "a", "state": "cold"}, [0.0] * COUNT),
    ("memory", {"host": "h", "kind": "total"}, [100.0] * COUNT),
    ("memory", {"host": "h", "kind": "headroom"}, [2.0] * COUNT),
    ("asked_total", {"lane": "big", "api": "1"}, [3.0 * i for i in range(COUNT)]),
    ("asked_total", {"lane": "big", "api": "2"}, [float(i if i < 30 else i - 30) for i in range(COUNT)]),  # it restarts
    ("late_total", {}, [None] * 35 + [7.0 + i for i in range(6)]),  # it appears late, and not at 0
    ("gone", {}, [1.0] * 10 + [None] * 31),
    ("wave", {}, [float(i % 4) for i in range(COUNT)]),
    *(
        ("took_bucket", {"lane": "big", "le": le}, [float(i * times) for i in range(COUNT)])
        for le, times in [("0.1", 2), ("0.5", 6), ("2.5", 9), ("+Inf", 10)]
    ),
]

L = dict[str, str]
CASES: list[tuple[str, list[tuple[L, float]]]] = [
    ("depth", [({"__name__": "depth", "lane": "big"}, 4), ({"__name__": "depth", "lane": "small"}, 1)]),
    ('depth{lane!="big"} + 1', [({"lane": "small"}, 2)]),
    ('depth{lane=~"b.*"}', [({"__name__": "depth", "lane": "big"}, 4)]),
    ('depth{lane!~"b.*|small"}', []),
    ("gone", []),
    ("depth > 2", [({"__name__": "depth", "lane": "big"}, 4)]),
    ("2 < depth", [({"__name__": "depth", "lane": "big"}, 4)]),
    ("depth > bool 2", [({"lane": "big"}, 1), ({"lane": "small"}, 0)]),
    ("depth / budget > 0.5", [({"lane": "big"}, 0.8)]),
    ("depth / on(lane) budget", [({"lane": "big"}, 0.8), ({"lane": "small"}, 0.1)]),
    ('memory{kind="headroom"} / ignoring(kind) memory{kind="total"} < 0.05', [({"host": "h"}, 0.02)]),
    ('memory / on(host) group_left memory{kind="total"}',
     [({"host": "h", "kind": "total"}, 1), ({"host": "h", "kind": "headroom"}, 0.02)]),
    ('state{state="warm"} == 1 and on() depth > 3', [({"__name__": "state", "model": "a", "state": "warm"}, 1)]),
    ('depth unless depth{lane="big"}', [({"__name__": "depth", "lane": "small"}, 1)]),
    ("sum(gone) or vector(0)", [({}, 0)]),
    ("sum(rate(gone[1m])) / (sum(depth) or vector(0))", []),
    ("sum(depth)", [({}, 5)]),
    ("max by (lane) (depth)", [({"lane": "big"}, 4), ({"lane": "small"}, 1)]),
    ("avg without (lane) (depth)", [({}, 2.5)]),
    ("count(depth)", [({}, 2)]),
    ("min(depth)", [({}, 1)]),
    ("topk(1, depth)", [({"__name__": "depth", "lane": "big"}, 4)]),
    ("-depth", [({"lane": "big"}, -4), ({"lane": "small"}, -1)]),
    ("depth / 0 > 1", [({"lane": "big"}, math.inf), ({"lane": "small"}, math.inf)]),
    ("absent(gone)", [({}, 1)]),
    ('absent(depth{lane="none"})', [({"lane": "none"}, 1)]),
    ("absent(depth)", []),
    ("rate(asked_total{api=\"1\"}[4m50s])", [({"lane": "big", "api": "1"}, 0.2)]),
    ("increase(asked_total{api=\"1\"}[4m50s])", [({"lane": "big", "api": "1"}, 58)]),
    ("increase(asked_total{api=\"2\"}[4m50s])", [({"lane": "big", "api": "2"}, 18 * 290 / 285)]),
    ("increase(late_total[4m50s])", [({}, 5 * (75 + 7.5) / 75)]),
    ("rate(gone[1m])", []),
    ("max_over_time(wave[50s])", [({}, 3)]),
    ("min_over_time(wave[35s])", [({}, 0)]),
    ("sum_over_time(wave[50s])", [({}, 6)]),
    ("avg_over_time(wave[50s])", [({}, 1.5)]),
    ("count_over_time(wave[50s])", [({}, 4)]),
    ("changes(wave[50s])", [({}, 3)]),
    ("histogram_quantile(0.5, sum by (le, lane) (rate(took_bucket[4m50s])))", [({"lane": "big"}, 0.4)]),
    ("histogram_quantile(0.95, sum by (le) (rate(took_bucket[4m50s])))", [({}, 2.5)]),
    ("clamp_max(depth, 2)", [({"lane": "big"}, 2), ({"lane": "small"}, 1)]),
    ("clamp_min(depth, 2)", [({"lane": "big"}, 4), ({"lane": "small"}, 2)]),
]  # fmt: skip


@pytest.fixture
def scrapes() -> Scrapes:
    made = Scrapes()
    for name, labels, values in SERIES:
        made.put(name, values, every_s=EVERY_S, **labels)
    return made


@pytest.mark.parametrize(("query", "wanted"), CASES, ids=[query for query, _ in CASES])
def test_a_query_gives(query: str, wanted: list[tuple[L, float]], scrapes: Scrapes) -> None:
    found = evaluate(query, scrapes, at_s=END_S)
    assert isinstance(found, dict)
    assert {labels: pytest.approx(value) for labels, value in found.items()} == {
        frozenset(labels.items()): value for labels, value in wanted
    }


def test_numbers_are_numbers(scrapes: Scrapes) -> None:
    assert evaluate("1 + 2 * 3", scrapes, at_s=0) == 7
    assert evaluate("time() - 60", scrapes, at_s=90) == 30
    assert evaluate("3 > bool 2", scrapes, at_s=0) == 1


@pytest.mark.parametrize(
    "query", ["depth offset 1m", "stddev(depth)", "ceil(depth)", "rate(depth[5m:1m])", "depth ^ 2"]
)
def test_what_is_not_known_here_is_an_error_and_no_guess(query: str, scrapes: Scrapes) -> None:
    with pytest.raises(Unknown):
        evaluate(query, scrapes, at_s=END_S)


def test_what_is_no_promql_is_an_error(scrapes: Scrapes) -> None:
    with pytest.raises(ValueError):
        evaluate("depth >", scrapes, at_s=END_S)


def test_many_to_many_is_an_error_as_in_prometheus(scrapes: Scrapes) -> None:
    with pytest.raises(AssertionError, match="many-to-many"):
        evaluate("depth + on() budget", scrapes, at_s=END_S)


def test_the_asked_in_a_query_are_found() -> None:
    query = (
        'histogram_quantile(0.5, sum by (le) (rate(a_bucket{x="1"}[5m]))) > (b or -c{y!="2"}) unless on() topk(2, d)'
    )
    assert asked_in(query) == {"a_bucket": {"x"}, "b": set(), "c": {"y"}, "d": set()}
    with pytest.raises(Unknown):
        asked_in('{job="x"}')


# --- scraped pages --------------------------------------------------------------------------------------------------


def test_a_series_that_leaves_the_page_ends_at_once() -> None:
    scrapes = Scrapes(instance="here")
    scrapes.add(0, '# TYPE up_now gauge\nup_now{host="a"} 1\nup_now{host="b"} 1\n')
    scrapes.add(15, '# TYPE up_now gauge\nup_now{host="a"} 1\n')
    assert _hosts(evaluate("up_now", scrapes, at_s=14)) == ["a", "b"]
    assert _hosts(evaluate("up_now", scrapes, at_s=15)) == ["a"]


def test_a_target_that_does_not_answer_is_down_and_tells_nothing() -> None:
    scrapes = Scrapes(instance="here")
    scrapes.add(0, '# TYPE up_now gauge\nup_now{host="a"} 1\n')
    scrapes.add(15, None)
    assert evaluate("up == 0", scrapes, at_s=15) == {frozenset({("__name__", "up"), ("instance", "here")}): 0}
    assert evaluate("up_now", scrapes, at_s=15) == {}


def test_both_formats_of_a_page_read_the_same() -> None:
    plain, open_metrics = Scrapes(), Scrapes()
    plain.add(0, "# TYPE a_total counter\na_total 3\n")
    open_metrics.add(0, "# TYPE a counter\na_total 3\n# EOF\n")
    assert evaluate("a_total", plain, at_s=0) == evaluate("a_total", open_metrics, at_s=0)


def _hosts(found: Any) -> list[str]:
    return sorted(dict(labels)["host"] for labels in found)


# --- alerts ---------------------------------------------------------------------------------------------------------

RULE = Rule("Deep", "depth > 2", 30.0, {}, {})


def _depths(*values: float | None) -> Scrapes:
    scrapes = Scrapes()
    for number, value in enumerate(values):
        scrapes.add(number * 15, "" if value is None else f"# TYPE depth gauge\ndepth {value}\n")
    return scrapes


def test_an_alert_fires_once_it_has_been_wrong_for_so_long() -> None:
    assert firing(RULE, _depths(1, 3, 3), every_s=15) == []
    assert firing(RULE, _depths(1, 3, 3, 3), every_s=15) == [{}]


def test_an_alert_that_was_right_in_between_begins_anew() -> None:
    assert firing(RULE, _depths(3, 3, 1, 3, 3), every_s=15) == []
    assert firing(RULE, _depths(3, 3, None, 3, 3), every_s=15) == []


def test_an_alert_is_pending_before_it_fires() -> None:
    alerts, scrapes = Alerts(RULE), _depths(3, 3, 3)
    assert [set(alerts.look(scrapes, at_s=at).values()) for at in (0, 15, 30)] == [{"pending"}, {"pending"}, {"firing"}]


def test_a_rule_with_a_key_that_prometheus_does_not_know_is_an_error() -> None:
    with pytest.raises(AssertionError):
        Rule.read({"alert": "A", "expr": "a", "fro": "1m"})


# --- the real one ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_prometheus_gives_the_same(scrapes: Scrapes, tmp_path: Path) -> None:
    """Every case above, as promtool's own unit tests, to the last bit."""
    told = [
        {"series": _spelled(name, labels),
         "values": " ".join("_" if v is None else repr(v) for v in values)}
        for name, labels, values in SERIES
    ]  # fmt: skip
    expected = [
        {"expr": query, "eval_time": "10m", "exp_samples": [
            {"labels": _spelled(labels.get("__name__", ""), {k: v for k, v in labels.items() if k != "__name__"}),
             "value": value} for labels, value in _told(query, scrapes)]}
        for query, _ in CASES
    ]  # fmt: skip
    tests = {"evaluation_interval": "15s", "tests": [
        {"interval": "15s", "input_series": told, "promql_expr_test": expected}]}  # fmt: skip
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump(tests))
    done = subprocess.run([promtool(), "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def _told(query: str, scrapes: Scrapes) -> list[tuple[dict[str, str], float]]:
    found = evaluate(query, scrapes, at_s=END_S)
    assert isinstance(found, dict)
    return [(dict(labels), value) for labels, value in found.items()]


def _spelled(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}"
