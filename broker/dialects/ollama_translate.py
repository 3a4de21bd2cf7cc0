"""Makes an OpenAI chat request of one in the Ollama dialect, for runtimes that do not speak it.

What loads a model anew (`num_ctx` and its kin) is left out: that is the policy's business. The words are the same in
every turn of a conversation, so that the runtime finds its prompt cache again: nothing here is made up by chance.
"""

import json
from collections.abc import Container, Mapping
from typing import Any, Final

from broker.dialects import json_splice, ollama_request
from broker.dialects.ollama_request import Asked
from broker.errors import BadRequest

SAMPLING: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repeat_penalty": "repeat_penalty",
    "repeat_last_n": "repeat_last_n",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
    "num_keep": "n_keep",
}
"""Options by the name that a chat endpoint knows them by: OpenAI's, else llama-server's."""

_OPENAIS: Final = frozenset({"temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"})
_NOT_OPENAIS: Final = frozenset({*SAMPLING.values(), "repetition_penalty", "chat_template_kwargs"}) - _OPENAIS
_REFUSED: Final = {
    "raw": "a raw prompt",
    "context": "a context of tokens",
    "template": "a template of the client's own",
    "suffix": "a suffix",
}
_PICTURES: Final = {"iVBOR": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}
_EFFORTS: Final = ("low", "medium", "high")


def to_chat(
    asked: Asked,
    model: str,
    *,
    slot: int | None = None,
    drops: Container[str] = frozenset(),
    extra: Mapping[str, object] | None = None,
    plain: bool = False,
) -> bytes:
    """Writes the chat request; raises BadRequest where only an Ollama could do what is asked.

    `plain` is for those who refuse a request over a key that is not OpenAI's own.
    """
    request = asked.request
    if native := ollama_request.only_native(request):
        raise BadRequest(f"{_REFUSED[native]} needs a model that an Ollama serves, and {model} is not one", native)
    messages = _chat_messages(request.get("messages") or []) if asked.shape == "chat" else _prompt_messages(request)
    if plain:
        messages = [{key: told for key, told in message.items() if key != "reasoning_content"} for message in messages]
    chat: dict[str, object] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.get("tools") and asked.shape == "chat":
        chat["tools"] = request["tools"]
    chat |= _sampling(request) | _form(request.get("format")) | _thinking(request.get("think"))
    if request.get("logprobs"):
        chat["logprobs"] = True
        if request.get("top_logprobs"):
            chat["top_logprobs"] = request["top_logprobs"]
    left_out = _NOT_OPENAIS if plain else frozenset[str]()
    chat = {key: value for key, value in chat.items() if key not in drops and key not in left_out}
    chat |= extra or {}
    if slot is not None:
        chat["id_slot"] = slot
    try:
        return json_splice.encode(chat)
    except RecursionError:
        raise BadRequest("the request is nested too deeply") from None


def _sampling(request: Mapping[str, Any]) -> dict[str, object]:
    options = request.get("options") or {}
    found: dict[str, object] = {}
    for key, name in SAMPLING.items():
        value = ollama_request.option(request, key)
        if value is not None:
            found[name] = value
    if options.get("repeat_penalty") is not None:
        found["repetition_penalty"] = options["repeat_penalty"]  # as vLLM calls it
    limit = ollama_request.option(request, "num_predict")
    if limit is not None and limit >= 1:
        found["max_tokens"] = int(limit)
    stop = options.get("stop")
    if stop:
        found["stop"] = stop
    return found


def _form(form: object) -> dict[str, object]:
    if form == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(form, dict) and form:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}}
    return {}


def _thinking(think: object) -> dict[str, object]:
    """Says whether the model is to reason, in the words of chat templates, and how hard in OpenAI's."""
    if isinstance(think, bool):
        return {"chat_template_kwargs": {"enable_thinking": think}}
    return {"reasoning_effort": think} if think in _EFFORTS else {}


def _prompt_messages(request: Mapping[str, Any]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    if request.get("system"):
        found.append({"role": "system", "content": request["system"]})
    return [*found, {"role": "user", "content": _content(request.get("prompt"), request.get("images"))}]


def _chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Translates the conversation. A tool's answer names its call by id: the client's own, else the oldest call of its
    name that has no answer yet."""
    found: list[dict[str, object]] = []
    open_calls: list[tuple[str, str]] = []  # id, name
    for index, message in enumerate(messages):
        role = message["role"]
        told: dict[str, object] = {"role": role, "content": _content(message.get("content"), message.get("images"))}
        if role == "assistant":
            if message.get("thinking"):
                told["reasoning_content"] = message["thinking"]
            if message.get("tool_calls"):
                calls = [_call(call, f"call_{index}_{n}") for n, call in enumerate(message["tool_calls"])]
                told["tool_calls"] = calls
                open_calls = [(call["id"], call["function"]["name"]) for call in calls]
        elif role == "tool":
            call_id = message.get("tool_call_id") or _answered(open_calls, message.get("tool_name") or "")
            open_calls = [call for call in open_calls if call[0] != call_id]
            told["tool_call_id"] = call_id
            if message.get("tool_name"):
                told["name"] = message["tool_name"]
        found.append(told)
    return found


def _answered(open_calls: list[tuple[str, str]], name: str) -> str:
    named = [call_id for call_id, called in open_calls if not name or called == name]
    return (named or [call_id for call_id, _ in open_calls] or ["call_unknown"])[0]


def _call(call: Mapping[str, Any], made_up_id: str) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return {
        "id": call.get("id") or made_up_id,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _content(text: object, images: list[str] | None) -> object:
    if not images:
        return text or ""
    parts: list[dict[str, object]] = [{"type": "text", "text": text}] if text else []
    return parts + [{"type": "image_url", "image_url": {"url": _picture(image)}} for image in images]


def _picture(image: str) -> str:
    """Makes a data URL of a picture, whose kind its first bytes tell."""
    if image.startswith("data:"):
        return image
    kind = next((kind for begin, kind in _PICTURES.items() if image.startswith(begin)), "jpeg")
    return f"data:image/{kind};base64,{image}"
