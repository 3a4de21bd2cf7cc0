"""Folds the lines of an answer into the one object that a `stream:false` client of the Ollama dialect waits for."""

import json
from collections.abc import Iterable
from typing import Any

from broker.dialects import json_splice

_JOINED = ("content", "thinking", "response")
_GATHERED = ("tool_calls", "logprobs", "images")


def fold(lines: Iterable[bytes] | bytes) -> bytes:
    """Makes one object of an answer: what its last line says, and of all lines the texts, calls and logprobs.

    Raises ValueError where there is no whole answer, or an error among its lines.
    """
    stream = lines if isinstance(lines, bytes) else b"".join(lines)
    told = json.loads(b"[" + b",".join(line for line in stream.split(b"\n") if line.strip()) + b"]")
    if not told or not all(isinstance(line, dict) and not line.get("error") for line in told):
        raise ValueError("the answer holds what is none")
    if told[-1].get("done") is not True or not told[-1].get("done_reason"):
        raise ValueError("the answer is not whole")
    answer = _merged(told)
    if isinstance(answer.get("message"), dict):
        answer["message"] = _merged([line["message"] for line in told if isinstance(line.get("message"), dict)])
    return json_splice.encode(answer)


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = dict(parts[-1])
    for key in _JOINED:
        pieces = [part[key] for part in parts if isinstance(part.get(key), str)]
        if any(pieces):
            merged[key] = "".join(pieces)
    for key in _GATHERED:
        items = [item for part in parts if isinstance(part.get(key), list) for item in part[key]]
        if items:
            merged[key] = items
    return merged
