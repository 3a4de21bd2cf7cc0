"""Vectors of a real llama.cpp through the gateway, asked for with the stock OpenAI SDK."""

import math
from collections.abc import Iterator

import openai
import pytest

from tests.conformance.conftest import Llama
from tests.support.clients import sdk, user
from tests.support.gateway_process import House, gateway, house
from tests.support.worker_world import policy

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[House]:
    """One model of vectors, one whose server was started without --embeddings, and one that chats."""
    vectors = llama(pooling="mean", embeddings=True, maxConcurrent=2, maxQueue=20)
    models = {"embed-small": vectors, "blind": llama(embeddings=True), "tiny": llama()}
    with house(tmp_path_factory.mktemp("vectors") / "data", policy=policy(models)) as up:
        for name in ("embed-small", "tiny"):
            up.until_state(name, "warm")
        yield up


def likeness(one: list[float], two: list[float]) -> float:
    return sum(a * b for a, b in zip(one, two, strict=True)) / math.hypot(*one) / math.hypot(*two)


def test_the_sdk_gets_real_vectors(up: House) -> None:
    """In base64, which it asks for by itself, and as numbers; for texts and for token numbers; alike for the same."""
    with sdk(up.url, max_retries=0) as client:
        found = client.embeddings.create(model="embed-small", input=["balu bide", "balu bide", "7 + 4 = 11"])
        one, again, other = (entry.embedding for entry in found.data)
        assert found.model == "embed-small" and found.usage.prompt_tokens > 6
        assert len(one) == 64
        assert likeness(one, again) > 0.999 > likeness(one, other)
        floats = client.embeddings.create(model="embed-small", input="balu bide", encoding_format="float")
        assert likeness(floats.data[0].embedding, one) > 0.999
        tokens = client.embeddings.create(model="embed-small", input=[[300, 301], [302]])
        assert len(tokens.data) == 2 and tokens.usage.prompt_tokens == 3
        many = client.embeddings.create(model="embed-small", input=[f"balu {number}" for number in range(64)])
        assert [entry.index for entry in many.data] == list(range(64))


def test_an_input_beyond_the_servers_batch_is_the_clients_to_mend(up: House) -> None:
    """llama-server answers 500 to it; the SDK would repeat a 5xx, and every host would fail in turn."""
    with sdk(up.url, max_retries=0) as client, pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="embed-small", input="7 " * 400)
    assert caught.value.code == "context_length_exceeded"
    assert "too large to process" in caught.value.message


def test_chat_is_not_for_a_model_of_vectors(up: House) -> None:
    with sdk(up.url, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as chat:
            client.chat.completions.create(model="embed-small", messages=user("hi"))
        with pytest.raises(openai.BadRequestError) as vectors:
            client.embeddings.create(model="tiny", input="hi")
    assert chat.value.code == vectors.value.code == "wrong_endpoint"


def test_status_shows_its_first_vector_and_why_another_has_none(up: House) -> None:
    up.until_state("blind", "quarantined")
    shown = gateway("status", GATEWAY_URL=up.url).stdout
    [row] = [line.split() for line in shown.splitlines() if line.startswith("embed-small")]
    assert (row[1], row[3]) == ("warm", "0/20")
    assert row[2].endswith("ms")
    assert "model 'blind' gives no vectors: its command needs --embeddings" in shown
