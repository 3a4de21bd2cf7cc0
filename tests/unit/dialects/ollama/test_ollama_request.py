"""What a request in the Ollama dialect asks for, and what becomes of it on its way to a runtime."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.dialects import ollama_request, ollama_translate
from broker.dialects.ollama_request import Asked
from broker.errors import BadRequest

DROPS = frozenset({"num_ctx", "num_gpu", "keep_alive"})
PNG = "iVBORw0KGgo="


def body(**request: Any) -> bytes:
    return json.dumps({"model": "deep-coder"} | request).encode()


def chat(**request: Any) -> Asked:
    return ollama_request.read_chat(body(**{"messages": [{"role": "user", "content": "Hi"}]} | request))


def generate(**request: Any) -> Asked:
    return ollama_request.read_generate(body(**{"prompt": "Hi"} | request))


def sent(asked: Asked, **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(ollama_translate.to_chat(asked, "weights", **more))
    return told


def test_a_stream_is_what_a_client_gets_that_says_nothing() -> None:
    assert chat().stream and generate().stream and chat(stream=True).stream
    assert not chat(stream=False).stream and not generate(stream=False).stream


def test_what_admission_must_know() -> None:
    asked = chat(
        messages=[{"role": "user", "content": "x" * 400, "images": [PNG * 1000]}],
        tools=[{"type": "function", "function": {"name": "f"}}],
        options={"num_predict": 7},
        logprobs=True,
    )
    assert asked.max_tokens == 7
    assert 1100 < asked.prompt_tokens < 1200  # a picture is no text
    assert asked.needs == {"tools", "images", "logprobs"}


@pytest.mark.parametrize("limit", [-1, -2, 0, None])
def test_an_answer_without_a_bound(limit: int | None) -> None:
    asked = chat(options={"num_predict": limit})
    assert asked.max_tokens is None and "max_tokens" not in sent(asked)


def test_turns_of_a_conversation_have_one_session() -> None:
    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    later = [*first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert chat(messages=first).session == chat(messages=later).session != ""
    assert chat(messages=first).session != chat(messages=first[1:]).session


@pytest.mark.parametrize("keep_alive", [0, 0.0, "0", "0s", "0m0s", "-0"])
def test_nothing_to_say_and_no_time_to_stay_is_a_wish_to_unload(keep_alive: Any) -> None:
    assert chat(messages=[], keep_alive=keep_alive).empty == "unload"
    assert generate(prompt="", keep_alive=keep_alive).empty == "unload"
    assert chat(keep_alive=keep_alive).empty is None


@pytest.mark.parametrize("keep_alive", [None, 1, -1, "5m", "10s", "", False, {}])
def test_nothing_to_say_is_a_wish_to_load(keep_alive: Any) -> None:
    assert chat(messages=[], keep_alive=keep_alive).empty == "load"
    assert ollama_request.read_chat(body()).empty == "load"
    assert ollama_request.read_generate(body(keep_alive=keep_alive)).empty == "load"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "images": "x"}]}, "messages[0].images"),
        ({"messages": [{"role": "user", "images": [1]}]}, "messages[0].images"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "messages[0].tool_calls"),
        ({"tools": {}}, "tools"),
        ({"options": []}, "options"),
        ({"options": {"num_predict": "7"}}, "options.num_predict"),
        ({"stream": "yes"}, "stream"),
        ({"format": "xml"}, "format"),
    ],
)
def test_a_bad_chat_request_is_refused_with_a_sentence(request_: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        chat(**request_)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"prompt": 1}, "prompt"),
        ({"system": []}, "system"),
        ({"raw": "yes"}, "raw"),
        ({"context": "x"}, "context"),
        ({"images": {}}, "images"),
        ({"stream": 1}, "stream"),
    ],
)
def test_a_bad_generate_request_is_refused_with_a_sentence(request_: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        generate(**request_)
    assert refused.value.param == param


def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    deep = b'{"model":"m","messages":[{"role":"user","tool_calls":[{"function":{"name":"f","arguments":'
    for depth in (400, 900, 5_000, 200_000):
        nested = deep + b'{"a":' * depth + b"1" + b"}" * depth + b"}}]}]}"
        try:
            asked = ollama_request.read_chat(nested)
            ollama_translate.to_chat(asked, "weights")
        except BadRequest as refused:
            assert "deep" in str(refused)


# To an Ollama.


def test_an_ollama_gets_the_clients_bytes_but_for_what_must_change() -> None:
    asked = (
        b'{ "model": "deep-coder",\n "messages": [{"role":"user","content":"\\u00fc 1e400"}], "think": "high",'
        b' "options": {"num_ctx": 8192, "temperature": 0.10, "num_gpu":1}, "keep_alive": "5m", "odd": 1.00 }'
    )
    assert ollama_request.rewrite(asked, "qwen:32b", drops=DROPS) == (
        b'{ "model": "qwen:32b",\n "messages": [{"role":"user","content":"\\u00fc 1e400"}], "think": "high",'
        b' "options": {"temperature": 0.10}, "odd": 1.00,"stream":true,"keep_alive":-1 }'
    )


def test_a_client_cannot_say_how_long_a_model_stays() -> None:
    for keep_alive in (0, "1h", -1, None):
        told = json.loads(ollama_request.rewrite(body(keep_alive=keep_alive, stream=False), "q", drops=DROPS))
        assert told["keep_alive"] == -1 and told["stream"] is True


# Through chat.


def test_options_become_sampling_parameters() -> None:
    options = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "num_predict": 12, "stop": ["\n"],
        "repeat_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2, "repeat_last_n": 64, "num_keep": 4,
        "num_ctx": 8192, "num_gpu": 99, "num_thread": 8, "use_mmap": True, "made_up": 1, "typical_p": None,
    }  # fmt: skip
    told = sent(chat(options=options))
    assert {key: told[key] for key in told if key not in ("model", "messages", "stream", "stream_options")} == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "max_tokens": 12, "stop": ["\n"],
        "repeat_penalty": 1.1, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "repeat_last_n": 64, "n_keep": 4,
    }  # fmt: skip
    assert told["model"] == "weights" and told["stream"] is True and told["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (None, None),
        ("", None),
        ({}, None),
        ("json", {"type": "json_object"}),
        ({"type": "object"}, {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}),
    ],
)
def test_a_format_is_a_response_format(form: Any, told: Any) -> None:
    assert sent(chat(format=form)).get("response_format") == told


@pytest.mark.parametrize(
    ("think", "told"),
    [
        (True, {"chat_template_kwargs": {"enable_thinking": True}}),
        (False, {"chat_template_kwargs": {"enable_thinking": False}}),
        ("high", {"reasoning_effort": "high"}),
        (None, {}),
        ("odd", {}),
    ],
)
def test_how_a_model_is_told_to_think(think: Any, told: dict[str, Any]) -> None:
    found = sent(chat(think=think))
    assert {key: found[key] for key in ("chat_template_kwargs", "reasoning_effort") if key in found} == told


def test_pictures_become_urls() -> None:
    (message,) = sent(chat(messages=[{"role": "user", "content": "What?", "images": [PNG, "/9j/4AA", "data:x"]}]))[
        "messages"
    ]
    assert message["content"] == [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4AA"}},
        {"type": "image_url", "image_url": {"url": "data:x"}},
    ]


def test_tool_calls_and_their_answers_find_each_other() -> None:
    def called(name: str, **arguments: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": arguments}}

    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [called("f", x="ü"), called("g"), called("f", x=2)], "thinking": "Hm"},
        {"role": "tool", "tool_name": "g", "content": "of g"},
        {"role": "tool", "tool_name": "f", "content": "of the first f"},
        {"role": "tool", "content": "of the second"},
        {"role": "assistant", "content": None, "tool_calls": [called("h"), {"id": "mine", **called("h")}]},
        {"role": "tool", "tool_call_id": "mine", "tool_name": "h", "content": "of h"},
        {"role": "tool", "tool_name": "odd", "content": "of the last"},
        {"role": "tool", "content": "of nothing"},
    ]
    told = sent(chat(messages=messages))["messages"]
    assert told[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm",
        "tool_calls": [
            {"id": "call_1_0", "type": "function", "function": {"name": "f", "arguments": '{"x": "ü"}'}},
            {"id": "call_1_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            {"id": "call_1_2", "type": "function", "function": {"name": "f", "arguments": '{"x": 2}'}},
        ],
    }
    answers = [(m["content"], m["tool_call_id"]) for m in told if m["role"] == "tool"]
    assert answers == [
        ("of g", "call_1_1"), ("of the first f", "call_1_0"), ("of the second", "call_1_2"), ("of h", "mine"),
        ("of the last", "call_5_0"), ("of nothing", "call_unknown"),
    ]  # fmt: skip


def test_a_later_turn_begins_with_the_same_words() -> None:
    """Else the runtime would read the whole conversation again."""
    first = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": [1.5]}}}]},
        {"role": "tool", "tool_name": "f", "content": "x"},
    ]
    later = [*first, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    assert sent(chat(messages=later))["messages"][:3] == sent(chat(messages=first))["messages"]


def test_tools_go_on_as_they_are() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    assert sent(chat(tools=tools))["tools"] == tools


def test_a_prompt_is_a_message() -> None:
    told = sent(generate(prompt="Why?", system="Be brief.", images=[PNG]))
    assert told["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in told["messages"][1]["content"]] == ["text", "image_url"]
    assert sent(generate(prompt="Why?"))["messages"] == [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    "only", [{"raw": True}, {"context": [1, 2]}, {"template": "{{ .Prompt }}"}, {"suffix": "return"}]
)
def test_what_only_an_ollama_can_do_is_refused_elsewhere(only: dict[str, Any]) -> None:
    asked = generate(**only)
    assert "native" in asked.needs
    with pytest.raises(BadRequest, match="Ollama serves") as refused:
        ollama_translate.to_chat(asked, "weights")
    assert refused.value.param == next(iter(only))


@pytest.mark.parametrize("nothing", [{"raw": False}, {"context": []}, {"template": ""}, {"suffix": ""}])
def test_what_is_not_asked_for_is_not_refused(nothing: dict[str, Any]) -> None:
    assert generate(**nothing).needs == frozenset()


def test_a_slot_is_named_and_what_a_runtime_must_not_see_is_left_out() -> None:
    told = sent(chat(options={"top_k": 3}), slot=2, drops={"top_k"}, extra={"cache_prompt": True})
    assert told["id_slot"] == 2 and told["cache_prompt"] is True and "top_k" not in told


def test_a_provider_hears_nothing_but_openais_own_words() -> None:
    """It would refuse the whole request over one key that it does not know."""
    asked = chat(
        messages=[{"role": "assistant", "content": "a", "thinking": "hm"}],
        options={"temperature": 0, "top_k": 3, "repeat_penalty": 1.1, "num_predict": 5, "stop": ["x"]},
        think=False,
        format="json",
    )
    told = sent(asked, plain=True)
    assert set(told) == {
        "model", "messages", "stream", "stream_options", "temperature", "max_tokens", "stop", "response_format",
    }  # fmt: skip
    assert told["messages"] == [{"role": "assistant", "content": "a"}]


def test_logprobs_are_asked_for() -> None:
    told = sent(chat(logprobs=True, top_logprobs=3))
    assert told["logprobs"] is True and told["top_logprobs"] == 3


@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text()},
            optional={"thinking": st.text(), "tool_name": st.text()},
        ),
        min_size=1,
    )
)
def test_no_word_of_a_conversation_is_lost(messages: list[dict[str, Any]]) -> None:
    told = sent(chat(messages=messages))["messages"]
    assert [(m["role"], m["content"]) for m in told] == [(m["role"], m["content"]) for m in messages]
