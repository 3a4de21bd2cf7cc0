"""What a client of the gateway gets, byte by byte, beside what llama.cpp itself says to the same request."""

import json
import re
from typing import Any

import httpx
import pytest

from tests.conformance.conftest import Llama
from tests.support.clients import user
from tests.support.gateway_process import House, house
from tests.support.worker_world import policy

pytestmark = pytest.mark.real

# What two runs of llama.cpp differ in as well: ids, instants, how long it took, what its cache held.
VARIES = {"id", "created", "timings", "prompt_tokens_details"}
ASKED = {"messages": user("balu bide"), "max_tokens": 24, "temperature": 0, "seed": 7}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Any:
    with house(tmp_path_factory.mktemp("bytes") / "data", policy=policy({"tiny": llama()})) as up:
        up.until_state("tiny", "warm")
        yield up


def direct(up: House) -> str:
    """The address of the llama.cpp server that the gateway's worker started."""
    text = (up.data / "tiny.log").read_text()
    return re.findall(r"http://127\.0\.0\.1:\d+", text)[-1]


def settled(told: dict[str, Any]) -> dict[str, Any]:
    """One chunk or answer without what varies from run to run."""
    left = {key: value for key, value in told.items() if key not in VARIES}
    if isinstance(left.get("usage"), dict):
        left["usage"] = {key: value for key, value in left["usage"].items() if key not in VARIES}
    return left


def ask(url: str, model: str, **more: Any) -> bytes:
    return httpx.post(f"{url}/v1/chat/completions", json={**ASKED, "model": model, **more}, timeout=60).content


def chunks(stream: bytes) -> list[dict[str, Any]]:
    events = [event for event in stream.decode().split("\n\n") if event and not event.startswith(":")]
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_is_the_runtimes_own_but_for_the_models_name(up: House, usage: bool) -> None:
    more = {"stream": True, **({"stream_options": {"include_usage": True}} if usage else {})}
    ours, theirs = ask(up.url, "tiny", **more), ask(direct(up), "tiny", **more)
    ours_read, theirs_read = ([settled(chunk) for chunk in chunks(told)] for told in (ours, theirs))
    assert {chunk["model"] for chunk in ours_read} == {"tiny"}
    for chunk in theirs_read:
        chunk["model"] = "tiny"
    assert ours_read == theirs_read
    # In the same order of keys, with the same blanks: nothing was written anew.
    assert shape(ours) == shape(theirs)


def shape(stream: bytes) -> list[bytes]:
    """The bytes of each event, with what varies and the model's name taken out."""
    events = [event for event in stream.split(b"\n\n") if event and not event.startswith(b":")]
    events = [re.sub(rb'"(id|model)":"[^"]*"', rb'"\1":""', event) for event in events]
    events = [re.sub(rb'"created":\d+', b'"created":0', event) for event in events]
    events = [re.sub(rb',?"timings":\{[^}]*\}', b"", event) for event in events]
    return [re.sub(rb',?"prompt_tokens_details":\{[^}]*\}', b"", event) for event in events]


def test_a_whole_answer_is_the_runtimes_own_but_for_the_models_name(up: House) -> None:
    ours, theirs = (settled(json.loads(ask(url, "tiny"))) for url in (up.url, direct(up)))
    assert ours.pop("model") == "tiny"
    theirs.pop("model")
    assert ours == theirs
