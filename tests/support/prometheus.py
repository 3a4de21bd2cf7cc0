"""A Prometheus for tests: it scrapes a live api, and evaluates the rules that we ship over what it got.

Scrapes are real and come one after another; they are stamped 30 s apart, as Prometheus would take them, so that `for`
and `rate` have their time. What a test makes true must stay true over all of them.
"""

import re
import shutil
from functools import cache
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.live_api import LiveApi
from tests.support.metrics_lint import problems
from tests.support.promql import Rule, Scrapes, firing

EVERY_S = 30.0
RULES = Path(__file__).resolve().parents[2] / "docs" / "monitoring" / "alerts.yaml"


@cache
def rules() -> dict[str, Rule]:
    """The rules as they are shipped, by the names of their alerts."""
    told = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    found = {rule["alert"]: Rule.read(rule) for rule in told}
    assert len(found) == len(told), "two alerts have the same name"
    return found


def promtool() -> str:
    """The real one's own checker, for the long tests."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("there is no promtool here: Debian's package `prometheus` has it")
    return found


class Prometheus:
    """One target's series, and what fires over them."""

    def __init__(self, api: LiveApi) -> None:
        self.scrapes = Scrapes(job="warmlane", instance=f"127.0.0.1:{api.port}")
        self.page = ""
        self._api = api
        self._at_s = 0.0

    async def scrape(self, *, for_s: float = EVERY_S) -> None:
        """Scrapes as often as Prometheus would in that time, and looks whether the last page is clean."""
        end_s = self._at_s + for_s
        async with httpx.AsyncClient(timeout=15, verify=False) as http:
            while self._at_s < end_s:
                self._at_s += EVERY_S
                self.page = await self._page(http)
                self.scrapes.add(self._at_s, self.page or None)

        assert not self.page or problems(self.page) == []

    async def _page(self, http: httpx.AsyncClient) -> str:
        accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        try:
            answer = await http.get(f"{self._api.url}/metrics", headers=accept)
        except httpx.TransportError:
            return ""
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        return answer.raise_for_status().text

    def firing(self, alert: str) -> list[dict[str, str]]:
        """The labels of what fires of an alert now; its words must name no label that is not there."""
        rule = rules()[alert]
        found = firing(rule, self.scrapes, every_s=EVERY_S)
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule.annotations.values())))
        assert all(named <= labels.keys() for labels in found), f"{alert} names a label of {named} that it lacks"
        return found

    def all_firing(self) -> dict[str, list[dict[str, str]]]:
        """Whatever fires."""
        return {alert: found for alert in rules() if (found := self.firing(alert))}
