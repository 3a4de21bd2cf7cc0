"""What a request in the Ollama dialect asks for, and what must change in it for an Ollama.

`stream` is on unless the client says otherwise. To an Ollama the body goes on byte for byte but for the model's name,
the stream flag, options that would load the model again, and `keep_alive`: how long a model stays is the policy's
business, no client's.
"""

import hashlib
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from broker.dialects import json_splice
from broker.errors import BadRequest

BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
TOKENS_PER_IMAGE = 1024
KEEP_FOR_EVER: Final = -1

Shape = Literal["chat", "generate"]
Empty = Literal["load", "unload"]

_ZERO = re.compile(r"\s*[+-]?(?:0+(?:\.0*)?(?:ns|us|µs|μs|ms|s|m|h)?)+\s*")
_ONLY_NATIVE: Final = ("raw", "context", "template", "suffix")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been read: what admission must know of it, and its members for whoever translates it."""

    shape: Shape
    model: str
    stream: bool
    prompt_tokens: int  # an estimate: bytes of text / 4, pictures at a fixed size
    max_tokens: int | None
    session: str
    needs: frozenset[str]  # of "tools", "images", "logprobs", "native"
    empty: Empty | None  # nothing is to be generated: the client wants the model loaded or unloaded
    request: dict[str, Any] = field(repr=False)


def read_chat(body: bytes) -> Asked:
    """Reads an /api/chat request, or says in one sentence what is wrong with it."""
    members, request = _scan(body)
    messages = _messages(request.get("messages"))
    tools = request.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRequest("tools must be a list of objects", "tools")
    try:
        text = sum(_size(message.get(key)) for message in messages for key in ("content", "thinking", "tool_calls"))
        session = _session(messages)
    except RecursionError:
        raise BadRequest("messages are nested too deeply", "messages") from None
    text += sum(member.end - member.start for member in members if member.key == "tools")
    images = sum(len(message.get("images") or ()) for message in messages)
    return _asked(
        "chat",
        request,
        tokens=text // BYTES_PER_TOKEN + len(messages) * TOKENS_PER_MESSAGE,
        images=images,
        session=session,
        nothing=not messages,
    )


def read_generate(body: bytes) -> Asked:
    """Reads an /api/generate request, or says in one sentence what is wrong with it."""
    _, request = _scan(body)
    for key in ("prompt", "system", "suffix", "template"):
        if not isinstance(request.get(key), str | None):
            raise BadRequest(f"{key} must be a text", key)
    _flag(request, "raw")
    images = _images(request.get("images"), "images")
    text = sum(_size(request.get(key)) for key in ("prompt", "system", "suffix"))
    context = request.get("context")
    if context is not None and not isinstance(context, list):
        raise BadRequest("context must be a list of token numbers", "context")
    return _asked(
        "generate",
        request,
        tokens=text // BYTES_PER_TOKEN + len(context or ()) + 2 * TOKENS_PER_MESSAGE,
        images=len(images),
        session="",
        nothing=not request.get("prompt"),
    )


def rewrite(
    body: bytes, model: str, *, drops: Container[str] = frozenset(), extra: Mapping[str, object] | None = None
) -> bytes:
    """Makes the request of an Ollama out of it: its model, a stream, and a stay that no client shortens.

    `drops` are keys that the runtime must not see, at the top or in `options`, because they would load the model
    again; `extra` is what it must.
    """
    members = json_splice.scan(body)
    options = [member for member in members if member.key == "options"]
    if options and isinstance(options[-1].value, dict):  # of several the last one counts
        inner = json_splice.without(body[options[-1].start : options[-1].end], drops)
        body = json_splice.splice_members(body, members, {"options": inner})
    body = json_splice.without(body, drops)
    return json_splice.splice(body, {"model": model, "stream": True, "keep_alive": KEEP_FOR_EVER, **(extra or {})})


def option(request: Mapping[str, Any], key: str) -> float | int | None:
    """Gives a number among the options."""
    value = (request.get("options") or {}).get(key)
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise BadRequest(f"option {key} must be a number", f"options.{key}")
    return value


def only_native(request: Mapping[str, Any]) -> str | None:
    """Names what only an Ollama can do with the request: no other runtime's chat knows it."""
    return next((key for key in _ONLY_NATIVE if request.get(key)), None)


def _asked(shape: Shape, request: dict[str, Any], *, tokens: int, images: int, session: str, nothing: bool) -> Asked:
    form = request.get("format")
    if form not in (None, "", "json") and not isinstance(form, dict):
        raise BadRequest('format must be "json" or a JSON schema', "format")
    needs = {name for name in ("tools", "logprobs") if request.get(name)} | ({"images"} if images else set())
    if only_native(request):
        needs.add("native")
    limit = option(request, "num_predict")
    stream = _flag(request, "stream")
    empty: Empty | None = None
    if nothing:
        empty = "unload" if _is_zero(request.get("keep_alive")) else "load"
    return Asked(
        shape=shape,
        model=request["model"],
        stream=stream is not False,
        prompt_tokens=tokens + images * TOKENS_PER_IMAGE,
        max_tokens=int(limit) if limit is not None and limit >= 1 else None,  # -1 and -2 are "no end"
        session=session,
        needs=frozenset(needs),
        empty=empty,
        request=request,
    )


def _scan(body: bytes) -> tuple[list[json_splice.Member], dict[str, Any]]:
    members = json_splice.read(body)
    request = {member.key: member.value for member in members}
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be the name of a model", "model")
    options = request.get("options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("options must be an object", "options")
    return members, request


def _messages(messages: object) -> list[dict[str, Any]]:
    if messages is None:
        return []
    if not isinstance(messages, list):
        raise BadRequest("messages must be a list", "messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{where} must be an object", where)
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise BadRequest(f"{where}.role must be a text", f"{where}.role")
        for key in ("content", "thinking", "tool_name", "tool_call_id"):
            if not isinstance(message.get(key), str | None):
                raise BadRequest(f"{where}.{key} must be a text", f"{where}.{key}")
        _images(message.get("images"), f"{where}.images")
        _calls(message.get("tool_calls"), f"{where}.tool_calls")
    return messages


def _images(images: object, where: str) -> list[str]:
    if images is None:
        return []
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise BadRequest(f"{where} must be a list of pictures in base64", where)
    return images


def _calls(calls: object, where: str) -> None:
    if calls is not None and not isinstance(calls, list):
        raise BadRequest(f"{where} must be a list", where)
    for index, call in enumerate(calls or ()):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"{where}[{index}] must be an object with a function that has a name", where)


def _flag(request: Mapping[str, Any], key: str) -> bool | None:
    value = request.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false", key)
    return value


def _is_zero(keep_alive: object) -> bool:
    if isinstance(keep_alive, str):
        return _ZERO.fullmatch(keep_alive) is not None
    return isinstance(keep_alive, int | float) and not isinstance(keep_alive, bool) and keep_alive == 0


def _size(value: object) -> int:
    """Counts the bytes of a text, or of whatever else is there, written out."""
    if value is None:
        return 0
    if not isinstance(value, str):
        value = json.dumps(value)
    return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))


def _session(messages: list[dict[str, Any]]) -> str:
    """Names the conversation by a hash of what all its turns begin with."""
    leading = []
    for message in messages:
        leading.append(message)
        if message.get("role") == "user":
            break
    if not leading:
        return ""
    return "h-" + hashlib.blake2b(json.dumps(leading, sort_keys=True).encode(), digest_size=12).hexdigest()
