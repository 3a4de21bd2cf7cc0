"""What the stock Ollama client makes of us, over a real llama.cpp that knows nothing of its dialect."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import ollama
import pytest

from tests.conformance.conftest import Llama
from tests.support.gateway_process import House, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["ok", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[House]:
    """One real model that talks, one that gives vectors, one for whom nobody asks, and one that is slow to load."""
    models = {
        "tiny": llama(maxConcurrent=2, maxQueue=8, aliases=["qwen3:latest"]),
        "vectors": llama(pooling="mean", embeddings=True, maxQueue=20),
        "asleep": simulated(keepWarm=False, memoryMb=1),
        "sleepy": simulated(keepWarm=False, memoryMb=1, options={"coldStartMs": 1500}),
    }
    routing = [{"match": {"lane": "fast-edit"}, "target": "tiny"}]
    text = policy(models, routing=routing, headerHoldMs=300)
    with house(tmp_path_factory.mktemp("ollama") / "data", policy=text) as up:
        for name in ("tiny", "vectors"):
            up.until_state(name, "warm")
        yield up


@contextmanager
def client(up: House) -> Iterator[ollama.Client]:
    """The client as it comes, pointed at a gateway."""
    with ollama.Client(up.url, timeout=60) as found:
        yield found


def state_of(up: House, model: str) -> str:
    told: list[dict[str, Any]] = httpx.get(f"{up.url}/v1/status").json()["models"]
    return next(str(one["state"]) for one in told if one["name"] == model)


def test_a_chat_streams(up: House) -> None:
    with client(up) as sdk:
        parts = list(sdk.chat("tiny", ASK, stream=True, options={"num_predict": 12, "temperature": 0, "seed": 7}))
    *said, last = parts
    assert len(said) >= 2 and all(part.done is False and part.model == "tiny" for part in said)
    assert "".join(part.message.content or "" for part in said)
    assert (last.done, last.done_reason, last.eval_count) == (True, "length", 12)
    assert last.prompt_eval_count and last.prompt_eval_duration and last.eval_duration and last.total_duration
    assert last.total_duration >= last.prompt_eval_duration


def test_the_whole_answer_is_the_streamed_one(up: House) -> None:
    """The weights are random, so greedy."""
    options = {"num_predict": 10, "temperature": 0, "seed": 7, "num_ctx": 123_456, "num_gpu": 7}
    with client(up) as sdk:
        streamed = "".join(part.message.content or "" for part in sdk.chat("tiny", ASK, stream=True, options=options))
        whole = sdk.chat("tiny", ASK, options=options)
    assert whole.message.content == streamed and whole.message.role == "assistant"
    assert (whole.done, whole.done_reason, whole.eval_count, whole.model) == (True, "length", 10, "tiny")


def test_generate_streams_and_does_not(up: House) -> None:
    options = {"num_predict": 8, "temperature": 0, "seed": 7}
    with client(up) as sdk:
        parts = list(sdk.generate("tiny", "Why?", system="Be brief.", stream=True, options=options))
        whole = sdk.generate("tiny", "Why?", system="Be brief.", options=options)
    assert whole.response == "".join(part.response or "" for part in parts) != ""
    assert parts[-1].done_reason == whole.done_reason == "length" and whole.eval_count == 8


@pytest.mark.parametrize("stream", [True, False])
def test_a_schema_is_kept_to(up: House, stream: bool) -> None:
    with client(up) as sdk:
        found = sdk.chat("tiny", ASK, format=SCHEMA, stream=stream, options={"num_predict": 120})
        text = "".join(part.message.content for part in found) if stream else found.message.content
        told = json.loads(text)
        assert told.keys() == {"ok", "count"} and isinstance(told["ok"], bool)
        some = sdk.chat("tiny", ASK, format="json", options={"num_predict": 20})
        assert (some.message.content or "").lstrip().startswith("{")


def test_a_stop_word_stops(up: House) -> None:
    with client(up) as sdk:
        plain = sdk.generate("tiny", "Why?", options={"num_predict": 12, "temperature": 0, "seed": 7}).response
        assert plain is not None
        word = plain[len(plain) // 2 :][:3]
        options = {"num_predict": 12, "temperature": 0, "seed": 7, "stop": [word]}
        cut = sdk.generate("tiny", "Why?", options=options)
    assert cut.response == plain[: plain.index(word)] and cut.done_reason == "stop"


def test_logprobs_come_with_the_tokens(up: House) -> None:
    with client(up) as sdk:
        found = sdk.chat("tiny", ASK, logprobs=True, top_logprobs=2, options={"num_predict": 4})
    assert found.logprobs is not None and len(found.logprobs) >= 3
    assert all(one.logprob <= 0 and len(one.top_logprobs or ()) == 2 for one in found.logprobs)


def test_vectors(up: House) -> None:
    with client(up) as sdk:
        two = sdk.embed("vectors", ["balu bide", "7 + 4 = 11"])
        assert [len(vector) for vector in two.embeddings] == [64, 64] and two.prompt_eval_count
        one = sdk.embed("vectors", "balu bide")
        assert one.embeddings[0] == pytest.approx(two.embeddings[0], abs=1e-3)
        short = sdk.embed("vectors", "balu bide", dimensions=8).embeddings[0]
        assert len(short) == 8 and sum(number * number for number in short) == pytest.approx(1)
        assert sdk.embeddings("vectors", "balu bide").embedding == pytest.approx(one.embeddings[0], abs=1e-6)
        assert sdk.embed("vectors", "").embeddings == []


def test_models_are_listed_shown_and_seen_running(up: House) -> None:
    with client(up) as sdk:
        listed = {model.model: model for model in sdk.list().models}
        assert {"tiny", "qwen3:latest", "vectors", "asleep", "fast-edit"} <= listed.keys()
        assert listed["tiny"].digest == listed["fast-edit"].digest != listed["vectors"].digest
        assert sdk.list().models[0].digest == listed["tiny"].digest
        both = {"tiny", "vectors"}
        block_until(lambda: both <= {model.model for model in sdk.ps().models}, what="the worker tells its models")
        running = {model.model: model for model in sdk.ps().models}
        assert "asleep" not in running
        assert (running["tiny"].size or 0) > 0 and running["tiny"].context_length == 1024
        shown = sdk.show("tiny")
        assert shown.modelinfo is not None and shown.modelinfo["warmlane.context_length"] == 1024
        assert shown.capabilities == ["completion", "tools"]
        assert sdk.show("vectors:latest").capabilities == ["embedding"]
        with pytest.raises(ollama.ResponseError) as unknown:
            sdk.show("nobody")
    assert unknown.value.status_code == 404


def test_names_with_and_without_a_tag(up: House) -> None:
    """Clients add `:latest` to a name without a tag; where the policy has the name with it, that one is meant."""
    with client(up) as sdk:
        for name in ("tiny", "tiny:latest", "qwen3:latest", "fast-edit", "fast-edit:latest"):
            assert sdk.generate(name, "Hi", options={"num_predict": 1}).model == "tiny"
        with pytest.raises(ollama.ResponseError) as unknown:
            sdk.generate("qwen3", "Hi")
    assert unknown.value.status_code == 404 and "not found" in unknown.value.error


@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_done_is_said_with_a_status(up: House, stream: bool) -> None:
    asked: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "nobody", "prompt": "Hi"}, 404, "not found"),
        ({"model": "tiny", "prompt": "Hi", "raw": True}, 400, "raw prompts"),
        ({"model": "tiny", "prompt": "Hi", "context": [1, 2]}, 400, "contexts"),
        ({"model": "vectors", "prompt": "Hi"}, 400, "vectors and no text"),
        ({"model": "tiny", "prompt": "word " * 3000}, 400, "context"),
    ]
    with client(up) as sdk:
        for request, status, words in asked:
            with pytest.raises(ollama.ResponseError) as refused:
                found = sdk.generate(stream=stream, **request)
                list(found if stream else ())
            assert refused.value.status_code == status and words in refused.value.error, refused.value.error
        with pytest.raises(ollama.ResponseError) as refused:
            sdk.embed("tiny", "Hi")
    assert refused.value.status_code == 400


def test_no_client_unloads_what_others_use(up: House) -> None:
    with client(up) as sdk:
        for empty in (sdk.generate("tiny", keep_alive=0), sdk.chat("tiny", keep_alive=0)):
            assert (empty.done, empty.done_reason) == (True, "unload")
        sdk.generate("tiny", "Hi", keep_alive=0, options={"num_predict": 1})
        assert state_of(up, "tiny") in ("warm", "degraded")
        for empty in (sdk.generate("asleep"), sdk.chat("asleep", keep_alive="5m")):
            assert (empty.done, empty.done_reason) == (True, "load")
        assert state_of(up, "asleep") == "cold"
        assert [part.done_reason for part in sdk.generate("tiny", stream=True)] == ["load"]
        with pytest.raises(ollama.ResponseError):
            sdk.generate("nobody", keep_alive=0)


def test_a_client_waits_for_a_cold_model(up: House) -> None:
    with client(up) as sdk:
        parts = list(sdk.chat("sleepy", ASK, stream=True, options={"num_predict": 3}))
    assert "".join(part.message.content or "" for part in parts).startswith("simulated")
    assert parts[-1].done and parts[-1].load_duration and parts[-1].load_duration > 1_000_000_000


def test_how_an_ollama_is_recognised(up: House) -> None:
    assert httpx.get(up.url).text == "Ollama is running" and httpx.head(up.url).status_code == 200
    told = httpx.get(f"{up.url}/api/version").json()
    assert [int(part) for part in told["version"].split(".")] >= [0, 6, 4]
    assert httpx.head(f"{up.url}/api/version").status_code == httpx.head(f"{up.url}/api/tags").status_code == 200
    missing = httpx.post(f"{up.url}/api/pull", json={"model": "x"})
    assert missing.status_code == 404 and isinstance(missing.json()["error"], str)
    assert isinstance(httpx.get(f"{up.url}/api/chat").json()["error"], str)
