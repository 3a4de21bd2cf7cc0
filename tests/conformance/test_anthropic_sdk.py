"""What the stock Anthropic client makes of us, over a real llama.cpp that is asked through its chat."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import pytest

from tests.conformance.conftest import Llama
from tests.support.gateway_process import House, house
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

ASK: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 12,
    "extra_body": {"temperature": 0},  # a word that this version of the client does not know any more
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Say something."}]}],
    "metadata": {"user_id": "user_1_session_2"},
}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[House]:
    """One real model, and one that is slow to load."""
    models = {
        "tiny": llama(maxConcurrent=2, maxQueue=8, aliases=["claude-for-us"]),
        "sleepy": simulated(keepWarm=False, memoryMb=1, options={"coldStartMs": 1500}),
    }
    with house(tmp_path_factory.mktemp("anthropic") / "data", policy=policy(models, headerHoldMs=300)) as up:
        up.until_state("tiny", "warm")
        yield up


@contextmanager
def client(up: House) -> Iterator[anthropic.Anthropic]:
    """The client as it comes, pointed at a gateway."""
    with anthropic.Anthropic(base_url=up.url, api_key="any") as found:
        yield found


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_the_whole_answer_is_the_streamed_one(up: House) -> None:
    """The weights are random, so greedy."""
    with client(up) as sdk:
        with sdk.messages.stream(**ASK) as stream:
            pieces = list(stream.text_stream)
            streamed = stream.get_final_message()
        whole = sdk.messages.create(**ASK)
    assert len(pieces) >= 2 and "".join(pieces) == text_of(streamed) == text_of(whole) != ""
    for message in (streamed, whole):
        assert (message.model, message.role, message.stop_reason) == ("tiny", "assistant", "max_tokens")
        assert message.usage.output_tokens == 12
        assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 20


def test_the_answer_is_what_llama_cpp_says_to_its_own_chat(up: House) -> None:
    chat = {
        "model": "tiny",
        "max_tokens": 12,
        "temperature": 0,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}],
    }
    direct = httpx.post(f"{up.url}/v1/chat/completions", json=chat, timeout=60).json()
    with client(up) as sdk:
        assert text_of(sdk.messages.create(**ASK)) == direct["choices"][0]["message"]["content"]


def test_a_stop_sequence_stops(up: House) -> None:
    with client(up) as sdk:
        plain = text_of(sdk.messages.create(**ASK))
        word = plain[len(plain) // 2 :][:3]
        cut = sdk.messages.create(**ASK, stop_sequences=[word])
    assert text_of(cut) == plain[: plain.index(word)] and cut.stop_reason == "end_turn"


def test_an_alias_serves_a_client_that_knows_only_claude(up: House) -> None:
    with client(up) as sdk:
        found = sdk.beta.messages.create(**(ASK | {"model": "claude-for-us", "max_tokens": 2}), betas=["x-1"])
        counted = sdk.messages.count_tokens(model="claude-for-us", messages=ASK["messages"])
    assert found.model == "tiny" and counted.input_tokens > 0


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"messages": [{"role": "user", "content": "def f(x):\n\treturn x ** 2  # größer\n" * 10}]},
        {"tools": [{"name": "read", "description": "Reads a file.", "input_schema": {"type": "object"}}]},
        {"messages": [*ASK["messages"], {"role": "assistant", "content": "Badu"}]},
    ],
    ids=["short", "code", "tools", "continued"],
)
def test_the_count_of_tokens_is_the_runtimes_own(up: House, more: dict[str, Any]) -> None:
    """To the token what the answer says of the same prompt; an estimate is a quarter of its bytes."""
    asked = ASK | more
    with client(up) as sdk:
        counting = {key: asked[key] for key in ("model", "system", "messages", "tools") if key in asked}
        counted = sdk.messages.with_raw_response.count_tokens(**counting)
        answer = sdk.messages.create(**(asked | {"max_tokens": 1}))
    usage = answer.usage
    assert counted.parse().input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert "x-gateway-estimate" not in counted.headers


def test_a_conversation_that_the_client_began_is_continued(up: House) -> None:
    turns = [*ASK["messages"], {"role": "assistant", "content": "Badu"}]
    with client(up) as sdk:
        found = text_of(sdk.messages.create(**(ASK | {"messages": turns})))
    assert found and not found.startswith("Badu")


def test_what_cannot_be_done_is_said_with_a_status(up: House) -> None:
    asked: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "nobody"}, 404, "not_found_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "invalid_request_error"),
        ({"extra_body": {"temperature": "hot"}}, 400, "invalid_request_error"),
    ]
    with client(up) as sdk:
        for changes, status, word in asked:
            with pytest.raises(anthropic.APIStatusError) as refused:
                sdk.messages.create(**(ASK | changes))
            assert refused.value.status_code == status
            assert refused.value.body["error"]["type"] == word  # type: ignore[index]


def test_a_client_waits_for_a_cold_model(up: House) -> None:
    with client(up) as sdk:
        with sdk.messages.stream(**(ASK | {"model": "sleepy", "max_tokens": 3})) as stream:
            message = stream.get_final_message()
    assert text_of(message).startswith("simulated") and message.stop_reason == "max_tokens"


def test_how_claude_code_looks_for_its_gateway(up: House) -> None:
    assert httpx.head(up.url).status_code == 200
    missing = httpx.post(f"{up.url}/v1/messages/batches", json={})
    assert missing.status_code == 404 and missing.json()["type"] == "error"
