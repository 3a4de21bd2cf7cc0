"""The talk between a test and a driver: an order is a line of JSON on stdin, each thing seen a line on stdout.

An order says what to `do`, at which `url`, with which `model`, `prompt` and `max_tokens`. The driver says what its
client showed it: `piece`, `thought`, `tool`, `answer`, `vectors`, or `error` in its own words; `end` closes an order.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

Order = dict[str, Any]
Seen = Iterator[dict[str, Any]]

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def user(order: Order) -> list[dict[str, Any]]:
    return [{"role": "user", "content": order.get("prompt", "hi")}]


def serve(deeds: dict[str, Callable[[Order], Seen]]) -> None:
    """Takes orders until stdin ends."""
    for line in sys.stdin:
        order = json.loads(line)
        try:
            for seen in deeds[order["do"]](order):
                say(**seen)
        except Exception as problem:  # noqa: BLE001  # whatever the client raises is what the test asks about
            say(saw="error", **error(problem))
        say(saw="end")


def say(**seen: Any) -> None:
    print(json.dumps(seen), flush=True)


def error(problem: Exception) -> dict[str, Any]:
    """The client's own error, as far as it tells."""
    body = getattr(problem, "body", None)
    inner = body.get("error", body) if isinstance(body, dict) else None
    code = getattr(problem, "code", None) or (inner.get("code") if isinstance(inner, dict) else None)
    told = {"status": getattr(problem, "status_code", None), "code": code, "message": str(problem)}
    return {"type": type(problem).__name__, **told}
