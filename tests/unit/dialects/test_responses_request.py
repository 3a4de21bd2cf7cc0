"""What a Responses request asks for, and the chat request that says the same."""

import json
from typing import Any

import pytest

from broker.dialects.responses import ask_chat, read_responses
from broker.errors import BadRequest


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "deep-coder", "input": "Hello"} | fields).encode()


def asked(**fields: Any) -> dict[str, Any]:
    chat: dict[str, Any] = json.loads(ask_chat(body(**fields), "qwen"))
    return chat


CODEX = {
    "instructions": "You are Codex.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandboxed."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Mend a.py"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look first."}], "encrypted_content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "name": "exec_command", "arguments": '{"cmd":"cat a.py"}', "call_id": "c1"},
        {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin", "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "print(1)"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "done"}]},
        {"type": "web_search_call", "status": "completed"},
        {"role": "user", "content": "And b.py"},
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "strict": False, "parameters": {"type": "object"}},
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Patch.",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: LINE"},
        },
        {"type": "web_search"},
        {"type": "local_shell"},
        {"type": "namespace", "name": "mcp__git__", "tools": [{"type": "function", "name": "log"}]},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "high", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "thread-7",
    "client_metadata": {"x": "y"},
}


def test_a_turn_of_codex_becomes_a_chat_with_one_system_message_and_whole_turns() -> None:
    """Thought, words and calls of one turn are one message; chat templates refuse anything else."""
    chat = asked(**CODEX)
    assert chat["messages"] == [
        {"role": "system", "content": "You are Codex.\n\nSandboxed."},
        {"role": "user", "content": "Mend a.py"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Look first.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "exec_command", "arguments": '{"cmd":"cat a.py"}'},
                },
                {
                    "id": "c2",
                    "type": "function",
                    "function": {"name": "apply_patch", "arguments": '{"input": "*** Begin"}'},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "print(1)"},
        {"role": "tool", "tool_call_id": "c2", "content": "done"},
        {"role": "user", "content": "And b.py"},
    ]
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["exec_command", "apply_patch", "mcp__git__log"]
    assert "start: LINE" in chat["tools"][1]["function"]["description"]
    assert chat["tools"][1]["function"]["parameters"]["required"] == ["input"]
    left = {key: chat[key] for key in chat.keys() - {"messages", "tools"}}
    assert left == {
        "model": "qwen",
        "stream": True,
        "stream_options": {"include_usage": True},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning_effort": "high",
    }


def test_the_facts_of_a_request() -> None:
    facts = read_responses(body(**CODEX))
    assert (facts.model, facts.stream, facts.session, facts.needs) == ("deep-coder", True, "thread-7", {"tools"})
    assert facts.prompt_tokens > 40
    plain = read_responses(body(max_output_tokens=9))
    assert (plain.stream, plain.max_tokens, plain.needs) == (False, 9, frozenset())


def test_a_conversation_keeps_its_session_as_it_grows() -> None:
    first = read_responses(body(instructions="Be brief.", input="Hello"))
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    second = read_responses(body(instructions="Be brief.", input=[*turn, {"role": "user", "content": "And?"}]))
    other = read_responses(body(instructions="Be brief.", input="Goodbye"))
    assert first.session == second.session != other.session


def test_a_picture_is_a_need_and_no_text() -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 100_000, "detail": "low"}
    item = {"role": "user", "content": [{"type": "input_text", "text": "What is it?"}, picture]}
    facts = read_responses(body(input=[item]))
    assert facts.needs == {"images"} and facts.prompt_tokens < 1100
    parts = asked(input=[item])["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"]
    assert parts[1]["image_url"] == {"url": picture["image_url"], "detail": "low"}


def test_a_schema_and_the_bounds_are_said_in_chats_words() -> None:
    form = {"type": "json_schema", "name": "answer", "schema": {"type": "object"}, "strict": True}
    chat = asked(text={"format": form}, max_output_tokens=5, temperature=0, top_p=0.5)
    assert chat["response_format"]["json_schema"] == {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert (chat["max_tokens"], chat["temperature"], chat["top_p"]) == (5, 0, 0.5)
    assert "response_format" not in asked(text={"format": {"type": "text"}})


def test_what_the_runtime_must_not_see_and_what_it_must() -> None:
    made = ask_chat(
        body(num_ctx=9, seed=3, n=4, options={"num_ctx": 9, "top_k": 2}),
        "qwen",
        slot=1,
        drops=frozenset({"num_ctx"}),
        extra={"keep_alive": -1},
    )
    chat = json.loads(made)
    assert chat.keys() & {"num_ctx", "n"} == set()
    assert (chat["seed"], chat["options"], chat["id_slot"], chat["keep_alive"]) == (3, {"top_k": 2}, 1, -1)


def test_thoughts_go_back_with_their_own_turn_and_to_no_stranger() -> None:
    """A provider refuses keys that are not OpenAI's own; two turns keep a thought each."""
    thoughts = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": word}]} for word in "ab"
    ]
    said = [{"role": "assistant", "content": word} for word in "xy"]
    made = {"input": [{"role": "user", "content": "Hi"}, thoughts[0], said[0], thoughts[1], said[1]]}
    _, *turns = asked(**made)["messages"]
    assert [(turn["reasoning_content"], turn["content"]) for turn in turns] == [("a", "x"), ("b", "y")]
    plain = json.loads(ask_chat(body(**made), "gpt", plain=True))
    assert all(message.keys() == {"role", "content"} for message in plain["messages"])


def test_a_tool_choice_may_name_a_tool_or_allow_some() -> None:
    tools = CODEX["tools"]
    chosen = asked(tools=tools, tool_choice={"type": "custom", "name": "apply_patch"})
    assert chosen["tool_choice"] == {"type": "function", "function": {"name": "apply_patch"}}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "exec_command"}]}
    some = asked(tools=tools, tool_choice=allowed)
    assert some["tool_choice"] == "required"
    assert [tool["function"]["name"] for tool in some["tools"]] == ["exec_command"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no conversations"),
        ({"background": True, "store": False}, "store", "background needs store"),
        ({"background": "later"}, "background", "true or false"),
        ({"conversation": "conv_1"}, "conversation", "keeps no conversations"),
        ({"prompt": {"id": "p"}}, "prompt", "prompt templates"),
        ({"model": ""}, "model", "name of a model"),
        ({"input": None}, "input", "string or a list"),
        ({"input": []}, "input", "at least one item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "keeps no items"),
        ({"input": [{"type": "riddle"}]}, "input[0]", "type riddle"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role", "user, assistant"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]", "input_file"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].image_url",
            "keeps no files",
        ),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "c"}]}, "input[0].arguments", "string"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "string"),
        ({"instructions": 3}, "instructions", "string"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"max_output_tokens": 0}, "max_output_tokens", "above 0"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
        ({"text": "plain"}, "text", "object"),
        ({"tools": {}}, "tools", "list"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "name"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "no tool of this request"),
        ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "tool_choice", "required"),
    ],
)
def test_what_is_not_understood_or_not_kept_is_refused_in_a_sentence(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(BadRequest, match=words.replace("[", r"\[")) as refused:
        read_responses(body(**fields))
    assert refused.value.param == param


def test_store_and_a_background_of_false_are_accepted() -> None:
    facts = read_responses(body(store=True, background=False, previous_response_id=None))
    assert (facts.model, facts.background) == ("deep-coder", False)
    assert read_responses(body(store=False)).background is False


@pytest.mark.parametrize("store", [{}, {"store": True}, {"store": None}])
def test_what_is_made_in_the_background_is_kept(store: dict[str, Any]) -> None:
    assert read_responses(body(background=True, **store)).background is True
