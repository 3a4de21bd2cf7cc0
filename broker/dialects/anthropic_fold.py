"""Folds the events of an answer into the one message that a `stream:false` client waits for."""

import json
from typing import Any


def fold_messages(events: bytes) -> bytes:
    """Makes one message of a stream in the client's dialect; pings and comments are skipped.

    Raises ValueError where the stream carries an error or does not end: that is no answer.
    """
    message: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    pieces: dict[tuple[int, str], list[str]] = {}
    whole = False
    for event in events.split(b"\n\n"):
        data = event[at + 6 :] if (at := event.find(b"data: ")) >= 0 else b""
        if not data:
            continue
        told = json.loads(data)
        match told["type"]:
            case "content_block_delta":
                _gather(told["index"], told["delta"], blocks, pieces)
            case "content_block_start":
                blocks[told["index"]] = dict(told["content_block"])
            case "message_start":
                message = dict(told["message"])
            case "message_delta":
                message |= told["delta"]
                message["usage"] = {**(message.get("usage") or {}), **(told.get("usage") or {})}
            case "message_stop":
                whole = True
            case "error":
                raise ValueError("the stream carries an error")
    if not whole:
        raise ValueError("the stream does not end")
    for (index, key), found in pieces.items():
        text = "".join(found)
        if key == "input":
            blocks[index][key] = _input(text)
        else:
            blocks[index][key] = (blocks[index].get(key) or "") + text
    message["content"] = [blocks[index] for index in sorted(blocks)]
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


_KEYS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}


def _gather(
    index: int, delta: dict[str, Any], blocks: dict[int, dict[str, Any]], pieces: dict[tuple[int, str], list[str]]
) -> None:
    if delta["type"] == "input_json_delta":
        pieces.setdefault((index, "input"), []).append(delta["partial_json"])
    elif delta["type"] == "citations_delta":
        blocks[index]["citations"] = [*(blocks[index].get("citations") or ()), delta["citation"]]
    elif delta["type"] in _KEYS:
        key = _KEYS[delta["type"]]
        pieces.setdefault((index, key), []).append(delta[key])


def _input(text: str) -> dict[str, Any]:
    """Reads a call's arguments, always an object here: those that were cut short, or are anything else, are none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
