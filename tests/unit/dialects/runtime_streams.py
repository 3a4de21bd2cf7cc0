"""Chat streams in the shapes that Ollama, vLLM and llama.cpp send, written by hand where none could be recorded."""

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"
RECORDED = sorted(path.stem for path in GOLDEN.glob("*.sse"))

DONE = b"data: [DONE]\n\n"


def recorded(case: str) -> bytes:
    """Gives the bytes of a recorded stream."""
    return (GOLDEN / f"{case}.sse").read_bytes()


def event(value: object, *, spaced: bool = False) -> bytes:
    """Writes one event as compact JSON, or with a space after each colon and comma as Python servers do."""
    return b"data: " + json.dumps(value, separators=None if spaced else (",", ":")).encode() + b"\n\n"


def ollama(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """Ollama repeats the role in every delta and names its keys in an order of its own."""
    return event(
        {
            "id": "chatcmpl-512",
            "object": "chat.completion.chunk",
            "created": 1790000000,
            "model": "qwen2.5-coder:32b",
            "system_fingerprint": "fp_ollama",
            "choices": [{"index": 0, "delta": {"role": "assistant"} | delta, "finish_reason": finish}],
        }
    )


def vllm(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    """vLLM writes `logprobs` and token ids beside each delta, and a stop reason beside the last."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}
    chunk = {
        "id": "chatcmpl-a1b2",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": "Qwen/Qwen3",
        "choices": [choice | more],
    }
    return event(chunk)


def llama(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    """llama.cpp puts the finish reason first."""
    chunk = {
        "choices": [{"finish_reason": finish, "index": 0, "delta": delta}],
        "created": 1790000000,
        "id": "chatcmpl-x",
        "model": "tiny",
        "object": "chat.completion.chunk",
    }
    return event(chunk | more)


def usage_chunk(model: str) -> bytes:
    """The chunk that carries nothing but the usage."""
    usage = {
        "prompt_tokens": 31,
        "completion_tokens": 7,
        "total_tokens": 38,
        "prompt_tokens_details": {"cached_tokens": 24},
    }
    return event({"id": "u", "object": "chat.completion.chunk", "model": model, "choices": [], "usage": usage})


def call(index: int, *, arguments: str, id: str | None = None, name: str | None = None) -> dict[str, Any]:
    """One fragment of a tool call."""
    function = {"name": name} if name else {}
    fragment: dict[str, Any] = {"index": index, "function": function | {"arguments": arguments}}
    return {"tool_calls": [fragment | ({"id": id, "type": "function"} if id else {})]}


LLAMA_TOOLS = (
    llama({"role": "assistant", "content": None})
    + llama(call(0, id="c0", name="read", arguments="{"))
    + b":\n\n"
    + llama(call(0, arguments='"path":'))
    + llama(call(0, arguments='"a \\"b\\".py"}'))
    + llama(call(1, id="c1", name="list", arguments=""))
    + llama(call(1, arguments="{}"))
    + llama({}, "tool_calls", timings={"cache_n": 90, "prompt_n": 10, "predicted_n": 21})
    + DONE
)

OLLAMA_TOOLS = (
    ollama({"content": ""})
    + ollama({"content": "", **call(0, id="call_a", name="read", arguments='{"path":"a.py"}')})
    + ollama({"content": "", **call(0, id="call_b", name="list", arguments="{}")})  # numbered 0 again
    + ollama({"content": ""}, "tool_calls")
    + usage_chunk("qwen2.5-coder:32b")
    + DONE
)

OLLAMA_REASONING = (
    ollama({"content": "", "reasoning": "The user"})
    + ollama({"content": "", "reasoning": " greets."})
    + ollama({"content": "Hello"})
    + ollama({"content": ' Jürgen, "model":"qwen2.5-coder:32b" is my name'})
    + ollama({"content": ""}, "stop")
    + usage_chunk("qwen2.5-coder:32b")
    + DONE
)

VLLM_REASONING = (
    vllm({"role": "assistant", "content": ""})
    + b": keep-alive\n\n"
    + vllm({"reasoning": "Hm"})
    + vllm({"reasoning": "m."})
    + vllm({"content": "Yes"})
    + vllm({"content": "."}, "stop", stop_reason=None)
    + usage_chunk("Qwen/Qwen3")
    + DONE
)

VLLM_ERROR_THEN_DONE = (
    vllm({"role": "assistant", "content": ""})
    + vllm({"content": "Half an"})
    + vllm({"content": " answer"})
    + event({"error": {"message": "EngineCore died", "type": "InternalServerError", "param": None, "code": 500}})
    + DONE
)

OLLAMA_SILENT_END = ollama({"content": "a a a"}) + ollama({"content": " a"})

PROXY_ERROR = (
    llama({"role": "assistant", "content": None})
    + llama({"content": "Half"})
    + b"proxy error: Failed to read connection"
)

SPACED = b"".join(
    event(
        {"id": "s", "model": "m", "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": reason}]},
        spaced=True,
    )
    for word, reason in (("one", None), (" two", None), (' "finish_reason": "stop"', None), ("", "stop"))
)

WELL_ENDED = {
    "llama_tools": LLAMA_TOOLS,
    "ollama_tools": OLLAMA_TOOLS,
    "ollama_reasoning": OLLAMA_REASONING,
    "vllm_reasoning": VLLM_REASONING,
    "spaced": SPACED,
} | {case: recorded(case) for case in RECORDED}

BADLY_ENDED = {
    "vllm_error_then_done": VLLM_ERROR_THEN_DONE,
    "ollama_silent_end": OLLAMA_SILENT_END,
    "proxy_error": PROXY_ERROR,
}
