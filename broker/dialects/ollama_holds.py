"""What the requests of the Ollama dialect hold beside plain text."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from broker.dialects.holds import Held, Kind, of_messages, strays, unreadable

_OPTIONS: Final = frozenset("model stream format options keep_alive think logprobs top_logprobs raw".split())
_ROLES: Final[Mapping[str, Kind]] = {
    "system": "systemPrompts",
    "user": "text",
    "assistant": "text",
    "tool": "toolOutput",
}


def chat_holds(request: Mapping[str, Any]) -> Iterator[Held]:
    """Tells of /api/chat."""
    yield from strays(request, _OPTIONS | {"messages", "tools"}, "")
    yield from of_messages(request, _ROLES, _message)


def _message(message: dict[str, Any], where: str, kind: Kind) -> Iterator[Held]:
    known = frozenset("role content thinking images tool_calls tool_name tool_call_id".split())
    yield from strays(message, known, where)
    for key in ("content", "thinking"):
        if isinstance(message.get(key), str) and message[key]:
            yield Held(kind, f"{where}.{key}", message[key])
    if message.get("tool_calls"):
        yield Held("toolOutput", f"{where}.tool_calls")  # what a tool was called with may be a file
    if message.get("images"):
        yield Held("images", f"{where}.images")


def generate_holds(request: Mapping[str, Any]) -> Iterator[Held]:
    """Tells of /api/generate. With a suffix the prompt is a file; a context is token numbers of an earlier talk."""
    yield from strays(request, _OPTIONS | {"prompt", "suffix", "system", "template", "context", "images"}, "")
    for key in ("system", "template"):
        if request.get(key):
            yield Held("systemPrompts", key, str(request[key]))
    if request.get("suffix"):
        yield Held("fileContext", "suffix", str(request["suffix"]))
    if request.get("context"):
        yield unreadable("context", "token numbers")
    if request.get("images"):
        yield Held("images", "images")
    prompt = request.get("prompt")
    if isinstance(prompt, str) and prompt:
        yield Held("fileContext" if request.get("suffix") or request.get("raw") else "text", "prompt", prompt)


def embed_holds(request: Mapping[str, Any]) -> Iterator[Held]:
    """Tells of /api/embed and /api/embeddings: how an indexer sends files, so each input counts as one."""
    known = frozenset("model input prompt options keep_alive truncate dimensions".split())
    yield from strays(request, known, "")
    for key in ("input", "prompt"):
        given = request.get(key)
        for index, one in enumerate(given if isinstance(given, list) else [given]):
            where = f"{key}[{index}]" if isinstance(given, list) else key
            if isinstance(one, str) and one:
                yield Held("fileContext", where, one)
            elif one is not None and one != "":
                yield unreadable(where, "an input that is no text")
