"""A llama-server that thinks and calls tools, which random weights never do; its chunks are in llama.cpp's own form."""

from typing import Any

from tests.support.scripted_runtime import ScriptedLlamaServer, _event
from workers.runtimes.http_server import Exchange

THOUGHTS = ("The sky", " is what", " they ask about.")
WORDS = ("It is", " sunny.")
ARGUMENTS = ('{"city"', ': "Ber', 'lin"}')


class ScriptedAnswers(ScriptedLlamaServer):
    """Asked with tools it calls the first one; else it thinks, and says a sentence."""

    async def _say(self, exchange: Exchange, body: dict[str, Any]) -> None:
        if body.get("max_tokens") == 1:  # a probe
            return await super()._say(exchange, body)
        tools = body.get("tools")
        deltas = _call(tools[0]["function"]["name"]) if tools else _thought()
        for delta in deltas:
            await exchange.write(self._chunk(body, delta))
        await exchange.write(self._chunk(body, {}, finish="tool_calls" if tools else "stop"))
        if (body.get("stream_options") or {}).get("include_usage"):
            count = len(deltas)
            usage = {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}
            await exchange.write(_event({**self._envelope(body, []), "usage": usage}))
        await exchange.write(b"data: [DONE]\n\n")
        await exchange.end()


def _thought() -> list[dict[str, Any]]:
    return [*({"reasoning_content": piece} for piece in THOUGHTS), *({"content": piece} for piece in WORDS)]


def _call(name: str) -> list[dict[str, Any]]:
    first = {"index": 0, "id": "call-1", "type": "function", "function": {"name": name, "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": piece}} for piece in ARGUMENTS]
    return [{"tool_calls": [piece]} for piece in [first, *more]]
