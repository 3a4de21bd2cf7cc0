"""The OpenAI dialect: what a chat request asks for, what must change in it, and our own words in its stream.

A body passes through untouched but for the model name and the stream flags. The answer's stream is read by
`ChatReader` and folded into one object for `stream:false` clients by `fold_chat`.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.dialects import json_splice
from broker.dialects.bounds import read_request
from broker.dialects.openai_fold import fold_chat
from broker.dialects.openai_stream import ChatReader, RuntimeComplaint, read_complaint
from broker.errors import BadRequest

__all__ = [
    "DONE",
    "PATH",
    "ChatFacts",
    "ChatReader",
    "RuntimeComplaint",
    "error_event",
    "error_object",
    "fold_chat",
    "heartbeat",
    "models_list",
    "read_chat",
    "read_complaint",
    "rewrite_chat",
]

PATH: Final = "/v1/chat/completions"

DONE: Final = b"data: [DONE]\n\n"

MAX_CHOICES = 8
BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4  # role and separators of a chat template
TOKENS_PER_IMAGE = 1024  # what vision models of this size make of a usual picture; its base64 is not text

_USAGE_ASKED: Final = b'{"include_usage":true}'
_ATTACHMENTS: Final = ("image_url", "input_image", "image", "input_audio", "file")
_IMAGES: Final = ("image_url", "input_image", "image")


@dataclass(frozen=True, slots=True)
class ChatFacts:
    """What admission and dispatch must know of a chat request; the rest of the body is the runtime's business."""

    model: str
    stream: bool
    include_usage: bool  # also true without a stream: the folded answer always carries the usage
    n: int
    prompt_tokens: int  # an estimate: bytes of text / 4, pictures at a fixed size
    max_tokens: int | None
    session: str
    needs: frozenset[str]  # of "tools", "images", "logprobs"


def read_chat(body: bytes) -> ChatFacts:
    """Reads a chat request, or says in one sentence what is wrong with it. Unknown keys are the runtime's to judge."""
    members = read_request(body)
    request = {member.key: member.value for member in members}
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be the name of a model", "model")
    messages = _messages(request.get("messages"))
    stream = _flag(request, "stream")
    options = request.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    tools_bytes = sum(member.end - member.start for member in members if member.key in ("tools", "functions"))
    try:
        text_bytes, attachments, images = _weigh(messages)
        session = _session(request.get("prompt_cache_key"), messages)
    except RecursionError:
        raise BadRequest("messages are nested too deeply", "messages") from None
    needs = set()
    if request.get("tools") or request.get("functions"):
        needs.add("tools")
    if images:
        needs.add("images")
    if request.get("logprobs"):
        needs.add("logprobs")
    return ChatFacts(
        model=model,
        stream=stream,
        include_usage=not stream or (options or {}).get("include_usage") is True,
        n=_choices(request.get("n")),
        prompt_tokens=(text_bytes + tools_bytes) // BYTES_PER_TOKEN
        + attachments * TOKENS_PER_IMAGE
        + len(messages) * TOKENS_PER_MESSAGE,
        max_tokens=_max_tokens(request),
        session=session,
        needs=frozenset(needs),
    )


def rewrite_chat(
    body: bytes,
    model: str,
    *,
    slot: int | None = None,
    drops: Container[str] = frozenset(),
    extra: Mapping[str, object] | None = None,
) -> bytes:
    """Names the runtime's model and asks for a stream with usage; leaves every other byte as the client sent it.

    `slot` is the llama-server slot that has the session's prompt in its cache. `drops` are keys that the runtime must
    not see, at the top or in `options`, because they would load the model again; `extra` is what it must.
    """
    members = json_splice.scan(body)
    if drops and any(member.key in drops or member.key == "options" for member in members):
        body = _without(body, members, drops)
        members = json_splice.scan(body)
    options = _USAGE_ASKED
    for member in members:
        if member.key == "stream_options" and isinstance(member.value, dict):
            options = json_splice.splice(body[member.start : member.end], {"include_usage": True})
    changes: dict[str, object] = {"model": model, "stream": True, "stream_options": options, **(extra or {})}
    if slot is not None:
        changes["id_slot"] = slot
    return json_splice.splice_members(body, members, changes)


def _without(body: bytes, members: list[json_splice.Member], drops: Container[str]) -> bytes:
    options = [member for member in members if member.key == "options"]
    if options and isinstance(options[-1].value, dict):  # of several the last one counts
        inner = json_splice.without(body[options[-1].start : options[-1].end], drops)
        body = json_splice.splice_members(body, members, {"options": inner})
    return json_splice.without(body, drops)


def heartbeat(note: str) -> bytes:
    """Says "still waiting" as a comment, which every client skips (an `id:` or `retry:` line breaks some)."""
    return f": warmlane {' '.join(note.split())}\n\n".encode()


def error_object(
    code: str, message: str, *, kind: str, param: str | None = None, retry_after_s: int | None = None
) -> dict[str, Any]:
    """Builds the body of an error: OpenAI's object, with our stable code and when to come back."""
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    if retry_after_s is not None:
        error["retry_after_s"] = retry_after_s
    return {"error": error}


def error_event(
    code: str, message: str, *, kind: str, param: str | None = None, retry_after_s: int | None = None
) -> bytes:
    """Says inside a stream that it failed; no `[DONE]` follows, for that would read as success."""
    body = error_object(code, message, kind=kind, param=param, retry_after_s=retry_after_s)
    return b"data: " + json_splice.encode(body) + b"\n\n"


def models_list(names: Iterable[str]) -> dict[str, Any]:
    """Lists what a client may ask for, routing names and aliases too."""
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": "warmlane"} for name in names],
    }


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRequest(f"messages[{index}] must be an object", f"messages[{index}]")
    return messages


def _flag(request: Mapping[str, Any], key: str) -> bool:
    value = request.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false", key)
    return value is True


def _choices(n: object) -> int:
    if n is None:
        return 1
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_CHOICES:
        raise BadRequest(f"n must be a whole number from 1 to {MAX_CHOICES}", "n")
    return n


def _max_tokens(request: Mapping[str, Any]) -> int | None:
    """Reads the bound of the answer; the newer name wins where a client sends both."""
    found: int | None = None
    for key in ("max_tokens", "max_completion_tokens"):
        value = request.get(key)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadRequest(f"{key} must be a whole number above 0", key)
            found = value
    return found


def _session(cache_key: object, messages: list[dict[str, Any]]) -> str:
    """Names the conversation: the client's own cache key, else a hash of what all its turns begin with.

    `user` is no use here: one person runs many sessions at once, and each has a prefix of its own.
    """
    if isinstance(cache_key, str) and cache_key:
        if len(cache_key) <= 64 and cache_key.isascii() and cache_key.isprintable():
            return cache_key
        return _hash(cache_key)
    leading = []
    for message in messages:
        leading.append(message)
        if message.get("role") == "user":
            break
    return _hash(leading)


def _hash(value: object) -> str:
    return "h-" + hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def _weigh(value: object) -> tuple[int, int, int]:
    """Counts bytes of text, attachments of any kind, and pictures among them, anywhere below a value."""
    if isinstance(value, str):
        return (len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))), 0, 0
    if isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str) and kind in _ATTACHMENTS:
            return 0, 1, int(kind in _IMAGES)
        value = list(value.values())
    text = attachments = images = 0
    if isinstance(value, list):
        for item in value:
            if isinstance(item, (str, dict, list)):
                more = _weigh(item)
                text, attachments, images = text + more[0], attachments + more[1], images + more[2]
    return text, attachments, images
