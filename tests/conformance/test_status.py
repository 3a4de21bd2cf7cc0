"""`gateway status` against a live house, to the letter."""

import re
from contextlib import ExitStack

import httpx
import pytest

from tests.conformance.conftest import Llama
from tests.support.clients import sdk, user
from tests.support.gateway_process import House, gateway, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real


def test_the_table_of_the_specification(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> None:
    """State, first token, queue and memory of real models; the policy in one line; then the host."""
    models = {
        "deep-coder": llama(
            keepWarm=True, maxConcurrent=2, maxQueue=6, coldStartBudgetMs=25000, fallback="coder-small"
        ),
        "coder-small": simulated(
            maxConcurrent=4, maxQueue=12, coldStartBudgetMs=4000, memoryMb=8806, options={"decodeTps": 30}
        ),
    }
    data = tmp_path_factory.mktemp("status") / "data"
    with house(data, policy=policy(models, headerHoldMs=200), GATEWAY_HOST_NAME="box", GATEWAY_MEMORY_MB="20000") as up:
        for name in models:
            up.until_state(name, "warm")
        asked = {"model": "coder-small", "messages": user("hold"), "max_tokens": 2000, "stream": True}
        with httpx.Client(timeout=30) as http, ExitStack() as open_streams:
            for _ in range(5):  # four run, one waits
                stream = http.stream("POST", f"{up.url}/v1/chat/completions", json=asked)
                assert open_streams.enter_context(stream).status_code == 200
            block_until(lambda: _slots_used(up, "coder-small") == 4, what="the heartbeat tells of the slots")
            done = up.command("status")
            told = up.status()
        assert done.returncode == 0
        lines = done.stdout.splitlines()
        assert lines[0] == "MODEL        STATE   FIRST TOKEN   QUEUE   MEM"
        assert re.fullmatch(r"deep-coder   warm    \d+ms +0/6     \d+(\.\d)?[MG]", lines[1]), lines[1]
        assert re.fullmatch(r"coder-small  warm    \d+ms +1/12    8\.6G", lines[2]), lines[2]
        assert lines[3] == "policy: deep-coder fallback -> coder-small after 25000ms cold-start budget"
        assert re.fullmatch(r"host: box up, \d+\.\dG of 19\.5G used, headroom \d+\.\dG", lines[4]), lines[4]
        assert lines[5:] == ["note: coder-small is simulated: its answers mean nothing"]
        assert [line.index("/") - 1 for line in lines[1:3]] == [lines[0].index("QUEUE")] * 2
        by_name = {model["name"]: model for model in told["models"]}
        assert by_name["coder-small"]["running"] == 4
        assert by_name["deep-coder"]["runtime"] == "llama.cpp"
        assert 0 < by_name["deep-coder"]["memory_bytes"] < 2**31
        assert told["hosts"][0]["name"] == "box"
        assert told["policy"] == [lines[3].removeprefix("policy: ")]


def _slots_used(up: House, name: str) -> int:
    models = httpx.get(f"{up.url}/v1/status").json()["models"]
    return next(int(model["slots_used"]) for model in models if model["name"] == name)


def test_jobs_and_models_on_the_command_line(shared_house: House) -> None:
    """What a teammate without curl can ask: over HTTP, with exit codes that a script can use."""
    with sdk(shared_house.url, max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=user("hi"), max_tokens=2)
    job_id = raw.headers["x-gateway-job"]
    shown = shared_house.command("job", "show", job_id)
    assert shown.returncode == 0
    assert re.search(rf"^job +{job_id}$", shown.stdout, re.M)
    assert re.search(r"^state +done$", shown.stdout, re.M)
    assert re.search(r"^served by +tiny@", shown.stdout, re.M)
    assert "gpt-4o" in shared_house.command("model", "list").stdout.splitlines()
    unknown = shared_house.command("job", "show", "nobody")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("no job nobody is known here")
    nowhere = gateway("status", GATEWAY_URL="http://127.0.0.1:1")
    assert nowhere.returncode == 3
    words = r"The gateway at http://127\.0\.0\.1:1 can't be reached \(.*\): start .*GATEWAY_URL.*\.\n"
    assert re.fullmatch(words, nowhere.stderr)
