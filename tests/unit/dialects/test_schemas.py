"""What the readers refuse, the schemas of the OpenAPI document refuse, and the other way round.

Requests that are right are bent in a few places, over and over; reader and schema must judge each one alike. What only
the reader can know (two values that must agree) is named here by its sentence.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.voices import voice_of
from broker.dialects import (
    anthropic,
    anthropic_schema,
    bounds,
    ollama_embeddings,
    ollama_models,
    ollama_request,
    ollama_schema,
    openai,
    openai_completions,
    openai_embeddings,
    openai_schema,
    responses,
    responses_schema,
)
from broker.errors import BadRequest
from broker.records import JobRecord
from workers.asking import Asking
from workers.runtimes.base import Endpoint

SCHEMAS = {
    **openai_schema.SCHEMAS,
    **responses_schema.SCHEMAS,
    **anthropic_schema.SCHEMAS,
    **ollama_schema.SCHEMAS,
}

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
FUNCTION = {
    "type": "function",
    "name": "read",
    "parameters": {"type": "object"},
    "description": "Reads.",
    "strict": True,
}


@dataclass(frozen=True)
class Pair:
    """A reader, the schema that says the same, requests that both take, and what the schema cannot say."""

    path: str
    read: Callable[[bytes], object]
    schema: str
    right: tuple[dict[str, Any], ...]
    beyond: str = "(?!)"


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "big", "messages": [{"role": "user", "content": "Hi"}], **more}


PAIRS = {
    "chat": Pair(
        "/v1/chat/completions",
        openai.read_chat,
        "ChatRequest",
        (
            chat(stream=True, stream_options={"include_usage": True}, n=2, max_tokens=5, max_completion_tokens=6),
            chat(tools=[{"type": "function", "function": {"name": "read"}}], prompt_cache_key="s", logprobs=True),
            chat() | {"messages": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "see"}]}]},
            chat() | {"messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "x"}]},
        ),
    ),
    "completions": Pair(
        "/v1/completions",
        openai_completions.read_completion,
        "CompletionRequest",
        tuple(
            {"model": "big", "prompt": prompt, "n": 2, "best_of": 2, "max_tokens": 0, "suffix": "b", "stream": False}
            for prompt in ("a", ["a", "b"], [1, 2], [[1], [2, 3]])
        ),
        "best_of above n|prompts times n",
    ),
    "embeddings": Pair(
        "/v1/embeddings",
        openai_embeddings.read_embeddings,
        "EmbeddingsRequest",
        tuple({"model": "e", "input": given, "stream": False} for given in ("a", ["a", "b"], [1, 2], [[1], "b"])),
    ),
    "responses": Pair(
        "/v1/responses",
        responses.read_responses,
        "ResponsesRequest",
        (
            {"model": "big", "input": "Hi", "instructions": "Be kind.", "stream": True, "max_output_tokens": 3},
            {"model": "big", "input": "Hi", "background": True, "store": True},
            {
                "model": "big",
                "input": [
                    {"role": "developer", "content": "Be kind."},
                    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                    {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]},
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "content": None},
                    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}]},
                    {"type": "function_call", "name": "read", "call_id": "c", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": "x"},
                    {"type": "custom_tool_call", "name": "patch", "call_id": "d", "input": "x"},
                    {"type": "custom_tool_call_output", "call_id": "d", "output": [{"type": "refusal", "refusal": ""}]},
                    {"type": "web_search_call"},
                ],
                "tools": [FUNCTION, {"type": "custom", "name": "patch"}, {"type": "web_search"}],
                "tool_choice": {"type": "function", "name": "read"},
            },
            {
                "model": "big",
                "input": "Hi",
                "tools": [{"type": "namespace", "name": "files_", "tools": [FUNCTION]}],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "read", "namespace": "files_"}],
                },
                "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
                "reasoning": {"effort": "low"},
                "metadata": {},
                "previous_response_id": None,
            },
        ),
        "no tool of this request|no tool is a function|allows none of the functions",
    ),
    "messages": Pair(
        "/v1/messages",
        anthropic.read_messages,
        "MessagesRequest",
        (
            {"model": "big", "max_tokens": 9, "stream": True, "system": "Be kind.", **{"messages": chat()["messages"]}},
            {
                "model": "big",
                "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}]},
                    {"role": "user", "content": [{"type": "document", "source": {"type": "file", "file_id": "f"}}]},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "read", "input": {}}]},
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]},
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "thinking"}]}],
                    },
                ],
                "tools": [{"name": "read", "input_schema": {"type": "object"}}],
                "metadata": {"user_id": "ann"},
            },
        ),
    ),
    "ollama chat": Pair(
        "/api/chat",
        ollama_request.read_chat,
        "OllamaChatRequest",
        (
            chat(stream=False, format="json", options={"num_predict": 5, "temperature": 0.5}, keep_alive="5m"),
            chat(format={"type": "object"}, tools=[CALL], options={"num_predict": -1.5}),
            chat() | {"messages": [{"role": "user", "content": "x", "images": ["AAAA"], "thinking": None}]},
            chat() | {"messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_name": "read"}]},
        ),
    ),
    "ollama generate": Pair(
        "/api/generate",
        ollama_request.read_generate,
        "OllamaGenerateRequest",
        (
            {"model": "big", "prompt": "Hi", "system": "s", "images": ["AAAA"], "format": "", "options": None},
            {"model": "big", "prompt": "a", "suffix": "b", "template": "t", "raw": True, "context": [1, 2]},
            {"model": "big", "keep_alive": 0},
        ),
    ),
    "ollama embed": Pair(
        "/api/embed",
        ollama_embeddings.read_embed,
        "OllamaEmbedRequest",
        ({"model": "e", "input": ["a", "b"], "dimensions": 3}, {"model": "e", "input": "a", "dimensions": 0}),
    ),
    "ollama embeddings": Pair(
        "/api/embeddings",
        ollama_embeddings.read_embeddings,
        "OllamaEmbeddingsRequest",
        ({"model": "e", "prompt": "a"},),
    ),
    "ollama show": Pair(
        "",
        ollama_models.asked_to_show, "OllamaShowRequest", ({"model": "e"}, {"name": "e"}, {"model": "", "name": "e"})
    ),
}  # fmt: skip

KEYS = sorted(
    {key for schema in SCHEMAS.values() for key in re.findall(r'"(\w+)":', json.dumps(schema))}
    - {"properties", "anyOf"}
)
WORDS = ["", "x", "user", "assistant", "text", "message", "function", "json", "auto", "required", "tool_use"]
DROPS = frozenset({"num_ctx", "keep_alive"})
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3, 40, 10**30, 0.5, -2.5, *WORDS, [], {}, [[]], [{}], [""], [1], [True], ["a", 1],
    {"type": []}, {"type": {}}, {"type": None}, {"type": "text"}, {"type": "text", "text": "x"}, {"role": "user"},
]  # fmt: skip


@cache
def validator(name: str) -> Any:
    return jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place within a request, its own top among them."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from places(below, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def bent(draw: st.DrawFn, pair: Pair) -> dict[str, Any]:
    """A right request with up to three of its places replaced, removed, doubled, or given another key."""
    request: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(pair.right)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(request))))
        other = draw(st.sampled_from(pair.right))
        grafted = at(other, draw(st.sampled_from(list(places(other)))))
        value = copy.deepcopy(draw(st.sampled_from([*JUNK, grafted])))
        here = at(request, path)
        if isinstance(here, dict) and draw(st.booleans()):
            here[draw(st.sampled_from(KEYS))] = value
        elif isinstance(here, list) and draw(st.booleans()):
            here.append(value)
        elif path and draw(st.booleans()):
            at(request, path[:-1]).pop(path[-1])
        elif path:
            at(request, path[:-1])[path[-1]] = value
    return request


@pytest.mark.parametrize("name", PAIRS)
def test_a_right_request_is_right_to_both(name: str) -> None:
    pair = PAIRS[name]
    for request in pair.right:
        pair.read(json.dumps(request).encode())
        validator(pair.schema).validate(request)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, key) for name in ("chat", "messages", "ollama chat") for key in ("messages", "tools")),
        *((name, "input") for name in ("embeddings", "responses", "ollama embed")),
        ("responses", "tools"),
        ("chat", "stop"),
        ("completions", "stop"),
        ("messages", "stop_sequences"),
    ],
)
def test_a_list_that_is_too_long_is_too_long_to_both(name: str, key: str) -> None:
    pair, most = PAIRS[name], bounds.MOST[key]
    found = [request for request in pair.right if isinstance(request.get(key), list) and request[key][0] != 1]
    request = copy.deepcopy(found[0] if found else {**pair.right[0], key: ["x"]})
    for count in (most, most + 1):
        request[key] = request[key][:1] * count
        wrong = next(validator(pair.schema).iter_errors(request), None)
        if count == most:
            pair.read(json.dumps(request).encode())
            assert wrong is None
        else:
            with pytest.raises(BadRequest, match="items at most"):
                pair.read(json.dumps(request).encode())
            assert wrong is not None


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_reader_and_schema_judge_alike(name: str, data: st.DataObject) -> None:
    """Whatever a reader makes of it, it says in a sentence: anything but BadRequest would be a 500."""
    pair = PAIRS[name]
    request = data.draw(bent(pair))
    wrong = next(validator(pair.schema).iter_errors(request), None)
    try:
        pair.read(json.dumps(request).encode())
    except BadRequest as refusal:
        assert wrong is not None or re.search(pair.beyond, str(refusal)), f"only the reader refuses: {refusal}"
    else:
        assert wrong is None, f"only the schema refuses: {wrong}"


@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if pair.path])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_what_a_reader_takes_can_be_told_to_every_runtime(name: str, data: st.DataObject) -> None:
    """Anything but BadRequest would bring the worker down, and with it everybody's answers."""
    pair = PAIRS[name]
    body = json.dumps(data.draw(bent(pair))).encode()
    try:
        asked = pair.read(body)
    except BadRequest:
        return
    if getattr(asked, "empty", None):
        return  # answered by the api
    job = JobRecord(id="01M8J0W3QTEBGDM254AXB4F3BC", endpoint=pair.path, model="big", asked="big", choices=2)
    voice_of(job, body).heartbeat("waiting")
    for speaks in (frozenset({pair.path}), frozenset[str]()):
        for metered in (False, True):
            to = Endpoint("http://x", model="weights", speaks=speaks, drops=DROPS, metered=metered)
            asking = Asking(job, body, to)
            try:
                asking.reader()
                told = json.loads(asking.request(1))
            except BadRequest:
                continue
            assert told["model"] == "weights"
