"""Files of requests for batches, and what their answers say."""

import json
from typing import Any

CHAT = "/v1/chat/completions"


def line(custom_id: str, *, said: str = "hello", model: str = "big", url: str = CHAT, **more: Any) -> dict[str, Any]:
    """One request of a chat."""
    body = {"model": model, "messages": [{"role": "user", "content": said}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def jsonl(*lines: dict[str, Any] | bytes) -> bytes:
    """A file of them; bytes stand in it as they are."""
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def read(content: bytes) -> dict[str, dict[str, Any]]:
    """The lines of an output or an error file by their custom_id; none may be there twice."""
    found: dict[str, dict[str, Any]] = {}
    for said in map(json.loads, content.decode().splitlines()):
        name = said["custom_id"] or said["id"]
        assert name not in found, f"{name} is there twice"
        found[name] = said
    return found
