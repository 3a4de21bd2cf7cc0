"""Lines in the shapes that an Ollama sends, written by hand from its API's description."""

import json
from typing import Any

TAG = "qwen2.5-coder:32b"
FIGURES = {
    "total_duration": 5191566416,
    "load_duration": 2154458,
    "prompt_eval_count": 26,
    "prompt_eval_duration": 383809000,
    "eval_count": 298,
    "eval_duration": 4799921000,
}


def native(value: dict[str, Any]) -> bytes:
    """Writes a line as Go does: compact, text as it is, with `<` and its kin escaped."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").encode() + b"\n"


def chat(message: dict[str, Any], **more: Any) -> bytes:
    at = {"model": TAG, "created_at": "2026-08-04T08:52:19.385406455Z"}
    return native({**at, "message": {"role": "assistant", "content": ""} | message, "done": False, **more})


def generate(response: str, **more: Any) -> bytes:
    at = {"model": TAG, "created_at": "2026-08-04T08:52:19.385406455Z"}
    return native({**at, "response": response, "done": False, **more})


def chat_end(reason: str = "stop", content: str = "") -> bytes:
    at = {"model": TAG, "created_at": "2026-08-04T08:52:20.1Z"}
    message = {"role": "assistant", "content": content}
    return native({**at, "message": message, "done": True, "done_reason": reason, **FIGURES})


TOOL_CALL = {"id": "call_x1y2z3a4", "function": {"index": 0, "name": "weather", "arguments": {"city": "Köln"}}}

WELL_ENDED = {
    "text": chat({"content": "Why"}) + chat({"content": ' "done":false} <b>'}) + chat({"content": "?"}) + chat_end(),
    "thinking": chat({"thinking": "Hm"}) + chat({"thinking": "m."}) + chat({"content": "Yes"}) + chat_end(),
    "tools": chat({"tool_calls": [TOOL_CALL]}) + chat({"tool_calls": [TOOL_CALL]}) + chat_end(),
    "keys": chat({"content": "a"})
    + chat({"tool_calls": [{"function": {"name": "f", "arguments": {"model": TAG, "error": 1, "done": False}}}]})
    + chat_end(),
    "logprobs": chat({"content": "a"}, logprobs=[{"token": "a", "logprob": -0.5}])
    + chat({"content": "b"}, logprobs=[{"token": "b", "logprob": -1}])
    + chat_end(),
    "generate": generate("The")
    + generate(" sky", thinking="")
    + generate("", done=True, done_reason="length", **FIGURES),
    "context": generate("a") + generate("", done=True, done_reason="stop", context=[1, 2, 3], **FIGURES),
    "late content": chat({}) + chat({}) + chat_end(content="all at once"),
    "empty": chat({}) + chat_end(),
    "no last newline": (chat({"content": "a"}) + chat_end())[:-1],
    "blank lines": b"\n" + chat({"content": "a"}) + b"\n \n" + chat({"content": "b"}) + b"\n" + chat_end(),
    "two names": chat({"content": "a"})
    + chat({"content": "b"})[:-15]
    + b',"model":"other","done":false}\n'
    + chat_end(),
    "odd order": native({"done": False, "message": {"content": "a"}, "model": "other"})
    + native({"message": {"content": "b"}, "model": "other", "done": False})
    + chat_end(),
}

BADLY_ENDED = {
    "silent end": chat({"content": "a a a"}) + chat({"content": " a"}),
    "error line": chat({"content": "Half"}) + native({"error": "an error was encountered while running the model"}),
    "error in a running line": chat({"content": "a"})
    + chat({"content": "b"})[:-15]
    + b',"error":"x","done":false}\n'
    + chat_end(),
    "early error": native({"error": "model runner has unexpectedly stopped"}),
    "no reason": chat({"content": "a"}) + chat({}, done=True),
    "no JSON": chat({"content": "a"}) + b"proxy error: gone\n" + chat_end(),
    "no object": chat({"content": "a"}) + b"[1]\n" + chat_end(),
    "cut line": chat({"content": "a"}) + chat_end()[:-40],
    "nothing": b"",
}
