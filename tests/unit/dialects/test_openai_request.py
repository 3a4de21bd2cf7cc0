"""Reading and rewriting chat requests."""

import json
from typing import Any

import pytest

from broker.dialects import openai
from broker.errors import BadRequest

HELLO = [{"role": "system", "content": "You write code."}, {"role": "user", "content": "Hello, Jürgen"}]


def body(**changes: Any) -> bytes:
    return json.dumps({"model": "deep-coder", "messages": HELLO} | changes).encode()


def test_a_plain_request_asks_for_one_whole_answer_with_usage() -> None:
    facts = openai.read_chat(body())
    assert (facts.model, facts.stream, facts.include_usage, facts.n) == ("deep-coder", False, True, 1)
    assert (facts.max_tokens, facts.needs) == (None, frozenset())


def test_a_stream_shows_its_usage_only_to_those_who_ask() -> None:
    assert not openai.read_chat(body(stream=True)).include_usage
    assert openai.read_chat(body(stream=True, stream_options={"include_usage": True})).include_usage
    assert not openai.read_chat(body(stream=True, stream_options=None)).include_usage


def test_needs_are_read_from_tools_pictures_and_logprobs() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture]}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    facts = openai.read_chat(body(messages=messages, tools=tools, logprobs=True, top_logprobs=2))
    assert facts.needs == {"tools", "images", "logprobs"}
    assert 1024 < facts.prompt_tokens < 1100  # the base64 is not text
    assert openai.read_chat(body(tools=[], logprobs=False)).needs == frozenset()


@pytest.mark.parametrize(("text", "tokens"), [("abcd" * 1000, 1000), ("é" * 1000, 500), ("日" * 1000, 750)])
def test_the_prompt_estimate_counts_a_token_for_four_bytes(text: str, tokens: int) -> None:
    for content in (text, [{"type": "text", "text": text}]):
        estimate = openai.read_chat(body(messages=[{"role": "user", "content": content}])).prompt_tokens
        assert tokens <= estimate <= tokens + 10
    tools = [{"type": "function", "function": {"name": "x", "description": "abcd" * 1000}}]
    assert openai.read_chat(body(tools=tools)).prompt_tokens > 1000


def test_turns_of_one_conversation_share_a_session() -> None:
    later = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}]
    first = openai.read_chat(body()).session
    assert openai.read_chat(body(messages=later, temperature=1)).session == first
    assert openai.read_chat(body(messages=[HELLO[0], {"role": "user", "content": "Other"}])).session != first
    assert openai.read_chat(body(prompt_cache_key="agent-7")).session == "agent-7"
    long_key = openai.read_chat(body(prompt_cache_key="k\n" * 500)).session
    assert len(long_key) < 64 and long_key.isprintable() and long_key != first


def test_the_newer_name_of_the_answer_bound_wins() -> None:
    assert openai.read_chat(body(max_tokens=5)).max_tokens == 5
    assert openai.read_chat(body(max_tokens=5, max_completion_tokens=9)).max_tokens == 9


def test_a_lone_surrogate_is_the_runtime_s_to_judge() -> None:
    facts = openai.read_chat(b'{"model":"m","messages":[{"role":"user","content":"\\ud800 x"}],"what":["ever"]}')
    assert facts.model == "m" and facts.session


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": ["a"]}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}, "hi"]}, "messages[1]"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": True}, "max_tokens"),
    ],
)
def test_a_wrong_field_is_named_in_the_refusal(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        openai.read_chat(body(**changes))
    assert refused.value.param == param
    assert str(refused.value).startswith(param)


@pytest.mark.parametrize("sent", [b"", b"null", b"[]", b"{", b'{"model":"m"', b'{"messages":[]}', b"\xff"])
def test_a_body_that_is_no_chat_request_is_refused(sent: bytes) -> None:
    with pytest.raises(BadRequest):
        openai.read_chat(sent)


def test_messages_nested_to_the_limit_are_refused_not_fatal() -> None:
    for depth in (200, 900, 5000):
        sent = b'{"model":"m","messages":[{"role":"user","content":' + b"[" * depth + b"]" * depth + b"}]}"
        try:
            assert openai.read_chat(sent).model == "m"
        except BadRequest as refused:
            assert "nested too deeply" in str(refused)


def test_rewriting_changes_only_what_must_change() -> None:
    sent = (
        b'{ "stream_options" : {"x":1.50, "include_usage":false},\n "messages":[{"role":"user","content":"\\u00e9"}],'
        b'"seed":18446744073709551615,"model":"fast-edit","extra":{"model":"fast-edit","stream":false}}'
    )
    assert openai.rewrite_chat(sent, "qwen2.5-coder:32b") == (
        b'{ "stream_options" : {"x":1.50, "include_usage":true},\n "messages":[{"role":"user","content":"\\u00e9"}],'
        b'"seed":18446744073709551615,"model":"qwen2.5-coder:32b","extra":{"model":"fast-edit","stream":false},'
        b'"stream":true}'
    )


def test_what_a_runtime_must_not_see_is_taken_out_also_of_its_options() -> None:
    """aider and Cline send another num_ctx with each call; Ollama would load the model again for each."""
    sent = (
        b'{"model":"m","keep_alive":"5m","messages":[{"role":"user","content":"num_ctx"}],'
        b'"options":{"num_ctx":9216,"temperature":0.10},"num_ctx":8192,"stream":true}'
    )
    drops = frozenset({"num_ctx", "keep_alive"})
    assert openai.rewrite_chat(sent, "m", drops=drops, extra={"return_progress": True}) == (
        b'{"model":"m","messages":[{"role":"user","content":"num_ctx"}],"options":{"temperature":0.10},"stream":true,'
        b'"stream_options":{"include_usage":true},"return_progress":true}'
    )
    assert b"9216" in openai.rewrite_chat(sent, "m"), "others may have it"
    twice = b'{"options":{"num_ctx":1},"options":{"top_k":2,"num_ctx":3}}'
    assert openai.rewrite_chat(twice, "m", drops=drops).startswith(b'{"options":{"top_k":2},"options":{"top_k":2},')
    assert b'"options":7' in openai.rewrite_chat(b'{"options":7}', "m", drops=drops)


@pytest.mark.parametrize("options", ["null", "{}", '{"include_usage":true}'])
def test_rewriting_always_asks_for_usage(options: str) -> None:
    sent = b'{"model":"m","stream":false,"stream_options":%s}' % options.encode()
    assert openai.rewrite_chat(sent, "m") == b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'


def test_our_own_words_are_safe_in_a_stream() -> None:
    """`id:` and `retry:` lines crash openai-python, and a newline in a note would end the comment."""
    assert openai.heartbeat("waiting\ndata: x") == b": warmlane waiting data: x\n\n"
    sent = openai.error_event("lane_full", "try\nlater", kind="server_error", retry_after_s=4)
    assert sent.startswith(b'data: {"error":{') and sent.endswith(b"}}\n\n") and sent.count(b"\n") == 2
    assert json.loads(sent[6:]) == openai.error_object("lane_full", "try\nlater", kind="server_error", retry_after_s=4)
    assert "retry_after_s" not in openai.error_object("invalid_request", "no", kind="invalid_request_error")["error"]
    assert [entry["id"] for entry in openai.models_list(["a", "b"])["data"]] == ["a", "b"]
