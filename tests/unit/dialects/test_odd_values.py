"""Any value of a request may be of any kind: the answer is a 400 with a sentence, or the runtime's to give.

What raises anything else is a 500, and a traceback in our log, for whoever sends it; in the worker it would be worse.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from broker import continuing
from broker.dialects import (
    anthropic,
    ollama_embeddings,
    ollama_request,
    openai,
    openai_completions,
    openai_embeddings,
    responses,
)
from broker.dialects.ollama_models import asked_to_show
from broker.errors import BadRequest
from broker.records import JobRecord
from workers.asking import Asking
from workers.runtimes.base import Endpoint

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    "",
    "x",
    [],
    {},
    [[]],
    [None],
    ["x", {}],
    {"type": []},
    {"type": {}},
]

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CHAT = {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "n": 1, "max_tokens": 5, "stop": ["x"],
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "t"}, PICTURE]},
        {"role": "assistant", "content": "a", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ],
    "tools": [TOOL], "prompt_cache_key": "k", "response_format": {"type": "json_object"},
}  # fmt: skip
MESSAGES = {
    "model": "m", "max_tokens": 5, "stream": True, "system": [{"type": "text", "text": "s"}],
    "metadata": {"user_id": "u"}, "thinking": {"type": "enabled", "budget_tokens": 9}, "stop_sequences": ["x"],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "tool", "name": "f"}, "temperature": 1.0,
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}, "title": "t"},
        ]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "h", "signature": "s"},
            {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}], "is_error": False},
        ]},
    ],
}  # fmt: skip
RESPONSES = {
    "model": "m", "stream": True, "store": False, "instructions": "i", "max_output_tokens": 5, "prompt_cache_key": "k",
    "reasoning": {"effort": "low"}, "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}},
              {"type": "custom", "name": "g", "format": {"type": "text"}}],
    "tool_choice": {"type": "function", "name": "f"},
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "t"},
                                                        {"type": "input_image", "image_url": "data:,"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "h"}], "content": None},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "r"}]},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "r"},
    ],
}  # fmt: skip
OLLAMA = {
    "model": "m", "stream": True, "keep_alive": "5m", "think": False, "format": {"type": "object"},
    "options": {"num_ctx": 5, "temperature": 1, "num_predict": 5, "stop": ["x"]},
    "messages": [
        {"role": "user", "content": "t", "images": ["AAAA"]},
        {"role": "assistant", "content": "a", "thinking": "h", 
         "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "r", "tool_name": "f"},
    ],
    "tools": [TOOL],
}  # fmt: skip
GENERATE = {
    "model": "m", "prompt": "p", "suffix": "s", "system": "y", "template": "t", "context": [1, 2], "images": ["AAAA"],
    "stream": False, "raw": False, "format": "json", "options": {"seed": 1}, "keep_alive": 5,
}  # fmt: skip

READERS: dict[str, tuple[Callable[[bytes], Any], dict[str, Any]]] = {
    "/v1/chat/completions": (openai.read_chat, CHAT),
    "/v1/completions": (
        openai_completions.read_completion,
        {"model": "m", "prompt": ["p"], "suffix": "s", "n": 1, "best_of": 1, "max_tokens": 5, "stream": True,
         "stream_options": {}, "prompt_cache_key": "k"},
    ),
    "/v1/embeddings": (openai_embeddings.read_embeddings, {"model": "m", "input": ["t", [1, 2]], "dimensions": 2}),
    "/v1/messages": (anthropic.read_messages, MESSAGES),
    "/v1/responses": (responses.read_responses, RESPONSES),
    "/api/chat": (ollama_request.read_chat, OLLAMA),
    "/api/generate": (ollama_request.read_generate, GENERATE),
    "/api/embed": (ollama_embeddings.read_embed, {"model": "m", "input": ["t"], "dimensions": 2, "options": {}}),
    "/api/embeddings": (ollama_embeddings.read_embeddings, {"model": "m", "prompt": "t", "keep_alive": 1}),
    "/api/show": (asked_to_show, {"model": "m", "name": "m"}),
}  # fmt: skip


def variants(value: Any) -> Iterator[Any]:
    """The value with each part of it, at any depth, replaced by each odd one or taken out."""
    yield from ODD
    if isinstance(value, dict):
        for key in value:
            yield {name: v for name, v in value.items() if name != key}
            for variant in variants(value[key]):
                yield {**value, key: variant}
    elif isinstance(value, list):
        for index, item in enumerate(value):
            for variant in variants(item):
                yield [*value[:index], variant, *value[index + 1 :]]


@pytest.mark.parametrize("path", READERS)
def test_no_kind_of_value_breaks_a_reader_or_the_worker(path: str) -> None:
    read, whole = READERS[path]
    read(json.dumps(whole).encode())
    other = Endpoint("http://127.0.0.1:1", model="weights")
    runtimes = (other, replace(other, speaks=frozenset({path})))
    for variant in variants(whole):
        body = json.dumps(variant).encode()
        try:
            read(body)
        except BadRequest:
            continue
        if path == "/api/show":
            continue
        continuing.may_go_on(path, body)
        for runtime in runtimes:
            asking = Asking(JobRecord(id="j", endpoint=path, model="m", stream=True), body, runtime)
            try:
                asking.request(None)
                asking.reader()
            except BadRequest:
                pass  # the job ends with the sentence
