"""The Ollama dialect: its endpoints, and our own words in its answers.

`ollama_request` reads what is asked and rewrites it for an Ollama, `ollama_translate` makes a chat request of it for
any other runtime; `ollama_stream` reads the generation and `ollama_fold` folds it for a client without a stream;
`ollama_embeddings` is all of that for vectors, `ollama_models` what is told of models.
"""

from typing import Any, Final

from broker.dialects import json_splice, ollama_stream
from broker.dialects.ollama_request import Asked, Empty, Shape

CHAT: Final = "/api/chat"
GENERATE: Final = "/api/generate"
EMBED: Final = "/api/embed"
EMBEDDINGS: Final = "/api/embeddings"
SHAPES: Final[dict[str, Shape]] = {CHAT: "chat", GENERATE: "generate"}
CONTENT_TYPE: Final = "application/x-ndjson"
DONE: Final = b""
"""The line with `done` is part of the answer."""


def heartbeat(shape: Shape, model: str, note: str, *, now_ns: int) -> bytes:
    """Says "still waiting" as a line without content: a blank one breaks the Python client. The note is for people; no
    client looks at keys that it does not know."""
    return ollama_stream.line(shape, model, now_ns, None, status=" ".join(note.split()))


def nothing(asked: Asked, *, now_ns: int) -> bytes:
    """Answers a request that has nothing to generate, as an Ollama does.

    Which models are loaded is the policy's business, so nothing is done: a client that wants its model unloaded would
    take it from others, and one that is to be loaded is loaded when somebody has something to ask.
    """
    empty: Empty = asked.empty or "load"
    return ollama_stream.line(asked.shape, asked.model, now_ns, None, done=True, done_reason=empty)


def error_object(code: str, message: str, *, retry_after_s: int | None = None) -> dict[str, Any]:
    """Builds the body of an error: a text, as clients of Ollama expect it, and beside it our stable code."""
    if code == "model_not_found":
        message = f"model not found: {message}"  # the words that clients look for
    told: dict[str, Any] = {"error": message, "code": code}
    if retry_after_s is not None:
        told["retry_after_s"] = retry_after_s
    return told


def error_event(code: str, message: str, *, retry_after_s: int | None = None) -> bytes:
    """Says inside a stream that it failed; no line with `done` follows."""
    return json_splice.encode(error_object(code, message, retry_after_s=retry_after_s)) + b"\n"
