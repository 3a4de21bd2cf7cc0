"""What we read of a messages request, and the chat request that is made of it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.dialects import anthropic
from broker.dialects.anthropic_translate import to_chat
from broker.errors import BadRequest

TOOL = {"name": "read", "description": "Reads.", "input_schema": {"type": "object"}, "cache_control": {"type": "x"}}
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBOR" * 1000}}
TURN = [
    {"role": "user", "content": [{"type": "text", "text": "Read a.py."}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "I must read.", "signature": "s"},
            {"type": "text", "text": "I read."},
            {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "ä.py"}},
            {"type": "tool_use", "id": "toolu_2", "name": "read", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "x = 1"}, PICTURE]},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such file", "is_error": True},
            {"type": "text", "text": "Go on."},
        ],
    },
]


def body(**more: object) -> bytes:
    request = {"model": "deep-coder", "max_tokens": 64, "messages": [{"role": "user", "content": "Hello."}]} | more
    return json.dumps({key: value for key, value in request.items() if value is not None}).encode()


def chat(*, plain: bool = False, **more: object) -> dict[str, Any]:
    asked = anthropic.read_messages(body(**more))
    told: dict[str, Any] = json.loads(to_chat(asked, "weights", plain=plain))
    return told


def test_what_admission_must_know_is_read() -> None:
    asked = anthropic.read_messages(body(stream=True, tools=[TOOL], messages=TURN, system="Be brief."))
    assert (asked.model, asked.stream, asked.max_tokens) == ("deep-coder", True, 64)
    assert asked.needs == {"tools", "images"}
    assert 1024 < asked.prompt_tokens < 1200  # one picture, whose base64 is no text
    assert anthropic.read_messages(body()).stream is False


def test_a_session_lasts_over_its_turns_and_over_moving_cache_marks() -> None:
    """The worker finds a session's prompt cache by it; Claude Code's books come first in its system prompt and change
    with every request."""

    def session(line: str, mark: object, turns: list[Any], user: str = "u_session_1") -> str:
        system = [
            {"type": "text", "text": f"{anthropic.BILLING_LINE} cch={line};"},
            {"type": "text", "text": "You code."} | ({"cache_control": mark} if mark else {}),
        ]
        return anthropic.read_messages(body(system=system, messages=turns, metadata={"user_id": user})).session

    first = session("1", {"type": "ephemeral"}, TURN[:1])
    assert session("2", None, TURN) == first
    assert session("1", None, TURN, user="u_session_2") != first
    assert session("1", None, [{"role": "user", "content": "Another."}]) != first


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"system": 3}, "system"),
        ({"tools": [3]}, "tools"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
    ],
)
def test_a_wrong_request_is_refused_by_the_place_of_its_fault(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        anthropic.read_messages(body(**changes))
    assert refused.value.param == param


def test_a_deeply_nested_request_is_refused_in_words() -> None:
    deep = b'{"type":"x","y":[' * 3000 + b"]}" * 3000
    with pytest.raises(BadRequest, match="nested too deeply"):
        anthropic.read_messages(b'{"model":"m","messages":[{"role":"user","content":[' + deep + b"]}]}")


def test_a_whole_conversation_is_translated() -> None:
    told = chat(messages=TURN, system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}])
    call = {"id": "toolu_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "ä.py"}'}}
    empty = {"id": "toolu_2", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    url = f"data:image/png;base64,{PICTURE['source']['data']}"
    assert told["messages"] == [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "Read a.py."},
        {
            "role": "assistant",
            "content": "I read.",
            "reasoning_content": "I must read.",
            "tool_calls": [call, empty],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "x = 1"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no such file"},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Go on."}],
        },
    ]
    assert told["model"] == "weights" and told["stream"] is True
    assert told["stream_options"] == {"include_usage": True}


def test_tools_and_sampling_are_translated() -> None:
    told = chat(
        tools=[TOOL, {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        stop_sequences=["END"],
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "max", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        metadata={"user_id": "u"},
        service_tier="auto",
    )
    told.pop("messages")
    assert told == {
        "model": "weights",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "stop": ["END"],
        "tools": [
            {
                "type": "function",
                "function": {"name": "read", "description": "Reads.", "parameters": {"type": "object"}},
            }
        ],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": True},
        "reasoning_effort": "high",
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
    }


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "read"}, {"type": "function", "function": {"name": "read"}}),
    ],
)
def test_each_choice_of_a_tool_is_translated(choice: dict[str, str], told: object) -> None:
    assert chat(tools=[TOOL], tool_choice=choice)["tool_choice"] == told


def test_a_provider_gets_no_key_that_is_not_openais() -> None:
    told = chat(
        plain=True, top_k=3, thinking={"type": "disabled"}, messages=[*TURN, {"role": "assistant", "content": "So"}]
    )
    assert "reasoning_content" not in json.dumps(told)
    assert not {"top_k", "chat_template_kwargs", "continue_final_message", "add_generation_prompt"} & told.keys()


def test_an_answer_that_its_client_began_is_continued() -> None:
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    told = chat(messages=begun)
    assert (told["continue_final_message"], told["add_generation_prompt"]) == (True, False)
    assert "continue_final_message" not in chat()


def test_the_slot_and_what_the_runtime_must_see_are_set_and_what_it_must_not_is_left_out() -> None:
    asked = anthropic.read_messages(body(top_k=3))
    told = json.loads(to_chat(asked, "w", slot=2, drops={"top_k"}, extra={"return_progress": True}))
    assert (told["id_slot"], told["return_progress"]) == (2, True)
    assert "top_k" not in told


def test_documents_of_text_are_read_and_others_refused() -> None:
    text = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "words"}}
    assert chat(messages=[{"role": "user", "content": [text]}])["messages"][0]["content"] == "T\nwords"
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi"}}
    with pytest.raises(BadRequest, match="must be text"):
        chat(messages=[{"role": "user", "content": [pdf]}])
    with pytest.raises(BadRequest, match="picture"):
        file = {"type": "image", "source": {"type": "file", "file_id": "f"}}
        chat(messages=[{"role": "user", "content": [file]}])


@pytest.mark.parametrize(
    ("block", "files"),
    [
        ({"type": "document", "source": {"type": "base64", "data": "JVBERi"}}, True),
        ({"type": "document", "source": {"type": "url", "url": "http://x"}}, True),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, True),
        ({"type": "document", "source": {"type": "text", "data": "words"}}, False),
        (PICTURE, False),
    ],
)
def test_files_are_seen_at_the_door(block: dict[str, Any], files: bool) -> None:
    """No model is loaded for a request that its runtime cannot read."""
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
    for content in ([block], [result]):
        asked = anthropic.read_messages(body(messages=[{"role": "user", "content": content}]))
        assert ("files" in asked.needs) is files


def test_the_books_of_claude_code_are_no_prompt() -> None:
    system = [{"type": "text", "text": f"{anthropic.BILLING_LINE} cch=1;"}, {"type": "text", "text": "You code."}]
    assert chat(system=system)["messages"][0] == {"role": "system", "content": "You code."}
    assert [m["role"] for m in chat(system=system[:1])["messages"]] == ["user"]


word = st.text(alphabet=st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12)
block = st.one_of(
    word.map(lambda text: {"type": "text", "text": text}),
    word.map(lambda text: {"type": "tool_result", "tool_use_id": "t", "content": text}),
    word.map(lambda text: {"type": "search_result", "title": text}),
    word.map(lambda text: {"type": "document", "source": {"type": "text", "data": text}}),
)


@given(st.lists(block, min_size=1, max_size=6))
def test_no_word_of_a_user_is_lost(blocks: list[dict[str, Any]]) -> None:
    said = [value for inner in blocks for value in _words(inner)]
    told = " ".join(
        str(message["content"]) for message in chat(messages=[{"role": "user", "content": blocks}])["messages"]
    )
    assert all(value in told or json.dumps(value, ensure_ascii=False)[1:-1] in told for value in said)


def _words(block: dict[str, Any]) -> list[str]:
    if "source" in block:
        return [block["source"]["data"]]
    return [block[key] for key in ("text", "content", "title") if key in block]


def test_a_native_request_keeps_every_byte_but_model_and_stream() -> None:
    raw = b'{ "model":"m", "x": 1.0e2, "messages":[ {"role":"user","content":"\\u00e4"} ] }'
    assert anthropic.rewrite_messages(raw, "weights") == (
        b'{ "model":"weights", "x": 1.0e2, "messages":[ {"role":"user","content":"\\u00e4"} ],"stream":true }'
    )


@pytest.mark.parametrize(
    ("status", "told", "kind"),
    [
        (400, 400, "invalid_request_error"),
        (401, 401, "authentication_error"),
        (403, 403, "permission_error"),
        (404, 404, "not_found_error"),
        (413, 413, "request_too_large"),
        (422, 422, "invalid_request_error"),
        (429, 429, "rate_limit_error"),
        (499, 499, "api_error"),
        (500, 500, "api_error"),
        (502, 500, "api_error"),
        (503, 529, "overloaded_error"),
        (504, 504, "timeout_error"),
    ],
)
def test_every_status_has_a_word_of_its_own(status: int, told: int, kind: str) -> None:
    assert anthropic.own_status(status) == told
    error = anthropic.error_object("lane_full", "full", status=status, retry_after_s=3)
    assert error == {
        "type": "error",
        "error": {"type": kind, "message": "full", "code": "lane_full", "retry_after_s": 3},
    }
