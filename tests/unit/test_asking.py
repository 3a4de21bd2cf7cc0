"""How a job is asked of a runtime that speaks its dialect, and of one that does not."""

import json
from typing import Any

import pytest

from broker import errors
from broker.capabilities import cannot_do
from broker.policy import Model
from broker.records import JobRecord
from workers.asking import Asking
from workers.runtimes.base import Endpoint

NATIVE = frozenset({"/v1/messages", "/api/chat", "/api/generate", "/api/embed", "/api/embeddings"})
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/api/chat": {"messages": [{"role": "user", "content": "Hi"}], "options": {"num_ctx": 9, "top_p": 0.5}},
    "/api/generate": {"prompt": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "top_p": 0.5, "top_k": 3},
    "/api/embed": {"input": "Hi"},
    "/api/embeddings": {"prompt": "Hi"},
}


def asking(endpoint: str, *, speaks: frozenset[str] = frozenset(), **keys: Any) -> Asking:
    job = JobRecord(id="j", endpoint=endpoint, model="coder", submitted_at=1000, claimed_at=3500)
    body = json.dumps({"model": "alias", **BODIES[endpoint]}).encode()
    to = Endpoint("http://x", model="weights", drops=frozenset({"num_ctx", "keep_alive"}), speaks=speaks, **keys)
    return Asking(job, body, to)


@pytest.mark.parametrize("endpoint", BODIES)
def test_a_runtime_that_speaks_the_dialect_is_asked_in_it(endpoint: str) -> None:
    asked = asking(endpoint, speaks=NATIVE)
    told = json.loads(asked.request(None))
    assert asked.path == endpoint
    known = {key: value for key, value in BODIES[endpoint].items() if key != "options"}
    assert told["model"] == "weights" and known.items() <= told.items()


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        ("/api/chat", "/v1/chat/completions"),
        ("/api/generate", "/v1/chat/completions"),
        ("/v1/messages", "/v1/chat/completions"),
        ("/api/embed", "/v1/embeddings"),
        ("/api/embeddings", "/v1/embeddings"),
    ],
)
def test_any_other_is_asked_in_openais(endpoint: str, path: str) -> None:
    asked = asking(endpoint, query="autoload=false", extra={"return_progress": True})
    told = json.loads(asked.request(None))
    assert asked.path == f"{path}?autoload=false"
    assert told["model"] == "weights" and told["return_progress"] is True and "options" not in told
    assert ("messages" in told) == (path == "/v1/chat/completions")


@pytest.mark.parametrize("endpoint", ["/api/chat", "/v1/messages"])
def test_a_slot_is_named_in_a_translation(endpoint: str) -> None:
    assert json.loads(asking(endpoint).request(3))["id_slot"] == 3
    assert "id_slot" not in json.loads(asking(endpoint, speaks=NATIVE).request(3))


@pytest.mark.parametrize("endpoint", ["/api/chat", "/v1/messages"])
def test_a_runtime_that_lacks_the_dialect_after_all_is_asked_in_openais(endpoint: str) -> None:
    """Once: what chat answers stands."""
    asked = asking(endpoint, speaks=NATIVE)
    assert asked.translate_instead() and not asked.translate_instead()
    assert asked.path == "/v1/chat/completions" and json.loads(asked.request(1))["id_slot"] == 1
    assert not asking("/v1/chat/completions").translate_instead()
    assert not asking("/api/embed", speaks=NATIVE).translate_instead()


@pytest.mark.parametrize("endpoint", ["/api/chat", "/v1/messages"])
def test_a_provider_gets_no_word_that_it_does_not_know(endpoint: str) -> None:
    told = json.loads(asking(endpoint, metered=True).request(None))
    assert told.keys() == {"model", "messages", "stream", "stream_options", "top_p"}


def test_the_wait_counts_as_load() -> None:
    """As at an Ollama, whose load duration holds its own queue."""
    reader = asking("/api/chat").reader()
    reader.feed(b'data: {"model":"w","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n')
    reader.end()
    assert json.loads(reader.take().split(b"\n")[1])["load_duration"] == 2_500_000_000


@pytest.mark.parametrize(("backend", "able"), [("ollama", True), ("llama.cpp", False), ("vllm", False)])
def test_what_only_an_ollama_can_do_enters_no_other_lane(backend: str, able: bool) -> None:
    model = Model.model_validate({"backend": backend, "model": "m"})
    refusal = cannot_do(JobRecord(id="j", endpoint="/api/generate", needs="images native"), "coder", model)
    assert (refusal is None) == able
    assert refusal is None or isinstance(refusal, errors.WrongEndpoint)
    assert cannot_do(JobRecord(id="j", endpoint="/api/generate", needs="images"), "coder", model) is None
