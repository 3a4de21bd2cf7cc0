"""Jobs that nobody waits for, against a whole gateway: handed in, left alone, fetched; also past the kill of a part."""

import asyncio
import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.support.clients import user
from tests.support.gateway_process import House, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated, words
from tests.unit.test_cli import Gateway, gateway

__all__ = ["gateway"]

pytestmark = pytest.mark.real

MODELS = {
    "big": simulated(maxConcurrent=2, memoryMb=1, options={"decodeTps": 200}),
    "broken": simulated(memoryMb=1, options={"decodeTps": 200}),
}


def hand_in(http: httpx.Client, model: str = "big", **more: object) -> dict[str, str]:
    body = {"model": model, "messages": user("count"), "max_tokens": 20, "stream": True}
    answer = http.post("/v1/jobs", json={"body": body, **more})
    assert answer.status_code == 202, answer.text
    told: dict[str, str] = answer.json()
    return told


def test_work_is_handed_over_and_fetched(tmp_path: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve jobs, the worker killed under them: each is done, its result whole though a stream was asked for."""
    with house(tmp_path / "data", policy=policy(MODELS, maxLosses=3)) as up, httpx.Client(base_url=up.url) as http:
        monkeypatch.setenv("GATEWAY_URL", up.url)
        monkeypatch.delenv("GATEWAY_KEY", raising=False)
        for name in MODELS:
            up.until_state(name, "warm")
        made = [hand_in(http, metadata={"n": str(n)})["id"] for n in range(12)]
        os.kill(worker_of(up), signal.SIGKILL)
        for number, job_id in enumerate(made):
            told = http.get(f"/v1/jobs/{job_id}?wait=60s", timeout=70).json()
            assert (told["state"], told["metadata"], told["lane"]) == ("done", {"n": str(number)}, "big.batch")
            answer = http.get(f"/v1/jobs/{job_id}/result").json()
            assert answer["object"] == "chat.completion"
            assert answer["choices"][0]["message"]["content"] == words(20)
        listed = http.get("/v1/jobs?state=done&limit=100").json()
        assert sorted(job["id"] for job in listed["data"]) == sorted(made)

        asyncio.run(up.runtime("broken").break_with(error_status=500))
        died = hand_in(http, "broken")["id"]
        assert http.get(f"/v1/jobs/{died}?wait=60s", timeout=70).json()["state"] == "failed"
        assert http.get(f"/v1/jobs/{died}/result").status_code == 502
        ran = gateway("dead", "list", "--json")
        assert [letter["job"] for letter in json.loads(ran.out)] == [died]
        again = gateway("dead", "retry", died).out.strip()
        assert http.get(f"/v1/jobs/{again}").json()["retry_of"] == died
        block_until(lambda: http.get(f"/v1/jobs/{again}").json()["state"] == "failed", what="it dies once more")


def worker_of(up: House) -> int:
    return next(process.pid for process in up.family() if "workers.host" in process.cmdline())
