"""Runtimes whose answers are a known function of the prompt; they know how often each was asked for and how it ended.

`Told` is the prompt and its answer. Pieces are numbered and hold what breaks careless framing, so that a lost, doubled,
reordered or foreign piece shows. `TellingLlama` plays a llama-server that notices a closed connection late,
`TellingOllama` an Ollama, which speaks the dialects of Anthropic and Ollama itself.
"""

import asyncio
import base64
import hashlib
import json
import re
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.support.fake_ollama import FakeOllama, _line
from tests.support.scripted_runtime import ScriptedLlamaServer, ScriptedRuntime, _event
from workers.runtimes.http_server import Exchange

NASTY = (
    "",
    "ü",
    "\n\n",
    "data: x",
    '"',
    "\\",
    "🦊",
    "{}",
    ": no comment",
    "\r\n",
    "event: y\n",
    "</s>",
    "\t",
    "\u2028",
)
LINGER_S = 0.08
"""For so long a llama-server goes on with a generation that nobody wants any more."""

_ASKED = re.compile(rb"tell ([0-9a-z-]+) in ([0-9]+) pieces of ([0-9]+) ms")


@dataclass(frozen=True)
class Told:
    """What is to be told: a tag of its own, in so many pieces, each of which takes so many ms."""

    tag: str
    pieces: int
    ms: int

    @property
    def prompt(self) -> str:
        return f"tell {self.tag} in {self.pieces} pieces of {self.ms} ms"

    def __iter__(self) -> Iterator[str]:
        """The pieces of the answer."""
        for number, mark in enumerate(self.marks):
            yield f"{'' if number else self.tag} {number}{NASTY[int(mark[:2], 16) % len(NASTY)]}{mark}"

    @property
    def marks(self) -> list[str]:
        """What no other piece of any answer holds, one for each piece."""
        return [hashlib.sha256(f"{self.tag}/{number}".encode()).hexdigest()[:8] for number in range(self.pieces)]

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self)

    @classmethod
    def asked_in(cls, body: bytes) -> "Told | None":
        """Reads a prompt out of any request; None for one of our own probes."""
        found = _ASKED.search(body)
        return cls(found[1].decode(), int(found[2]), int(found[3])) if found else None


def vector(text: str) -> list[float]:
    """The vector of an input: numbers that every float holds exactly."""
    return [byte / 256 for byte in hashlib.sha256(text.encode()).digest()[:6]]


class _Telling(ScriptedRuntime):
    """Counts by tag, and says what was asked for."""

    opening = ""
    slots = 4

    def __init__(self, *names: Any) -> None:
        super().__init__(*names)
        self.begun: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.ended_at_s: dict[str, float] = {}  # by tag, of `time.time()`
        self.telling = 0

    @property
    def unended(self) -> dict[str, int]:
        """Generations that have begun and not ended, by tag."""
        return dict(self.begun - self.whole - self.cut)

    async def _handle(self, exchange: Exchange) -> None:
        told = Told.asked_in(exchange.body)
        if told is None:
            return await self._answer(exchange)
        self.begun[told.tag] += 1
        self.telling += 1
        try:
            await self._answer(exchange)
        except asyncio.CancelledError:
            self.cut[told.tag] += 1
            self.lingering += 1
            asyncio.get_running_loop().call_later(LINGER_S, self._notice)
            raise
        else:
            self.whole[told.tag] += 1
        finally:
            self.telling -= 1
            self.ended_at_s[told.tag] = time.time()

    def _notice(self) -> None:
        self.lingering -= 1

    async def _answer(self, exchange: Exchange) -> None:
        match exchange.method, exchange.path:
            case "POST", "/v1/completions":
                await self._complete(exchange, exchange.json())
            case "POST", "/v1/embeddings":
                await self._tell_vectors(exchange, exchange.json())
            case _:
                await super()._handle(exchange)

    async def _say(self, exchange: Exchange, body: dict[str, Any]) -> None:
        told = Told.asked_in(exchange.body)
        if told is None:
            return await super()._say(exchange, body)
        for piece in told:
            await asyncio.sleep(told.ms / 1000)
            await exchange.write(self._chunk(body, {"content": piece}))
        await exchange.write(self._chunk(body, {}, finish="stop"))
        await self._done(exchange, body, told)

    async def _complete(self, exchange: Exchange, body: dict[str, Any]) -> None:
        told = Told.asked_in(exchange.body) or Told("probe", 1, 0)
        await exchange.begin("text/event-stream")
        for piece in [*told, None]:
            await asyncio.sleep(told.ms / 1000 if piece else 0)
            choice = {"text": piece or "", "index": 0, "logprobs": None, "finish_reason": None if piece else "stop"}
            await exchange.write(_raw({**self._envelope(body, [choice]), "object": "text_completion"}))
        await self._done(exchange, body, told)

    async def _done(self, exchange: Exchange, body: dict[str, Any], told: Told) -> None:
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 5, "completion_tokens": told.pieces, "total_tokens": 5 + told.pieces}
            await exchange.write(_event({**self._envelope(body, []), "usage": usage}))
        await exchange.write(b"data: [DONE]\n\n")
        await exchange.end()

    async def _tell_vectors(self, exchange: Exchange, body: dict[str, Any]) -> None:
        await self._think(exchange)
        given = body["input"] if isinstance(body["input"], list) else [body["input"]]
        found: list[Any] = [vector(text) for text in given]
        if body.get("encoding_format") == "base64":
            found = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in found]
        data = [{"object": "embedding", "index": n, "embedding": v} for n, v in enumerate(found)]
        usage = {"prompt_tokens": 5, "total_tokens": 5}
        await exchange.answer({"object": "list", "data": data, "model": body["model"], "usage": usage})

    async def _think(self, exchange: Exchange) -> None:
        """Takes as long as the pieces of an answer would."""
        told = Told.asked_in(exchange.body)
        await asyncio.sleep(told.ms * told.pieces / 1000 if told else 0)


class TellingLlama(_Telling, ScriptedLlamaServer):
    """A llama-server with slots, which are busy for a moment longer than anybody listens."""

    async def _answer(self, exchange: Exchange) -> None:
        if (exchange.method, exchange.path) != ("GET", "/slots"):
            return await super()._answer(exchange)
        busy = self.telling + self.lingering
        await exchange.answer([{"id": n, "is_processing": n < busy} for n in range(self.slots)])


class TellingOllama(_Telling, FakeOllama):
    """An Ollama, whose models are loaded at once."""

    async def _answer(self, exchange: Exchange) -> None:
        if (exchange.method, exchange.path) != ("POST", "/v1/messages"):
            return await super()._answer(exchange)
        await self._messages(exchange, exchange.json())

    async def _lines(self, exchange: Exchange, body: dict[str, Any]) -> None:
        told = Told.asked_in(exchange.body)
        if told is None:
            return await super()._lines(exchange, body)
        await exchange.begin("application/x-ndjson")
        for piece in told:
            await asyncio.sleep(told.ms / 1000)
            await exchange.write(_line(body, piece))
        figures = {"prompt_eval_count": 5, "eval_count": told.pieces}
        await exchange.write(_line(body, "", done=True, done_reason="stop", **figures))
        await exchange.end()

    async def _messages(self, exchange: Exchange, body: dict[str, Any]) -> None:
        told = Told.asked_in(exchange.body) or Told("probe", 1, 0)
        message = {"id": "msg-1", "type": "message", "role": "assistant", "model": body["model"], "content": []}
        usage = {"input_tokens": 5, "output_tokens": 0}
        await exchange.begin("text/event-stream")

        async def say(kind: str, **more: Any) -> None:
            await exchange.write(f"event: {kind}\n".encode() + _raw({"type": kind, **more}))

        await say("message_start", message={**message, "stop_reason": None, "stop_sequence": None, "usage": usage})
        await say("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for piece in told:
            await asyncio.sleep(told.ms / 1000)
            await say("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
        await say("content_block_stop", index=0)
        reason = {"stop_reason": "end_turn", "stop_sequence": None}
        await say("message_delta", delta=reason, usage={"output_tokens": told.pieces})
        await say("message_stop")
        await exchange.end()

    async def _embed(self, exchange: Exchange, body: dict[str, Any]) -> None:
        if Told.asked_in(exchange.body) is None:  # a load
            return await super()._embed(exchange, body)
        await self._think(exchange)
        if exchange.path == "/api/embeddings":
            return await exchange.answer({"embedding": vector(body["prompt"])})
        given = body.get("input") or []
        found = [vector(text) for text in ([given] if isinstance(given, str) else given)]
        await exchange.answer({"model": body["model"], "embeddings": found, "prompt_eval_count": 5})


def _raw(value: object) -> bytes:
    """An event whose letters are as they are, of one to four bytes each."""
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
