"""What a messages request of the Anthropic dialect holds beside plain text."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from broker.dialects.holds import Held, Kind, file_of, of_content, of_messages, strays, unknown_part, unreadable

_KNOWN: Final = frozenset(
    "model messages system max_tokens metadata stop_sequences stream temperature top_k top_p tools tool_choice "
    "thinking service_tier container mcp_servers context_management output_config output_format cache_control".split()
)
_ROLES: Final[Mapping[str, Kind]] = {"user": "text", "assistant": "text", "system": "systemPrompts"}


def messages_holds(request: Mapping[str, Any]) -> Iterator[Held]:
    """Tells of /v1/messages: the system prompt, and the blocks of each message."""
    yield from strays(request, _KNOWN, "")
    yield from of_content(request.get("system"), "system", "systemPrompts", _block)
    if request.get("mcp_servers"):
        yield unreadable("mcp_servers", "servers that the provider would ask")
    yield from of_messages(request, _ROLES, _message)


def _message(message: dict[str, Any], where: str, kind: Kind) -> Iterator[Held]:
    yield from of_content(message.get("content"), f"{where}.content", kind, _block)


def _block(block: dict[str, Any], where: str, kind: Kind) -> Iterator[Held]:
    name = str(block.get("type"))
    if name in ("text", "thinking"):
        text = block.get(name)
        yield Held(kind, where, text if isinstance(text, str) else "")
    elif name == "redacted_thinking":
        yield unreadable(where, "thoughts that only the provider can read")
    elif name == "image":
        source = block.get("source")
        if isinstance(source, dict) and source.get("type") == "file":
            yield unreadable(where, "a picture that only the provider has")
        yield Held("images", where)
    elif name == "document":
        yield from _document(block, where)
    elif name == "search_result":
        yield Held("fileContext", where)
        yield from of_content(block.get("content"), f"{where}.content", "fileContext", _block)
    elif name == "tool_result" or name.endswith("_tool_result"):
        yield Held("toolOutput", where)
        if isinstance(block.get("content"), list):
            yield from of_content(block["content"], f"{where}.content", "toolOutput", _block)
    elif name == "tool_use" or name.endswith("_tool_use"):
        yield Held("toolOutput", where)  # what a tool was called with may be a file
    else:
        yield unknown_part(block, where)


def _document(block: dict[str, Any], where: str) -> Iterator[Held]:
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    kind = source.get("type")
    if kind == "base64":
        yield from file_of(source.get("data"), where)
    elif kind == "text" and isinstance(source.get("data"), str):
        yield Held("fileContext", where, source["data"])
    elif kind == "content":
        yield Held("fileContext", where)
        yield from of_content(source.get("content"), f"{where}.source.content", "fileContext", _block)
    else:
        yield unreadable(where, "a document that lies elsewhere")
        yield Held("fileContext", where)
