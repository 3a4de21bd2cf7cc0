"""The main job, from nothing: one command, a real model, and a stock client that streams tokens from it."""

import json
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conformance.conftest import Llama
from tests.support.clients import sdk, text_of, user
from tests.support.gateway_process import House, is_alive, tells_no_traceback

pytestmark = pytest.mark.real

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
}


def test_the_main_job(tmp_path: Path, llama: Llama) -> None:
    """In a folder that holds somebody else's `api` and `workers`, without any data, and gone without a trace."""
    for room in ("api", "broker", "workers"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise SystemExit('a stranger was imported')")
    policy = json.dumps({"models": {"deep-coder": llama(maxConcurrent=2)}})
    up = House(tmp_path / "data", policy=policy, cwd=tmp_path)
    try:
        up.ready()
        up.until_state("deep-coder", "warm")
        family = up.family()
        assert len(family) == 6, [process.cmdline() for process in family]  # up, redis, api, scheduler, worker, llama
        with sdk(up.url, max_retries=0) as client:
            streams(client, up.url)
            answers_whole(client)
            says_why_it_stopped(client)
            keeps_to_a_schema(client)
            tells_logprobs(client)
        assert up.stop() == 0
        assert up.lines[-1] == "stopped"
    finally:
        up.end()
    left = [process for process in family if is_alive(process)]
    assert not left, [process.cmdline() for process in left]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert "a stranger was imported" not in up.output
    tells_no_traceback(up.output)


def streams(client: Any, url: str) -> None:
    """Pieces come one by one, under the name of the policy, and the job's record knows who served it."""
    raw = client.chat.completions.with_raw_response.create(
        model="deep-coder",
        messages=user("count"),
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(raw.parse())
    assert text_of(chunks)
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 5
    assert {c.model for c in chunks} == {"deep-coder"}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens > 0
    job = httpx.get(f"{url}/v1/jobs/{raw.headers['x-gateway-job']}").json()
    assert (job["state"], job["model"], job["lane"], job["attempt"]) == ("done", "deep-coder", "deep-coder", 1)
    assert job["served_by"].startswith("deep-coder@")
    assert job["usage"]["completion_tokens"] == 24
    assert 0 < job["submitted_at"] <= job["claimed_at"] <= job["first_token_at"] <= job["ended_at"]
    assert raw.headers["x-gateway-served-by"] == job["served_by"]


def answers_whole(client: Any) -> None:
    """A client that asks for no stream gets one object with the runtime's own figures, the same for the same seed."""
    one, two = (
        client.chat.completions.create(model="deep-coder", messages=user("hello"), max_tokens=8, temperature=0, seed=7)
        for _ in range(2)
    )
    assert one.object == "chat.completion"
    assert one.model == "deep-coder"
    assert one.choices[0].finish_reason == "length"
    assert one.choices[0].message.content == two.choices[0].message.content != ""
    assert one.usage.completion_tokens == 8
    assert one.usage.total_tokens == one.usage.prompt_tokens + 8


def says_why_it_stopped(client: Any) -> None:
    """A stop word ends the answer with the reason `stop`, and does not appear in it."""
    asked = {"model": "deep-coder", "messages": user("hello"), "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[len(whole) // 2]
    cut = client.chat.completions.create(**asked, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole[: whole.index(stop)]


def keeps_to_a_schema(client: Any) -> None:
    """The grammar of a json_schema reaches the runtime: gibberish, but of the right shape."""
    answer = client.chat.completions.create(
        model="deep-coder",
        messages=user("who?"),
        max_tokens=200,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
    )
    found = json.loads(answer.choices[0].message.content)
    assert found.keys() == {"name", "age"}
    assert isinstance(found["age"], int)


def tells_logprobs(client: Any) -> None:
    """Log probabilities survive the stream and its folding, one entry per token."""
    asked = {"model": "deep-coder", "messages": user("hello"), "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    assert len(whole.choices[0].logprobs.content) == 4
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(**asked, stream=True))
    told = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert sum(len(logprobs.content or []) for logprobs in told) == 4
