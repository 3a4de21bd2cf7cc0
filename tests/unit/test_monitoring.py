"""What we ship for Prometheus and Grafana names only what there is, and every panel shows something."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.metrics import Metrics
from broker.records import ModelFacts
from tests.support.prometheus import RULES, promtool, rules
from tests.support.promql import Scrapes, asked_in, evaluate
from tests.unit.test_metrics import VITALS, busy, page

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docs" / "monitoring" / "dashboard.json").read_text())
EVERY_S = 15.0
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
OF_TARGETS = {"job", "instance"}
"""Labels that Prometheus adds."""


def _samples() -> dict[str, set[str]]:
    """The names of all samples that a page may hold, with their labels."""
    found = {"up": OF_TARGETS}
    for family in Metrics(version="1").families():
        for suffix in SUFFIXES.get(family.type, ("",)):
            found[family.name + suffix] = {*family.labels, *OF_TARGETS} | ({"le"} if suffix == "_bucket" else set())
    return found


SAMPLES = _samples()


def _panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            yield panel


def _queries() -> Iterator[tuple[str, str, str]]:
    """Title, query and legend of each; Grafana's variables filled in as it would."""
    for panel in _panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m").replace("$lane", ".*").replace("$model", ".*")
            yield panel["title"], query, target["legendFormat"]


QUERIES = list(_queries())


@pytest.fixture(scope="module")
def scrapes() -> Scrapes:
    """An api that has been at work for a quarter of an hour, with a wake and a refusal in each scrape."""
    metrics, scrapes = busy(), Scrapes(job="warmlane", instance="here")
    for number in range(61):
        metrics.submitted("big")
        metrics.refused("big", "lane_full")
        metrics.queue_wait("big", 0.2)
        metrics.first_token("big", "big", 1.5)
        metrics.generation("big", "big", 9.0)
        vitals = replace(VITALS, facts={"big": ModelFacts(wakes=number, loads=number, loads_ms=number * 900)})
        scrapes.add(number * EVERY_S, page(metrics, vitals=vitals))
    return scrapes


def _check(query: str) -> None:
    assert "$" not in query
    for name, labels in asked_in(query).items():
        assert name in SAMPLES, f"there is no {name}"
        assert labels <= SAMPLES[name], f"{name} has no label {labels - SAMPLES[name]}"


@pytest.mark.parametrize("alert", rules())
def test_alerts_name_only_metrics_that_there_are(alert: str) -> None:
    _check(rules()[alert].expr)


@pytest.mark.parametrize(("title", "query", "legend"), QUERIES, ids=[f"{t}: {q[:30]}" for t, q, _ in QUERIES])
def test_panels_name_only_metrics_that_there_are(title: str, query: str, legend: str) -> None:
    _check(query)


@pytest.mark.parametrize(("title", "query", "legend"), QUERIES, ids=[f"{t}: {q[:30]}" for t, q, _ in QUERIES])
def test_panels_show_something(title: str, query: str, legend: str, scrapes: Scrapes) -> None:
    """On a gateway that has seen something of each kind; what is found has each label that the legend names."""
    found = evaluate(query, scrapes, at_s=scrapes.instants[-1])
    wanted = set(re.findall(r"{{(\w+)}}", legend))
    assert isinstance(found, dict) and found
    for labels in found:
        assert wanted <= {name for name, _ in labels}, f"the legend of {title} names a label that is gone"


def test_the_variables_of_the_dashboard_name_labels_that_there_are() -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
            assert label in SAMPLES[name] and variable["name"] == label


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.long
def test_promtool_finds_nothing() -> None:
    """Neither in the rules nor on the page."""
    checked = subprocess.run([promtool(), "check", "rules", str(RULES)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    text = page(busy())
    linted = subprocess.run([promtool(), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0 and not linted.stderr, linted.stdout + linted.stderr


def test_no_panel_leads_to_a_server_of_ours() -> None:
    """Every query asks the data source that the reader chooses, and nothing is loaded from elsewhere."""
    text = json.dumps(DASHBOARD)
    assert "http://" not in text and "https://" not in text
    sources = {target["datasource"]["uid"] for panel in _panels() for target in panel["targets"]}
    assert sources == {"${source}"}
