"""The words of answers, as each dialect tells them whole and in pieces; nothing else passes for words."""

import json
from typing import Any

import pytest

from api.answer_text import pieces_of, text_of

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"

WHOLE: list[tuple[str, Any, str | None]] = [
    (CHAT, {"choices": [{"message": {"content": "hi"}}, {"message": {"content": "other"}}]}, "hi"),
    (CHAT, {"choices": [{"message": {"content": None, "tool_calls": [{}]}}]}, None),
    ("/v1/completions", {"choices": [{"text": "hi"}]}, "hi"),
    (
        RESPONSES,
        {
            "output": [
                {"type": "reasoning", "summary": []},
                {"type": "message", "content": [{"type": "output_text", "text": "hi"}, {"type": "refusal"}]},
                {"type": "message", "content": [{"type": "output_text", "text": " you"}]},
            ]
        },
        "hi you",
    ),
    (MESSAGES, {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hi"}]}, "hi"),
    ("/api/chat", {"message": {"content": "hi"}}, "hi"),
    ("/api/generate", {"response": "hi"}, "hi"),
    ("/v1/embeddings", {"data": []}, None),
    (CHAT, {"choices": []}, None),
    (CHAT, [1], None),
    (RESPONSES, {"output": None}, None),
]


@pytest.mark.parametrize(("endpoint", "answer", "text"), WHOLE)
def test_a_whole_answer(endpoint: str, answer: Any, text: str | None) -> None:
    assert text_of(endpoint, answer) == text


def event(said: dict[str, Any], name: str = "") -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(said)}\n\n"


PIECES: list[tuple[str, str, str]] = [
    (CHAT, event({"choices": [{"index": 0, "delta": {"content": "a\u2028b"}}]}), "a\u2028b"),
    (CHAT, event({"choices": [{"index": 1, "delta": {"content": "other"}}]}), ""),
    (CHAT, event({"choices": [{"delta": {"reasoning_content": "hm"}}]}) + event({"choices": []}), ""),
    (CHAT, event({"choices": [{"delta": {"content": "a"}}]}) * 2 + "data: [DONE]\n\n", "aa"),
    ("/v1/completions", event({"choices": [{"text": "a"}]}), "a"),
    (RESPONSES, event({"type": "response.output_text.delta", "delta": "a"}, "response.output_text.delta"), "a"),
    (RESPONSES, event({"type": "response.reasoning_text.delta", "delta": "a"}), ""),
    (MESSAGES, event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}}), "a"),
    (MESSAGES, event({"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "a"}}), ""),
    ("/api/chat", '{"message": {"content": "a"}}\n{"message": {"content": "b"}, "done": true}\n', "ab"),
    ("/api/generate", '{"response": "a"}\n', "a"),
    ("/v1/embeddings", event({"data": []}), ""),
    (CHAT, "data: {torn", ""),
    (CHAT, event({"choices": 7}), ""),
]


@pytest.mark.parametrize(("endpoint", "frame", "text"), PIECES)
def test_the_pieces_of_a_frame(endpoint: str, frame: str, text: str) -> None:
    assert pieces_of(endpoint, frame) == text
