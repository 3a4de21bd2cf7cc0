"""What a client heard, by the grammar of its endpoint: the text, whether it says of itself that it is whole, an error.

Stricter than any client: a line that no client needs, an event out of order or behind the end, a number that is left
out is an AssertionError with a sentence. The text of vectors is their JSON.
"""

import base64
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE = "/v1/messages", "/api/chat", "/api/generate"
EMBEDDINGS, OLLAMA_EMBED, OLLAMA_EMBEDDINGS = "/v1/embeddings", "/api/embed", "/api/embeddings"
STREAMING = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE)
VECTORS = (EMBEDDINGS, OLLAMA_EMBED, OLLAMA_EMBEDDINGS)


@dataclass
class Heard:
    """An answer as far as it came."""

    text: str = ""
    whole: bool = False
    error: str = ""  # a code, or the message where the dialect has none
    beats: int = 0


def hear(path: str, body: bytes, *, status: int = 200, stream: bool = False, cut: bool = False) -> Heard:
    """Reads an answer. `cut` = the client left or was left before the end: the last event may be half of one."""
    if status != 200 or not stream:
        return Heard() if cut else _object(path, body, status)
    heard = Heard()
    if path in (OLLAMA_CHAT, OLLAMA_GENERATE):
        lines = body.split(b"\n")
        tail = lines.pop()
        _lines(path, lines, heard)
    else:
        tail = _EVENTS[path](body, heard)
    assert cut or not tail, f"half an event at the end of the answer: {tail!r}"
    assert cut or heard.whole or heard.error, f"the answer ended without a word: {heard.text[-40:]!r}"
    return heard


def _object(path: str, body: bytes, status: int) -> Heard:
    told = json.loads(body)
    if status != 200:
        error = told["error"]
        return Heard(error=str(told.get("code") or error.get("code") or error.get("type")))
    assert not told.get("error"), f"an error under a 200: {told}"
    match path:
        case "/v1/chat/completions":
            (choice,) = told["choices"]
            assert choice["finish_reason"] == "stop", choice
            text = choice["message"]["content"]
        case "/v1/completions":
            (choice,) = told["choices"]
            assert choice["finish_reason"] == "stop", choice
            text = choice["text"]
        case "/v1/responses":
            assert told["status"] == "completed", told
            text = _output(told)
        case "/v1/messages":
            assert told["stop_reason"] == "end_turn", told
            text = "".join(block["text"] for block in told["content"])
        case "/api/chat" | "/api/generate":
            assert (told["done"], told["done_reason"]) == (True, "stop"), told
            text = _word(path, told)
        case "/v1/embeddings":
            assert [entry["index"] for entry in told["data"]] == list(range(len(told["data"]))), told
            text = json.dumps([_numbers(entry["embedding"]) for entry in told["data"]])
        case "/api/embed":
            text = json.dumps(told["embeddings"])
        case _:
            text = json.dumps([told["embedding"]])
    return Heard(text, whole=True)


def _numbers(vector: Any) -> list[float]:
    if not isinstance(vector, str):
        return list(vector)
    data = base64.b64decode(vector, validate=True)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def _events(body: bytes, heard: Heard) -> Iterator[tuple[str, str]]:
    """Name and data of each whole event; comments are counted as beats."""
    for block in body.split(b"\n\n")[:-1]:
        name, data = "", None
        for line in block.decode().split("\n"):
            if line.startswith(":"):
                heard.beats += 1
            elif line.startswith("event: ") and not name:
                name = line.removeprefix("event: ")
            else:
                assert line.startswith("data: ") and data is None, f"no line of this dialect: {line!r}"
                data = line.removeprefix("data: ")
        assert not heard.whole and not heard.error, f"something came after the end: {block!r}"
        if data is not None:
            yield name, data


def _chat(body: bytes, heard: Heard) -> bytes:
    finish = ""
    for name, data in _events(body, heard):
        assert not name, f"an event of this dialect has no name: {name}"
        if data == "[DONE]":
            assert finish == "stop", f"[DONE] after finish_reason {finish!r}"
            heard.whole = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            heard.error = chunk["error"]["code"]
            continue
        for choice in chunk["choices"]:
            assert not finish, f"a choice after its finish: {chunk}"
            heard.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            finish = choice.get("finish_reason") or ""
    return _tail(body)


def _messages(body: bytes, heard: Heard) -> bytes:
    after = {
        "": ("message_start",),
        "message_start": ("content_block_start", "message_delta"),
        "content_block_start": ("content_block_delta", "content_block_stop"),
        "content_block_delta": ("content_block_delta", "content_block_stop"),
        "content_block_stop": ("content_block_start", "message_delta"),
        "message_delta": ("message_stop",),
    }
    last = ""
    for name, data in _events(body, heard):
        event = json.loads(data)
        assert event["type"] == name, f"event {name} says that it is {event['type']}"
        if name == "ping":
            continue
        if name == "error":
            heard.error = str(event["error"].get("code") or event["error"]["type"])
            continue
        assert name in after[last], f"{name} after {last or 'nothing'}"
        last = name
        if name == "content_block_delta":
            heard.text += event["delta"]["text"]
        elif name == "message_delta":
            assert event["delta"]["stop_reason"] == "end_turn", event
        heard.whole = name == "message_stop"
    return _tail(body)


def _responses(body: bytes, heard: Heard) -> bytes:
    number = 0
    for name, data in _events(body, heard):
        event = json.loads(data)
        assert event["type"] == name, f"event {name} says that it is {event['type']}"
        assert event["sequence_number"] == number, f"event {number} is numbered {event['sequence_number']}"
        expected = ("response.created", "response.in_progress")[number] if number < 2 else name
        assert name == expected or name == "response.failed", f"event {number} is {name}"
        assert number == 0 or name != "response.created", "the answer began twice"
        number += 1
        if name == "response.output_text.delta":
            heard.text += event["delta"]
        elif name == "response.output_text.done":
            assert event["text"] == heard.text, "the text that is done is not what was streamed"
        elif name == "response.completed":
            assert _output(event["response"]) == heard.text, "the completed text is not what was streamed"
            heard.whole = True
        elif name == "response.failed":
            heard.error = str(event["response"]["error"].get("reason") or event["response"]["error"]["code"])
    return _tail(body)


def _tail(body: bytes) -> bytes:
    return body.rpartition(b"\n\n")[2]


def _lines(path: str, lines: list[bytes], heard: Heard) -> None:
    for line in lines:
        told = json.loads(line)
        assert not heard.whole and not heard.error, f"something came after the end: {line!r}"
        if "error" in told:
            heard.error = str(told.get("code") or told["error"])
            continue
        heard.beats += "status" in told
        heard.text += _word(path, told)
        heard.whole = told["done"]
        assert not told["done"] or told["done_reason"] == "stop", told


def _word(path: str, told: dict[str, Any]) -> str:
    return str(told["message"]["content"] if path == OLLAMA_CHAT else told["response"])


def _output(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


_EVENTS: dict[str, Callable[[bytes, Heard], bytes]] = {
    CHAT: _chat,
    COMPLETIONS: _chat,
    MESSAGES: _messages,
    RESPONSES: _responses,
}
