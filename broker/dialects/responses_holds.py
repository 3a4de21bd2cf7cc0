"""What a request of the Responses dialect holds beside plain text."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from broker.dialects.holds import Held, Kind, file_of, of_content, strays, unknown_part, unreadable

_ROLES: Final[Mapping[str, Kind]] = {
    "system": "systemPrompts",
    "developer": "systemPrompts",
    "user": "text",
    "assistant": "text",
}
_KNOWN: Final = frozenset(
    "background model input instructions stream stream_options store include metadata user safety_identifier "
    "service_tier tools tool_choice parallel_tool_calls max_tool_calls text reasoning max_output_tokens temperature "
    "top_p top_logprobs truncation prompt_cache_key prompt_cache_retention prompt_cache_options moderation "
    "context_management client_metadata".split()
)
_TEXTS: Final = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal"})


def responses_holds(request: Mapping[str, Any]) -> Iterator[Held]:
    """Tells of /v1/responses: instructions, and the items of the input."""
    yield from strays(request, _KNOWN, "")
    yield from of_content(request.get("instructions"), "instructions", "systemPrompts", _part)
    given = request.get("input")
    if isinstance(given, str):
        yield Held("text", "input", given)
        return
    for index, item in enumerate(given if isinstance(given, list) else []):
        where = f"input[{index}]"
        if isinstance(item, dict):
            yield from _item(item, where)
        else:
            yield unreadable(where, "an item that is no object")


def _item(item: dict[str, Any], where: str) -> Iterator[Held]:
    kind = item.get("type") or ("message" if "role" in item else "")
    if kind == "message":
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            yield unreadable(where, f"a message of role {str(item.get('role'))[:40]}")
        else:
            yield from of_content(item.get("content"), f"{where}.content", role, _part)
    elif kind == "reasoning":
        for key in ("content", "summary"):
            yield from of_content(item.get(key), f"{where}.{key}", "text", _part)
    elif str(kind).endswith(("_call", "_call_output", "_tools", "_request", "_response", "_output")):
        yield Held("toolOutput", where)  # calls too: what a tool was called with may be a file
        for key in ("output", "content"):
            if isinstance(item.get(key), list):
                yield from of_content(item[key], f"{where}.{key}", "toolOutput", _part)
    else:
        yield unknown_part(item, where)


def _part(part: dict[str, Any], where: str, kind: Kind) -> Iterator[Held]:
    match part.get("type"):
        case str(name) if name in _TEXTS:
            text = part.get("text", part.get("refusal"))
            yield Held(kind, where, text if isinstance(text, str) else "")
        case "input_image" | "image_url":
            yield Held("images", where)
        case "input_file" | "file":
            if part.get("file_data"):
                yield from file_of(part["file_data"], where)
            else:
                yield unreadable(where, "a file that lies elsewhere")
                yield Held("fileContext", where)
        case "input_audio":
            yield unreadable(where, "sound")
        case _:
            yield unknown_part(part, where)
