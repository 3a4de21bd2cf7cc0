"""Makes an OpenAI chat request of an Anthropic one, for runtimes that do not speak its dialect.

The words are the same in every turn of a conversation, so that the runtime finds its prompt cache again. A block that
chat has no shape for goes on as its JSON: the model reads it, and nothing that the client said is lost.
"""

import json
from collections.abc import Container, Mapping
from typing import Any, Final

from broker.dialects import json_splice
from broker.dialects.anthropic import Asked, is_billing_line, texts
from broker.errors import BadRequest

_NOT_OPENAIS: Final = frozenset({"top_k", "chat_template_kwargs", "continue_final_message", "add_generation_prompt"})
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_CONTINUE: Final = {"continue_final_message": True, "add_generation_prompt": False}


def to_chat(
    asked: Asked,
    model: str,
    *,
    slot: int | None = None,
    drops: Container[str] = frozenset(),
    extra: Mapping[str, object] | None = None,
    plain: bool = False,
) -> bytes:
    """Writes the chat request; raises BadRequest for what no chat can carry.

    `plain` is for those who refuse a request over a key that is not OpenAI's own.
    """
    request = asked.request
    messages = _system(request.get("system"))
    for message in request["messages"]:
        if message["role"] == "assistant":
            messages.append(_assistant(message["content"], plain=plain))
        elif message["role"] == "system":
            messages += _system(message["content"])
        else:
            messages += _user(message["content"])
    chat: dict[str, object] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chat |= _tools(request) | _sampling(request) | _thinking(request)
    if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        chat |= _CONTINUE  # its client wrote how the answer begins
    left_out = _NOT_OPENAIS if plain else frozenset[str]()
    chat = {key: value for key, value in chat.items() if key not in drops and key not in left_out}
    chat |= extra or {}
    if slot is not None:
        chat["id_slot"] = slot
    try:
        return json_splice.encode(chat)
    except RecursionError:
        raise BadRequest("the request is nested too deeply") from None


def _system(system: object) -> list[dict[str, Any]]:
    blocks = [block for block in texts(system) if not is_billing_line(block)]
    return [{"role": "system", "content": _joined(_parts(blocks))}] if blocks else []


def _user(content: object) -> list[dict[str, Any]]:
    """Splits a user's message: what its tools said comes first, each as a message of its own, then the rest.

    A tool's message holds text only; its pictures go into the user's, right after it.
    """
    found: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for block in texts(content):
        if block["type"] != "tool_result":
            parts += _parts([block])
            continue
        said = _parts(texts(block.get("content")))
        text = "\n".join(part["text"] for part in said if part["type"] == "text")
        if block.get("is_error") is True and not text.lower().startswith("error"):
            text = f"Error: {text}"
        found.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
        parts += [part for part in said if part["type"] != "text"]
    if parts or not found:
        found.append({"role": "user", "content": _joined(parts)})
    return found


def _assistant(content: object, *, plain: bool) -> dict[str, Any]:
    said: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in texts(content):
        match block["type"]:
            case "text":
                said.append(block["text"])
            case "thinking" if isinstance(block.get("thinking"), str):
                thought.append(block["thinking"])
            case "tool_use":
                calls.append(_call(block, len(calls)))
            case "thinking" | "redacted_thinking":
                pass  # only the provider that wrote it could read it
            case _:
                said.append(_as_json(block))
    told: dict[str, Any] = {"role": "assistant", "content": "\n".join(said) if said or not calls else None}
    if any(thought) and not plain:
        told["reasoning_content"] = "\n".join(thought)
    if calls:
        told["tool_calls"] = calls
    return told


def _call(block: Mapping[str, Any], number: int) -> dict[str, Any]:
    arguments = block.get("input")
    return {
        "id": block.get("id") or f"toolu_{number}",
        "type": "function",
        "function": {
            "name": block["name"],
            "arguments": json.dumps({} if arguments is None else arguments, ensure_ascii=False),
        },
    }


def _parts(blocks: Any) -> list[dict[str, Any]]:
    """Translates blocks of a user, a system prompt or a tool into parts of a chat message."""
    found: list[dict[str, Any]] = []
    for block in blocks:
        source = block.get("source")
        match block["type"]:
            case "text":
                found.append({"type": "text", "text": block["text"]})
            case "image" if isinstance(source, dict):
                found.append({"type": "image_url", "image_url": {"url": _url(source)}})
            case "document" if isinstance(source, dict):
                found += _document(block, source)
            case "thinking" | "redacted_thinking":
                pass
            case _:
                found.append({"type": "text", "text": _as_json(block)})
    return found


def _url(source: Mapping[str, Any]) -> str:
    kind, data, url = source.get("type"), source.get("data"), source.get("url")
    if kind == "base64" and isinstance(data, str):
        return f"data:{source.get('media_type') or 'image/png'};base64,{data}"
    if kind == "url" and isinstance(url, str):
        return url
    raise BadRequest("a picture's source must be base64 or a url: there are no files here", "messages")


def _document(block: Mapping[str, Any], source: Mapping[str, Any]) -> list[dict[str, Any]]:
    title = [{"type": "text", "text": block["title"]}] if isinstance(block.get("title"), str) else []
    data, content = source.get("data"), source.get("content")
    if source.get("type") == "text" and isinstance(data, str):
        return [*title, {"type": "text", "text": data}]
    if source.get("type") == "content" and isinstance(content, str | list):
        return title + _parts([block for block in texts(content) if isinstance(block, dict) and "type" in block])
    raise BadRequest("a document must be text: the model that serves this cannot read other files", "messages")


def _joined(parts: list[dict[str, Any]]) -> object:
    """Writes bare text as one string: some chat templates can read nothing else."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _as_json(block: Mapping[str, Any]) -> str:
    left = {key: value for key, value in block.items() if key != "cache_control"}
    return json.dumps(left, ensure_ascii=False)


def _tools(request: Mapping[str, Any]) -> dict[str, object]:
    """Translates the tools that the client runs itself; those that a provider runs have no schema, and none is here."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                **({"description": tool["description"]} if isinstance(tool.get("description"), str) else {}),
                "parameters": tool["input_schema"],
            },
        }
        for tool in request.get("tools") or ()
        if isinstance(tool.get("name"), str) and isinstance(tool.get("input_schema"), dict)
    ]
    if not tools:
        return {}
    found: dict[str, object] = {"tools": tools}
    choice = request.get("tool_choice")
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind == "tool" and isinstance(choice.get("name"), str):
            found["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        elif isinstance(kind, str) and kind in _CHOICES:
            found["tool_choice"] = _CHOICES[kind]
        if isinstance(choice.get("disable_parallel_tool_use"), bool):
            found["parallel_tool_calls"] = not choice["disable_parallel_tool_use"]
    return found


def _sampling(request: Mapping[str, Any]) -> dict[str, object]:
    keys = ("max_tokens", "temperature", "top_p", "top_k")
    found: dict[str, object] = {key: request[key] for key in keys if request.get(key) is not None}
    if request.get("stop_sequences"):
        found["stop"] = request["stop_sequences"]
    wished = request.get("output_config")
    wished = wished if isinstance(wished, dict) else {}
    form = wished.get("format") or request.get("output_format")
    if isinstance(form, dict) and form.get("type") == "json_schema" and isinstance(form.get("schema"), dict):
        schema = {"name": "answer", "schema": form["schema"]}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    effort = wished.get("effort")
    if isinstance(effort, str) and effort in _EFFORTS:
        found["reasoning_effort"] = _EFFORTS[effort]
    return found


def _thinking(request: Mapping[str, Any]) -> dict[str, object]:
    """Says whether the model is to reason, in the words of chat templates; unsaid or adaptive is the model's choice."""
    thinking = request.get("thinking")
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind in ("enabled", "disabled"):
        return {"chat_template_kwargs": {"enable_thinking": kind == "enabled"}}
    return {}
