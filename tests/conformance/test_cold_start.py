"""A cold model that takes long to load: who waits, who serves meanwhile, and who serves then."""

import time
from pathlib import Path

import httpx
import pytest

from tests.conformance.conftest import Llama
from tests.support.clients import sdk, text_of, user
from tests.support.gateway_process import house
from tests.support.worker_world import policy

pytestmark = pytest.mark.real

BUDGET_MS = 2000
LOAD_MS = 5000


def test_a_request_is_promoted_at_its_deadline_and_the_wake_goes_on(tmp_path: Path, llama: Llama) -> None:
    """The small model answers for the big one, and says so; the big one answers the next request. It loaded once."""
    log = tmp_path / "loads"
    models = {
        "deep-coder": llama(
            load_delay_ms=LOAD_MS, load_log=log, keepWarm=False, coldStartBudgetMs=BUDGET_MS, fallback="coder-small"
        ),
        "coder-small": llama(maxConcurrent=2, coldStartBudgetMs=4000),
    }
    with house(tmp_path / "data", policy=policy(models)) as up, sdk(up.url, max_retries=0) as client:
        up.until_state("coder-small", "warm")
        assert not log.exists()  # nobody has asked for it
        started = time.monotonic()
        raw = client.chat.completions.with_raw_response.create(
            model="deep-coder", messages=user("hi"), max_tokens=4, stream=True
        )
        chunks = list(raw.parse())
        waited_s = time.monotonic() - started
        assert text_of(chunks)
        assert {chunk.model for chunk in chunks} == {"coder-small"}
        assert BUDGET_MS / 1000 <= waited_s < BUDGET_MS / 1000 + 1.5
        assert raw.headers["x-gateway-served-by"].startswith("coder-small@")
        job = httpx.get(f"{up.url}/v1/jobs/{raw.headers['x-gateway-job']}").json()
        assert (job["state"], job["asked"], job["asked_model"]) == ("done", "deep-coder", "deep-coder")
        assert (job["model"], job["lane"], job["promotions"]) == ("coder-small", "coder-small", 1)
        assert job["served_by"].startswith("coder-small@")
        assert 0 <= job["promoted_at"] - job["submitted_at"] - BUDGET_MS < 500
        figures = httpx.get(f"{up.url}/metrics").text.splitlines()
        for name in ("time_to_first_token", "generation"):  # the lane that was entered did not keep its budget
            assert f'gateway_{name}_seconds_count{{lane="deep-coder",model="coder-small"}} 1.0' in figures
        assert 'gateway_queue_wait_seconds_count{lane="deep-coder"} 1.0' in figures
        by_name = {model["name"]: model["state"] for model in up.status()["models"]}
        assert by_name == {"deep-coder": "waking", "coder-small": "warm"}
        up.until_state("deep-coder", "warm")
        answer = client.chat.completions.create(model="deep-coder", messages=user("hi"), max_tokens=4)
        assert answer.model == "deep-coder"
        assert len(log.read_text().splitlines()) == 1
