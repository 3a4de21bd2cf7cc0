"""A remote provider that speaks OpenAI's protocol and writes down everything that ever reaches it."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from workers.runtimes.http_server import Exchange, HttpServer

PROBE = "Hi"


@dataclass(frozen=True)
class Received:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def said(self) -> Any:
        """The prompt: the last message's content, or the input."""
        asked = json.loads(self.body)
        return asked["messages"][-1]["content"] if "messages" in asked else asked["input"]


class FakeProvider:
    """Answers chat and embeddings; `refusals` are given first, each once."""

    def __init__(self, *, key: str = "") -> None:
        self.url = ""
        self.key = key  # "" = any will do
        self.received: list[Received] = []
        self.refusals: deque[tuple[int, dict[str, str]]] = deque()
        self.running_now = self.most_at_once = 0
        self.go = asyncio.Event()
        self.go.set()  # cleared = answers wait for it

    @property
    def prompts(self) -> list[Any]:
        """What it was asked beside our own probes."""
        return [request.said for request in self.received if request.said != PROBE]

    @property
    def probes(self) -> int:
        return sum(request.said == PROBE for request in self.received)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["FakeProvider"]:
        """Serves on a loopback port while the block runs."""
        async with HttpServer(self._handle).listening() as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self

    async def _handle(self, exchange: Exchange) -> None:
        self.received.append(Received(exchange.method, exchange.path, exchange.headers, exchange.body))
        if self.key and exchange.headers.get("authorization") != f"Bearer {self.key}":
            given = exchange.headers.get("authorization", "nothing")
            await _refuse(exchange, 401, {}, f"Incorrect API key provided: {given}")
        elif self.refusals:
            await _refuse(exchange, *self.refusals.popleft(), "no")
        else:
            self.running_now += 1
            self.most_at_once = max(self.most_at_once, self.running_now)
            try:
                await self._answer(exchange, exchange.json())
            finally:
                self.running_now -= 1

    async def _answer(self, exchange: Exchange, asked: dict[str, Any]) -> None:
        if exchange.path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]
            return await exchange.answer({"object": "list", "data": data, "model": asked["model"]})
        if self.received[-1].said != PROBE:
            await self.go.wait()
        await exchange.begin("text/event-stream")
        for delta, finish in (({"role": "assistant", "content": "from afar"}, None), ({}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            await exchange.write(_event({"id": "c", "model": asked["model"], "choices": [choice]}))
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        await exchange.write(_event({"id": "c", "model": asked["model"], "choices": [], "usage": usage}))
        await exchange.write(b"data: [DONE]\n\n")
        return await exchange.end()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _refuse(exchange: Exchange, status: int, headers: dict[str, str], words: str) -> None:
    body = json.dumps({"error": {"message": words, "type": "provider_error"}}).encode()
    lines = [f"HTTP/1.1 {status} No", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    exchange.started = True
    await exchange._connection.send("\r\n".join([*lines, "", ""]).encode() + body)
