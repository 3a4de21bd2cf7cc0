"""The words of an answer, in any dialect: of a whole one, or of a frame of its stream. Pure.

What is no text (thoughts, calls of tools, vectors) is left out; whoever wants it asks for JSON.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

_ODD = (LookupError, TypeError, AttributeError, ValueError)


def text_of(endpoint: str, answer: Any) -> str | None:
    """The text of a whole answer; None where it has none, as vectors or a call of a tool."""
    try:
        return "".join(_WHOLE[endpoint](answer)) or None
    except _ODD:
        return None


def pieces_of(endpoint: str, frame: str) -> str:
    """The text in the bytes of a frame, as the endpoint streams them; "" where there is none."""
    read = _PIECES.get(endpoint)
    if read is None:
        return ""
    return "".join(piece for said in _objects(frame) for piece in _safely(read, said) if isinstance(piece, str))


def objects_of(frame: str) -> list[dict[str, Any]]:
    """The objects in the bytes of a frame."""
    return list(_objects(frame))


def _objects(frame: str) -> Iterator[dict[str, Any]]:
    """Reads server-sent events and lines of JSON alike."""
    for line in frame.split("\n"):
        data = line.removeprefix("data:").strip()
        if not data.startswith("{"):
            continue
        try:
            found = json.loads(data)
        except ValueError:
            continue
        yield found


def _safely(read: Callable[[dict[str, Any]], Iterator[Any]], said: dict[str, Any]) -> Iterator[Any]:
    try:
        yield from read(said)
    except _ODD:
        return


def _chat(answer: dict[str, Any]) -> Iterator[str]:
    yield answer["choices"][0]["message"]["content"] or ""


def _completion(answer: dict[str, Any]) -> Iterator[str]:
    yield answer["choices"][0]["text"]


def _response(answer: dict[str, Any]) -> Iterator[str]:
    for item in answer["output"]:
        for part in item.get("content") or () if item["type"] == "message" else ():
            if part["type"] == "output_text":
                yield part["text"]


def _messages(answer: dict[str, Any]) -> Iterator[str]:
    for block in answer["content"]:
        if block["type"] == "text":
            yield block["text"]


def _ollama(answer: dict[str, Any]) -> Iterator[str]:
    yield answer["message"]["content"] if "message" in answer else answer["response"]


def _chat_piece(chunk: dict[str, Any]) -> Iterator[Any]:
    yield from (choice["delta"].get("content") for choice in chunk["choices"] if choice.get("index", 0) == 0)


def _completion_piece(chunk: dict[str, Any]) -> Iterator[Any]:
    yield from (choice.get("text") for choice in chunk["choices"] if choice.get("index", 0) == 0)


def _response_piece(event: dict[str, Any]) -> Iterator[Any]:
    if event["type"] == "response.output_text.delta":
        yield event["delta"]


def _messages_piece(event: dict[str, Any]) -> Iterator[Any]:
    if event["type"] == "content_block_delta" and event["delta"]["type"] == "text_delta":
        yield event["delta"]["text"]


_WHOLE: dict[str, Callable[[Any], Iterator[str]]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _response,
    "/v1/messages": _messages,
    "/api/chat": _ollama,
    "/api/generate": _ollama,
}
_PIECES: dict[str, Callable[[Any], Iterator[Any]]] = {
    "/v1/chat/completions": _chat_piece,
    "/v1/completions": _completion_piece,
    "/v1/responses": _response_piece,
    "/v1/messages": _messages_piece,
    "/api/chat": _ollama,
    "/api/generate": _ollama,
}
