"""The Anthropic dialect: what a messages request asks for, and our own words to its clients.

A runtime that speaks it gets the body untouched but for the model's name and the stream flag; for the others
`anthropic_translate` makes a chat request of it. `anthropic_stream` reads either answer, `anthropic_fold` makes one
object of it. Keys that we do not know are the runtime's to judge, or are left out of a translation.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from broker.dialects import json_splice
from broker.errors import BadRequest

PATH: Final = "/v1/messages"
COUNT_PATH: Final = "/v1/messages/count_tokens"

BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4  # role and separators of a chat template
TOKENS_PER_IMAGE = 1024  # what vision models of this size make of a usual picture; its base64 is not text

BILLING_LINE: Final = "x-anthropic-billing-header:"
"""Claude Code's first system block, new in every request: no prompt, and it would keep a cache from being found."""

_ATTACHED: Final = frozenset({"base64", "url", "file"})
_OWN_STATUS: Final = {502: 500, 503: 529}
_KINDS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been read: what admission must know of it, and its members for whoever translates it."""

    model: str
    stream: bool
    prompt_tokens: int  # an estimate: bytes of text / 4, pictures at a fixed size
    max_tokens: int | None
    session: str
    needs: frozenset[str]  # of "tools", "images", "files"
    request: dict[str, Any] = field(repr=False)


def read_messages(body: bytes) -> Asked:
    """Reads a messages request, or says in one sentence what is wrong with it."""
    members = json_splice.read(body)
    request = {member.key: member.value for member in members}
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be the name of a model", "model")
    messages = _messages(request.get("messages"))
    system = request.get("system")
    if system is not None:
        _check_content(system, "system")
    tools = request.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRequest("tools must be a list of objects", "tools")
    stream = request.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise BadRequest("stream must be true or false", "stream")
    try:
        text, attachments, images = _weigh([system, messages])
        session = _session(request.get("metadata"), system, messages)
    except RecursionError:
        raise BadRequest("messages are nested too deeply", "messages") from None
    text += sum(member.end - member.start for member in members if member.key == "tools")
    return Asked(
        model=model,
        stream=stream is True,
        prompt_tokens=text // BYTES_PER_TOKEN
        + attachments * TOKENS_PER_IMAGE
        + (len(messages) + bool(system)) * TOKENS_PER_MESSAGE,
        max_tokens=_max_tokens(request.get("max_tokens")),
        session=session,
        needs=frozenset(
            name for name, needed in (("tools", tools), ("images", images), ("files", _holds_files(messages))) if needed
        ),
        request=request,
    )


def rewrite_messages(
    body: bytes, model: str, *, drops: Container[str] = frozenset(), extra: Mapping[str, object] | None = None
) -> bytes:
    """Names the runtime's model and asks for a stream; leaves every other byte as the client sent it."""
    body = json_splice.without(body, drops)
    return json_splice.splice(body, {"model": model, "stream": True, **(extra or {})})


def heartbeat(note: str) -> bytes:
    """Says "still waiting" as a ping, which clients take at any moment; the note is a comment inside its event."""
    return f': warmlane {" ".join(note.split())}\nevent: ping\ndata: {{"type": "ping"}}\n\n'.encode()


def own_status(status: int) -> int:
    """Gives the status by which this dialect's clients know ours: what waiting cures is 529."""
    return _OWN_STATUS.get(status, status)


def error_object(code: str, message: str, *, status: int, retry_after_s: int | None = None) -> dict[str, Any]:
    """Builds the body of an error in Anthropic's shape, with our stable code and when to come back."""
    status = own_status(status)
    kind = _KINDS.get(status, "invalid_request_error" if status < 499 else "api_error")
    error: dict[str, Any] = {"type": kind, "message": message, "code": code}
    if retry_after_s is not None:
        error["retry_after_s"] = retry_after_s
    return {"type": "error", "error": error}


def error_event(code: str, message: str, *, status: int, retry_after_s: int | None = None) -> bytes:
    """Says inside a stream that it failed; no `message_stop` follows."""
    body = error_object(code, message, status=status, retry_after_s=retry_after_s)
    return b"event: error\ndata: " + json_splice.encode(body) + b"\n\n"


def token_count(tokens: int) -> dict[str, int]:
    """Answers a request to count the tokens of a prompt."""
    return {"input_tokens": max(1, tokens)}


def texts(content: object) -> Iterable[dict[str, Any]]:
    """Gives the blocks of a content, of which a bare text is one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content if isinstance(content, list) else []


def is_billing_line(block: Mapping[str, Any]) -> bool:
    """Whether a system block is for the provider's books and no prompt."""
    text = block.get("text")
    return isinstance(text, str) and text.startswith(BILLING_LINE)


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", "messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{where} must be an object", where)
        if message.get("role") not in ("user", "assistant", "system"):
            raise BadRequest(f"{where}.role must be user or assistant", f"{where}.role")
        _check_content(message.get("content"), f"{where}.content")
    return messages


def _check_content(content: object, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a text or a list of blocks", where)
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise BadRequest(f"{where}[{index}] must be an object with a type", f"{where}[{index}]")
        if block["type"] == "text" and not isinstance(block.get("text"), str):
            raise BadRequest(f"{where}[{index}].text must be a text", f"{where}[{index}].text")
        if block["type"] == "tool_use" and not isinstance(block.get("name"), str):
            raise BadRequest(f"{where}[{index}].name must be the name of a tool", f"{where}[{index}].name")
        if block["type"] == "tool_result":
            if not isinstance(block.get("tool_use_id"), str):
                raise BadRequest(
                    f"{where}[{index}].tool_use_id must be the id of a tool_use", f"{where}[{index}].tool_use_id"
                )
            if block.get("content") is not None:
                _check_content(block["content"], f"{where}[{index}].content")


def _holds_files(messages: list[dict[str, Any]]) -> bool:
    """Whether there are files which no chat request can carry: a PDF, or one that the provider has."""
    left: list[object] = [message["content"] for message in messages]
    while left:
        for block in texts(left.pop()):
            source = block.get("source") if block["type"] in ("image", "document") else None
            kind = source.get("type") if isinstance(source, dict) else None
            if kind == "file" or (block["type"] == "document" and isinstance(kind, str) and kind in _ATTACHED):
                return True
            if block["type"] == "tool_result":
                left.append(block.get("content"))
    return False


def _max_tokens(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadRequest("max_tokens must be a whole number above 0", "max_tokens")
    return value


def _session(metadata: object, system: object, messages: list[dict[str, Any]]) -> str:
    """Names the conversation by what all its turns begin with and, where the client says one, by its user.

    Agents under one session of Claude Code have prompts of their own, so its id alone would be too little. Cache marks
    move from turn to turn and do not count.
    """
    leading: list[object] = [[block for block in texts(system) if not is_billing_line(block)]]
    for message in messages:
        leading.append([message.get("role"), list(texts(message.get("content")))])
        if message.get("role") == "user":
            break
    user = metadata.get("user_id") if isinstance(metadata, dict) else None
    told = json.dumps([user if isinstance(user, str) else "", _unmarked(leading)], sort_keys=True)
    return "h-" + hashlib.blake2b(told.encode(), digest_size=12).hexdigest()


def _unmarked(value: object) -> object:
    if isinstance(value, dict):
        return {key: _unmarked(inner) for key, inner in value.items() if key != "cache_control"}
    return [_unmarked(inner) for inner in value] if isinstance(value, list) else value


def _weigh(value: object) -> tuple[int, int, int]:
    """Counts bytes of text, attachments of any kind, and pictures among them, anywhere below a value."""
    if isinstance(value, str):
        return (len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))), 0, 0
    if isinstance(value, dict):
        source = value.get("source")
        kind = source.get("type") if isinstance(source, dict) else None
        if isinstance(kind, str) and kind in _ATTACHED:
            return 0, 1, int(value.get("type") == "image")
        value = [inner for key, inner in value.items() if key not in ("type", "cache_control", "signature")]
    text = attachments = images = 0
    if isinstance(value, list):
        for item in value:
            if isinstance(item, (str, dict, list)):
                more = _weigh(item)
                text, attachments, images = text + more[0], attachments + more[1], images + more[2]
    return text, attachments, images
