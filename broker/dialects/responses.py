"""The OpenAI Responses dialect: what a request asks for, and the chat request that says the same to a runtime.

No runtime that we know speaks this dialect whole (llama.cpp's events carry no sequence numbers and no output indexes,
others keep no state), so every one is asked through chat. Only what is made in the background is kept, for a while: a
request that refers to something kept is refused in a sentence, and `store` is answered with false otherwise.
"""

import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.dialects import json_splice
from broker.dialects.bounds import read_request
from broker.dialects.responses_input import chat_messages
from broker.dialects.responses_stream import ResponsesReader
from broker.dialects.responses_tools import Tools
from broker.errors import BadRequest

PATH: Final = "/v1/responses"

BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
TOKENS_PER_IMAGE = 1024

REFUSED: Final = {
    "previous_response_id": "previous_response_id is not supported: the gateway keeps no conversations; "
    "send the whole conversation in input",
    "conversation": "conversation is not supported: the gateway keeps no conversations; "
    "send the whole conversation in input",
    "prompt": "prompt templates are not supported: send instructions and input",
}
_KNOWN: Final = frozenset(
    "background model input instructions stream stream_options store include metadata user safety_identifier "
    "service_tier tools tool_choice parallel_tool_calls max_tool_calls text reasoning max_output_tokens temperature "
    "top_p top_logprobs truncation prompt_cache_key prompt_cache_retention prompt_cache_options moderation "
    "context_management client_metadata".split()
) | frozenset(REFUSED)
_NOT_OURS: Final = frozenset({"messages", "n", "max_tokens", "max_completion_tokens", "response_format", "functions"})
"""Chat's own words for what this dialect says otherwise."""


@dataclass(frozen=True, slots=True)
class ResponsesFacts:
    """What admission and dispatch must know of a request."""

    model: str
    stream: bool
    prompt_tokens: int
    max_tokens: int | None
    session: str
    needs: frozenset[str]
    include_usage: bool = True
    n: int = 1
    longest_tokens: int = 0
    background: bool = False


@dataclass(frozen=True, slots=True)
class _Read:
    request: dict[str, Any]
    messages: list[dict[str, Any]]
    tools: Tools


def read_responses(body: bytes) -> ResponsesFacts:
    """Reads a request, or says in one sentence what is wrong with it."""
    read = _read(body)
    request, chat = read.request, _chat(read)
    try:
        text, images = _weigh(read.messages)
        session = _session(request.get("prompt_cache_key"), read.messages)
        tools_bytes = len(json_splice.encode(chat.get("tools", [])))
    except RecursionError:
        raise BadRequest("input is nested too deeply", "input") from None
    except (ValueError, UnicodeError):
        raise BadRequest("the tools hold a value that is not JSON", "tools") from None
    needs = {name for name, asked in (("tools", chat.get("tools")), ("images", images)) if asked}
    return ResponsesFacts(
        model=request["model"],
        stream=request.get("stream") is True,
        prompt_tokens=(text + tools_bytes) // BYTES_PER_TOKEN
        + images * TOKENS_PER_IMAGE
        + len(read.messages) * TOKENS_PER_MESSAGE,
        max_tokens=request.get("max_output_tokens"),
        session=session,
        needs=frozenset(needs),
        background=request.get("background") is True,
    )


def ask_chat(
    body: bytes,
    model: str,
    *,
    slot: int | None = None,
    drops: Container[str] = frozenset(),
    extra: Mapping[str, object] | None = None,
    plain: bool = False,
) -> bytes:
    """Writes the chat request for a runtime. `drops` are keys it must not see; `extra` is what it must.

    With `plain` it says nothing that OpenAI's own servers do not know.
    """
    chat = _chat(_read(body))
    if plain:
        for message in chat["messages"]:
            message.pop("reasoning_content", None)
    chat = {key: value for key, value in chat.items() if key not in drops}
    options = chat.get("options")
    if isinstance(options, dict):
        chat["options"] = {key: value for key, value in options.items() if key not in drops}
    chat |= {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    for key, value in (extra or {}).items():
        chat[key] = json.loads(value) if isinstance(value, bytes) else value
    if slot is not None:
        chat["id_slot"] = slot
    return json_splice.encode(chat)


def responses_reader(body: bytes, *, served_as: str, job_id: str) -> ResponsesReader:
    """Makes the reader of the runtime's answer to a request that has been admitted."""
    return ResponsesReader(served_as, body=body, job_id=job_id, tools=_read(body).tools)


def _read(body: bytes) -> _Read:
    request = {member.key: member.value for member in read_request(body)}
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be the name of a model", "model")
    for key, sentence in REFUSED.items():
        if request.get(key):
            raise BadRequest(sentence, key)
    for key in ("background", "stream", "store", "parallel_tool_calls"):
        if not isinstance(request.get(key), bool | None):
            raise BadRequest(f"{key} must be true or false", key)
    if request.get("background") and request.get("store") is False:
        raise BadRequest("background needs store: what nobody keeps, nobody can come back for", "store")
    for key in ("text", "reasoning", "metadata"):
        if not isinstance(request.get(key), dict | None):
            raise BadRequest(f"{key} must be an object", key)
    limit = request.get("max_output_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise BadRequest("max_output_tokens must be a whole number above 0", "max_output_tokens")
    tools = Tools.read(request.get("tools"), request.get("tool_choice"))
    messages = chat_messages(request.get("input"), request.get("instructions"), tools)
    return _Read(request, messages, tools)


def _chat(read: _Read) -> dict[str, Any]:
    """Says the same in chat's words; keys that this dialect does not know are the runtime's to judge."""
    request = read.request
    chat: dict[str, Any] = {"messages": read.messages}
    for key, name in (
        ("max_output_tokens", "max_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
    ):
        if request.get(key) is not None:
            chat[name] = request[key]
    effort = (request.get("reasoning") or {}).get("effort")
    if effort is not None:
        chat["reasoning_effort"] = effort
    form = _response_format((request.get("text") or {}).get("format"))
    if form is not None:
        chat["response_format"] = form
    if read.tools.chat:
        chat["tools"] = read.tools.chat
        if read.tools.choice is not None:
            chat["tool_choice"] = read.tools.choice
        if request.get("parallel_tool_calls") is not None:
            chat["parallel_tool_calls"] = request["parallel_tool_calls"]
    return chat | {key: value for key, value in request.items() if key not in _KNOWN and key not in _NOT_OURS}


def _response_format(form: object) -> dict[str, Any] | None:
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind == "json_schema" and isinstance(form, dict) and isinstance(form.get("schema"), dict):
        named = {key: form[key] for key in ("name", "description", "schema", "strict") if form.get(key) is not None}
        return {"type": "json_schema", "json_schema": {"name": "answer"} | named}
    raise BadRequest("text.format must be of type text, json_object, or json_schema with a schema", "text.format")


def _session(cache_key: object, messages: list[dict[str, Any]]) -> str:
    """Names the conversation: the client's own cache key, else a hash of what all its turns begin with."""
    if isinstance(cache_key, str) and cache_key:
        if len(cache_key) <= 64 and cache_key.isascii() and cache_key.isprintable():
            return cache_key
        return _hash(cache_key)
    leading = []
    for message in messages:
        leading.append(message)
        if message["role"] == "user":
            break
    return _hash(leading)


def _hash(value: object) -> str:
    return "h-" + hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def _weigh(value: object) -> tuple[int, int]:
    """Counts bytes of text and pictures anywhere below a value; a picture's own bytes are no text."""
    if isinstance(value, str):
        return (len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))), 0
    if isinstance(value, dict):
        if value.get("type") == "image_url":
            return 0, 1
        value = list(value.values())
    text = images = 0
    if isinstance(value, list):
        for item in value:
            more = _weigh(item)
            text, images = text + more[0], images + more[1]
    return text, images
