"""What chat, completions and embeddings in the OpenAI dialect hold beside plain text."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from broker.dialects.holds import Held, Kind, file_of, of_content, of_messages, strays, unknown_part, unreadable

_ROLES: Final[Mapping[str, Kind]] = {
    "system": "systemPrompts",
    "developer": "systemPrompts",
    "user": "text",
    "assistant": "text",
    "tool": "toolOutput",
    "function": "toolOutput",
}
_IMAGES: Final = frozenset({"image_url", "input_image", "image"})
_OPTIONS: Final = frozenset(
    "model stream stream_options n temperature top_p top_k min_p max_tokens max_completion_tokens stop seed user "
    "logprobs top_logprobs logit_bias presence_penalty frequency_penalty response_format tools tool_choice functions "
    "function_call parallel_tool_calls reasoning_effort prompt_cache_key prompt_cache_retention metadata store "
    "service_tier modalities verbosity safety_identifier web_search_options".split()
)
_CHAT: Final = _OPTIONS | {"messages", "prediction", "documents", "audio"}
_MESSAGE: Final = frozenset(
    "role content name tool_calls function_call tool_call_id refusal reasoning_content reasoning audio".split()
)
_COMPLETION: Final = _OPTIONS | {"prompt", "suffix", "echo", "best_of"}
_EMBEDDING: Final = frozenset({"model", "input", "user", "encoding_format", "dimensions"})
_FILL_IN: Final = ("<|fim_", "<fim_", "<PRE>", "<|file_sep|>", "[SUFFIX]", "<|repo_name|>")
"""Words by which models are asked to fill in the middle of a file."""


def chat_holds(request: Mapping[str, Any]) -> Iterator[Held]:
    """Tells of /v1/chat/completions. What the assistant called a tool with counts as tool output: it may be a file."""
    yield from strays(request, _CHAT, "")
    for key in ("prediction", "documents"):  # an edit's old file, and what was retrieved for the question
        if request.get(key):
            yield Held("fileContext", key)
    if request.get("audio"):
        yield unreadable("audio", "sound")
    yield from of_messages(request, _ROLES, _message)


def _message(message: dict[str, Any], where: str, kind: Kind) -> Iterator[Held]:
    yield from strays(message, _MESSAGE, where)
    yield from of_content(message.get("content"), f"{where}.content", kind, _part)
    for key in ("refusal", "reasoning_content", "reasoning"):
        yield from of_content(message.get(key), f"{where}.{key}", kind, _part)
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            yield Held("toolOutput", f"{where}.{key}")
    if message.get("audio"):
        yield unreadable(f"{where}.audio", "sound")


def completion_holds(request: Mapping[str, Any]) -> Iterator[Held]:
    """Tells of /v1/completions. With a suffix, or words for the middle of a file, the prompt is a file."""
    yield from strays(request, _COMPLETION, "")
    if request.get("suffix"):
        yield Held("fileContext", "suffix")
    prompt = request.get("prompt")
    for index, one in enumerate(prompt if isinstance(prompt, list) else [prompt]):
        where = f"prompt[{index}]" if isinstance(prompt, list) else "prompt"
        if not isinstance(one, str):
            yield unreadable(where, "token numbers")
            return
        fills_in = any(word in one for word in _FILL_IN)
        yield Held("fileContext" if fills_in else "text", where, one)


def embedding_holds(request: Mapping[str, Any]) -> Iterator[Held]:
    """Tells of /v1/embeddings. It is how an indexer sends files, piece by piece, so each input counts as one."""
    yield from strays(request, _EMBEDDING, "")
    given = request.get("input")
    for index, one in enumerate(given if isinstance(given, list) else [given]):
        where = f"input[{index}]" if isinstance(given, list) else "input"
        if not isinstance(one, str):
            yield unreadable(where, "token numbers")
            return
        yield Held("fileContext", where, one)


def _part(part: dict[str, Any], where: str, kind: Kind) -> Iterator[Held]:
    match part.get("type"):
        case "text" | "input_text" | "output_text" | "refusal" | "thinking" | "reasoning":
            for key, value in part.items():
                if key != "type" and isinstance(value, str):
                    yield Held(kind, where, value)
        case str(image) if image in _IMAGES:
            yield Held("images", where)
        case "file":
            file = part.get("file")
            if not isinstance(file, dict) or not file.get("file_data"):
                yield unreadable(where, "a file that only the provider has")
                yield Held("fileContext", where)
            else:
                yield from file_of(file["file_data"], where)
        case "input_audio":
            yield unreadable(where, "sound")
        case _:
            yield unknown_part(part, where)
