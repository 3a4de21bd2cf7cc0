"""Records the golden files anew from a running llama.cpp server: `python record.py http://127.0.0.1:8080`.

Any model will do; a small context (1,024 tokens a slot) keeps the overflow case quick. The prompt cache is switched
off, so that the streamed and the whole answer of a case are one and the same generation.
"""

import http.client
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

GOLDEN = Path(__file__).parent / "golden"

_ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
_SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["ok", "count"],
    "additionalProperties": False,
}

CASES: dict[str, dict[str, Any]] = {
    "length": {"messages": _ASK, "max_tokens": 24},
    "usage": {"messages": _ASK, "max_tokens": 12, "stream_options": {"include_usage": True}},
    "logprobs": {
        "messages": _ASK,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "stream_options": {"include_usage": True},
    },
    "json_schema": {
        "messages": _ASK,
        "max_tokens": 120,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}},
    },
    "unicode": {
        "messages": _ASK,
        "max_tokens": 60,
        "grammar": 'root ::= "\\"Grüße\\" → \\\\ 日本語 🙂\\n\\tend"',
        "stream_options": {"include_usage": True},
    },
    "two_choices": {"messages": _ASK, "max_tokens": 6, "n": 2, "stream_options": {"include_usage": True}},
    "timings": {"messages": _ASK, "max_tokens": 5, "timings_per_token": True},
    "empty": {"messages": _ASK, "max_tokens": 5, "grammar": 'root ::= ""', "stream_options": {"include_usage": True}},
    "overflow": {"messages": [{"role": "user", "content": "word " * 3000}], "max_tokens": 5},
}


def post(url: str, request: dict[str, Any]) -> tuple[int, bytes]:
    """Sends one chat request and gives back status and body as they came."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "127.0.0.1", place.port, timeout=30)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(request), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def main(url: str) -> None:
    """Writes `<case>.sse` and `<case>.whole.json`, or `<case>.error.json` where the server refuses."""
    GOLDEN.mkdir(exist_ok=True)
    for name, case in CASES.items():
        fixed = {"model": "golden", "temperature": 0, "seed": 7, "cache_prompt": False}
        status, streamed = post(url, fixed | case | {"stream": True})
        if status != 200:
            (GOLDEN / f"{name}.error.json").write_bytes(streamed)
            continue
        (GOLDEN / f"{name}.sse").write_bytes(streamed)
        _, whole = post(url, fixed | {key: value for key, value in case.items() if key != "stream_options"})
        (GOLDEN / f"{name}.whole.json").write_bytes(whole)


if __name__ == "__main__":
    main(sys.argv[1])
