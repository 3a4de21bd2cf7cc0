"""What clients of the Ollama dialect are told of models, read by the stock client's own types."""

import json

import ollama
import pytest

from broker.dialects import ollama_models
from broker.dialects.ollama_models import Shown
from broker.errors import BadRequest

CODER = Shown("deep-coder", "ab" * 32, 7 << 30, "gguf", False, 32_768, "llama.cpp")
VECTORS = Shown("vectors", "cd" * 32, 0, "", True, None, "openai")


def test_the_client_reads_the_list() -> None:
    told = ollama.ListResponse(**ollama_models.tags([CODER, VECTORS]))
    assert [(m.model, m.size, m.digest) for m in told.models] == [
        ("deep-coder", 7 << 30, "ab" * 32),
        ("vectors", 0, "cd" * 32),
    ]
    assert told.models[0].details is not None and told.models[0].details.format == "gguf"


def test_the_client_reads_what_is_loaded() -> None:
    told = ollama.ProcessResponse(**ollama_models.running([(CODER, 8 << 30, "2026-09-21T14:13:20.123456Z")]))
    (loaded,) = told.models
    assert (loaded.size, loaded.size_vram, loaded.context_length) == (8 << 30, 8 << 30, 32_768)
    assert loaded.expires_at is not None and loaded.expires_at.year == 2026


def test_the_client_reads_what_a_model_can_do() -> None:
    told = ollama.ShowResponse(**ollama_models.show(CODER))
    assert told.capabilities == ["completion", "tools"] and told.modelinfo is not None
    architecture = told.modelinfo["general.architecture"]
    assert told.modelinfo[f"{architecture}.context_length"] == 32_768
    vectors = ollama.ShowResponse(**ollama_models.show(VECTORS))
    assert vectors.capabilities == ["embedding"]
    assert not any(key.endswith("context_length") for key in vectors.modelinfo or {})


def test_a_digest_names_the_definition() -> None:
    first = {"backend": "llama.cpp", "model": "a.gguf"}
    assert ollama_models.digest(first) == ollama_models.digest(dict(reversed(first.items())))
    assert ollama_models.digest(first) != ollama_models.digest(first | {"model": "b.gguf"})
    assert len(ollama_models.digest(first)) == 64


@pytest.mark.parametrize("body", [{"model": "m"}, {"name": "m"}, {"model": "m", "name": "other"}])
def test_which_model_is_asked_about(body: dict[str, str]) -> None:
    assert ollama_models.asked_to_show(json.dumps(body).encode()) == "m"


@pytest.mark.parametrize("body", [b"{}", b'{"model":7}', b"[]", b""])
def test_no_model_is_asked_about(body: bytes) -> None:
    with pytest.raises(BadRequest):
        ollama_models.asked_to_show(body)
