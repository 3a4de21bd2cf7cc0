"""Folding a stream into the answer that the same server gives without one."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.dialects import openai
from tests.unit.dialects import runtime_streams as streams
from tests.unit.dialects.runtime_streams import GOLDEN, RECORDED, event, llama, ollama, vllm


def answer(stream: bytes, n: int = 1) -> dict[str, Any]:
    chat = openai.ChatReader("deep-coder", include_usage=True, n=n)
    chat.feed(stream)
    chat.end()
    assert chat.error is None
    return openai.fold_chat(openai.heartbeat("waiting") + chat.take() + openai.DONE)


@pytest.mark.parametrize("case", RECORDED)
def test_the_folded_stream_equals_the_server_s_own_whole_answer(case: str) -> None:
    """Same model, seed and temperature 0: only ids and clocks may differ."""
    folded = answer(streams.recorded(case), n=2 if case == "two_choices" else 1)
    whole = json.loads((GOLDEN / f"{case}.whole.json").read_bytes())
    for known in (folded, whole):
        for changing in ("id", "created", "model"):
            assert known.pop(changing)
        for figure in [key for key in known["timings"] if not key.endswith("_n")]:
            del known["timings"][figure]
    if "include_usage" not in case and b'"usage":' not in streams.recorded(case):
        del whole["usage"]
    if case == "two_choices":  # llama.cpp tells what the last choice took; OpenAI's usage is of all
        assert whole["usage"]["completion_tokens"] == 6
        whole["usage"] |= {"completion_tokens": 12, "total_tokens": 65}
    assert folded == whole


def test_a_list_of_pieces_folds_like_one() -> None:
    stream = streams.recorded("unicode")
    assert openai.fold_chat(stream[at : at + 13] for at in range(0, len(stream), 13)) == openai.fold_chat(stream)


@pytest.mark.parametrize(
    ("stream", "ids"), [(streams.LLAMA_TOOLS, ["c0", "c1"]), (streams.OLLAMA_TOOLS, ["call_a", "call_b"])]
)
def test_tool_calls_are_put_together_from_their_fragments(stream: bytes, ids: list[str]) -> None:
    message = answer(stream)["choices"][0]["message"]
    assert message["content"] is None
    assert [call["id"] for call in message["tool_calls"]] == ids
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["read", "list"]
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] in (
        [{"path": 'a "b".py'}, {}],
        [{"path": "a.py"}, {}],
    )
    assert all(call["type"] == "function" and "index" not in call for call in message["tool_calls"])


def test_reasoning_stands_beside_the_content() -> None:
    folded = answer(streams.OLLAMA_REASONING)
    assert folded["choices"][0]["message"] == {
        "role": "assistant",
        "content": 'Hello Jürgen, "model":"qwen2.5-coder:32b" is my name',
        "reasoning": "The user greets.",
    }
    assert folded["usage"]["prompt_tokens_details"] == {"cached_tokens": 24}
    assert answer(streams.VLLM_REASONING)["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Yes.", "reasoning": "Hmm."},
        "finish_reason": "stop",
        "logprobs": None,
        "token_ids": None,
        "stop_reason": None,
    }


def test_old_function_calls_and_refusals_are_joined() -> None:
    stream = llama({"function_call": {"name": "f", "arguments": "{"}}) + llama({"function_call": {"arguments": "}"}})
    assert answer(stream + llama({}, "function_call"))["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": "{}"},
    }
    refused = answer(llama({"refusal": "I "}) + llama({"refusal": "won't"}) + llama({}, "stop"))
    assert refused["choices"][0]["message"]["refusal"] == "I won't"


def test_what_we_do_not_know_is_kept() -> None:
    stream = (
        vllm({"content": "a"}, token_ids=[1], new_thing={"x": 1})
        + vllm({"content": "b", "extra": ["p"]}, token_ids=[2, 3])
        + vllm({"content": "c", "extra": ["q"]}, "stop", stop_reason=99)
    )
    folded = answer(stream + event({"choices": [], "usage": {"prompt_tokens": 1}, "service_tier": "local"}))
    choice = folded["choices"][0]
    assert (choice["token_ids"], choice["new_thing"], choice["stop_reason"]) == ([1, 2, 3], {"x": 1}, 99)
    assert choice["message"] == {"role": "assistant", "content": "abc", "extra": ["p", "q"]}
    assert folded["service_tier"] == "local" and folded["object"] == "chat.completion"


def test_equal_surroundings_do_not_hide_what_adds_up() -> None:
    """Only text may differ between the chunks of a run; lists that repeat still grow."""
    seen = {"content": [{"token": "a", "logprob": -1}]}
    folded = answer(
        vllm({"content": "a"}, logprobs=seen) * 3 + vllm({"content": "a"}, token_ids=[1]) * 3 + vllm({}, "stop")
    )
    choice = folded["choices"][0]
    assert choice["message"]["content"] == "a" * 6
    assert choice["logprobs"]["content"] == seen["content"] * 3 and choice["token_ids"] == [1, 1, 1]
    thinking = event({"choices": [{"index": 0, "delta": {"reasoning": "a"}, "logprobs": seen}]})
    thought = openai.fold_chat(thinking * 3)["choices"][0]
    assert thought["message"]["reasoning"] == "aaa" and thought["logprobs"]["content"] == seen["content"] * 3
    named = event({"content": "x", "choices": [{"index": 0, "delta": {"content": "y"}}], "model": "m"})
    assert openai.fold_chat(named * 3)["choices"][0]["message"]["content"] == "yyy"
    more = event({"choices": [{"index": 0, "delta": {"content": "y", "k": ["z"]}}]})
    less = event({"choices": [{"index": 0, "delta": {"content": "y"}}]})
    assert openai.fold_chat(less + more * 2)["choices"][0]["message"] == {
        "role": "assistant",
        "content": "yyy",
        "k": ["z", "z"],
    }


def test_an_error_is_no_answer() -> None:
    with pytest.raises(ValueError, match="carries an error"):
        openai.fold_chat(llama({"content": "a"}) + openai.error_event("worker_lost", "gone", kind="server_error"))


shapes = st.sampled_from([ollama, llama, vllm])
text = st.text(max_size=12) | st.sampled_from(['","x":"', '"}}]', "\\", "\u2028", '"content":"', "data: [DONE]\n\n"])
deltas = st.lists(
    st.tuples(st.sampled_from(["content", "content", "content", "reasoning", "reasoning_content", "refusal"]), text),
    min_size=1,
    max_size=25,
)


@given(shape=shapes, pieces=deltas)
@settings(max_examples=200, deadline=None)
def test_no_text_is_lost_between_the_runtime_and_the_whole_answer(shape: Any, pieces: list[tuple[str, str]]) -> None:
    stream = b"".join(shape({key: piece}) for key, piece in pieces) + shape({}, "stop")
    message = answer(stream)["choices"][0]["message"]
    for key in {key for key, _ in pieces}:
        assert (message[key] or "") == "".join(piece for other, piece in pieces if other == key)
