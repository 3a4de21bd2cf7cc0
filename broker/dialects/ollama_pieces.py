"""Tool calls and logprobs of a chat stream, as the Ollama dialect tells them."""

import json
import math
from typing import Any

_LOWEST_LOGPROB = -9999.0


def merge_call(calls: list[dict[str, Any]], fragment: dict[str, Any]) -> None:
    """Finds the call that a fragment continues; a second id with a name at the same index is a call of its own."""
    index = fragment.get("index", len(calls))
    function = fragment.get("function") or {}
    call = next((known for known in reversed(calls) if known["index"] == index), None)
    if call is None or (function.get("name") and fragment.get("id") not in (None, "", call["id"])):
        call = {"index": index, "id": "", "name": "", "arguments": ""}
        calls.append(call)
    call["id"] = fragment.get("id") or call["id"]
    call["name"] = function.get("name") or call["name"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        call["arguments"] += arguments
    elif isinstance(arguments, dict):  # a runtime that tells them as an Ollama does
        call["arguments"] = json.dumps(arguments)


def arguments_of(text: str) -> dict[str, Any] | None:
    """Reads the arguments of a call, which the dialect tells as an object; None where they are none."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def call_as_text(name: str, arguments: str) -> str:
    """Writes what is no call as the text that it is; one that was cut off stays open."""
    try:
        json.loads(arguments)
        end = "}"
    except (ValueError, RecursionError):
        end = ""
    return f'{{"name":{json.dumps(name, ensure_ascii=False)},"arguments":{arguments}{end}'


def _refuse(word: str) -> None:
    raise ValueError(word)


def logprobs_of(told: object) -> list[dict[str, object]]:
    """Takes the logprobs of a choice apart into those of the dialect."""
    content = told.get("content") if isinstance(told, dict) else None
    found: list[dict[str, object]] = []
    for entry in content or []:
        kept = _logprob(entry)
        if entry.get("top_logprobs"):
            kept["top_logprobs"] = [_logprob(other) for other in entry["top_logprobs"]]
        found.append(kept)
    return found


def _logprob(entry: dict[str, Any]) -> dict[str, object]:
    value = entry.get("logprob")
    finite = isinstance(value, int | float) and math.isfinite(value)
    kept = {key: entry[key] for key in ("token", "bytes") if entry.get(key) is not None}
    return {**kept, "logprob": value if finite else _LOWEST_LOGPROB}
