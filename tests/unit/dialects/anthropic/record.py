"""Records the golden files anew from a running llama.cpp server: `python record.py http://127.0.0.1:8080`.

Its `/v1/messages` takes no grammar, no seed and no `cache_prompt`, so the model must be one that is greedy anyway at
temperature 0, and the whole answer differs from the streamed one in what it counts as read from the cache.
"""

import http.client
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

GOLDEN = Path(__file__).parent

_ASK = {"messages": [{"role": "user", "content": "Say something."}], "system": [{"type": "text", "text": "Be brief."}]}

CASES: dict[str, dict[str, Any]] = {
    "length": {**_ASK, "max_tokens": 24},
    "stopped": {**_ASK, "max_tokens": 24, "stop_sequences": ["da"]},
    "overflow": {"messages": [{"role": "user", "content": "word " * 3000}], "max_tokens": 5},
}


def post(url: str, request: dict[str, Any]) -> tuple[int, bytes]:
    """Sends one messages request and gives back status and body as they came."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "127.0.0.1", place.port, timeout=30)
    try:
        connection.request("POST", "/v1/messages?beta=true", json.dumps(request), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def main(url: str) -> None:
    """Writes `<case>.sse` and `<case>.whole.json`, or `<case>.error.json` where the server refuses."""
    for name, case in CASES.items():
        fixed = {"model": "golden", "temperature": 0}
        status, streamed = post(url, fixed | case | {"stream": True})
        if status != 200:
            (GOLDEN / f"{name}.error.json").write_bytes(streamed)
            continue
        (GOLDEN / f"{name}.sse").write_bytes(streamed)
        (GOLDEN / f"{name}.whole.json").write_bytes(post(url, fixed | case)[1])


if __name__ == "__main__":
    main(sys.argv[1])
