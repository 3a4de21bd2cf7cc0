"""Traces as a team gets them: a whole gateway, a collector that speaks OTLP, and one that is not there."""

import time
from pathlib import Path

import httpx
import pytest

from tests.support.clients import sdk, user
from tests.support.collector import Receiver, receiver
from tests.support.gateway_process import STOP_S_MAX, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
MODELS = {"coder": simulated(maxConcurrent=1, maxQueue=1, memoryMb=1, options={"decodeTps": 100})}


def ended(got: Receiver, job_id: str) -> bool:
    return any(span.served for span in got.spans.of(job_id))


def test_one_trace_from_the_client_through_every_part(tmp_path: Path) -> None:
    """An SDK names its trace; api and worker tell their steps; the worker is killed at its work, and what it could not
    tell another part does. A refusal is told too."""
    with receiver() as got:
        told = SOON | {"OTEL_EXPORTER_OTLP_ENDPOINT": got.url, "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=ci"}
        with house(tmp_path / "data", policy=policy(MODELS), **told) as up, sdk(up.url, max_retries=0) as client:
            up.until_state("coder", "warm")
            up.until_said("api", "event=traces_on collector=127.0.0.1")
            raw = client.chat.completions.with_raw_response.create(
                model="coder",
                messages=user("hi"),
                max_tokens=5,
                extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
            )
            job_id = raw.headers["x-gateway-job"]
            block_until(lambda: ended(got, job_id), what="the trace told")
            spans = got.spans.of(job_id)
            root = spans.root()
            assert (root.trace_id, root.parent_id, root.name) == (TRACE, PARENT, "chat coder")
            assert spans.names == ["chat coder", "wait", "attempt", "first token", "answer"]
            assert got.paths == {"/v1/traces"}

            long = {"model": "coder", "messages": user("hi"), "max_tokens": 400}
            taken = httpx.post(f"{up.url}/v1/jobs", json={"body": long}).raise_for_status()
            lost = taken.json()["id"]
            block_until(lambda: up.says("event=first_token", lost), what="its first token")
            up.kill_part("worker")
            assert httpx.get(f"{up.url}/v1/jobs/{lost}?wait=60s", timeout=70).json()["state"] == "done"
            block_until(lambda: ended(got, lost), what="the second trace told")
            spans = got.spans.of(lost)
            assert spans.root().trace_id != TRACE
            outcomes = [outcome for name, outcome in spans.outcomes if name == "attempt"]
            assert outcomes == ["lost", "done"]

            refused = httpx.post(f"{up.url}/v1/chat/completions", json=long | {"model": "nobody"})
            assert refused.status_code == 404
            block_until(lambda: any(span.error == "model_not_found" for span in got.spans), what="the refusal told")
            parts = {resource["warmlane.part"] for resource in got.resources}
            assert {resource["service.name"] for resource in got.resources} == {"warmlane"}
            assert {resource["deployment.environment"] for resource in got.resources} == {"ci"}
            assert {"api", "worker"} <= parts


def test_a_collector_that_is_away_costs_nobody_anything(tmp_path: Path) -> None:
    """Jobs are served as fast as ever, the logs stay readable, and the gateway stops in time."""
    nowhere = SOON | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with house(tmp_path / "data", policy=policy(MODELS), **nowhere) as up:
        up.until_state("coder", "warm")
        ask = {"model": "coder", "messages": user("hi"), "max_tokens": 1}
        took = []
        for _ in range(20):
            began = time.monotonic()
            httpx.post(f"{up.url}/v1/chat/completions", json=ask).raise_for_status()
            took.append(time.monotonic() - began)
        assert sorted(took)[10] < 0.25
        block_until(lambda: up.says("event=traces_lost"), what="a line that says so")
        began = time.monotonic()
    assert time.monotonic() - began < STOP_S_MAX / 2
    assert sum("event=traces_lost" in line for line in up.lines) <= 2, "a line for each part, not for each try"
