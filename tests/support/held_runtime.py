"""Runtimes whose answers stop where the prompt says, and that note when whoever asked hung up.

A prompt that holds `hold:<stage>:<name>` is answered up to that stage and no further until `let_go(name)`: `claimed` =
the request is there and not a byte goes back, `prefill` = status, headers and what comes before any content,
`streaming` = the first content too, `no` = nothing holds it. Every request is a `Held`, found by its name. Whatever
has no such prompt, a probe or a question about slots, is answered as the scripted runtimes do it.
"""

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

from tests.support.fake_ollama import FakeOllama
from tests.support.scripted_runtime import ScriptedLlamaServer, ScriptedRuntime, ScriptedVllm
from workers.runtimes.http_server import Exchange

_ORDER: Final = re.compile(rb"hold:(no|claimed|prefill|streaming):([\w.-]+)")

LINGERS_S: Final = 0.15
"""How long a generation runs on after its connection was closed; runtimes notice with their next batch or token."""


def prompt(stage: str, name: str) -> str:
    """What to ask for such an answer."""
    return f"hold:{stage}:{name}"


@dataclass
class Held:
    """One request: where it was asked, when it came, how far its answer is, and when it was closed from outside."""

    path: str
    began_s: float  # loop time
    closed_s: float | None = None  # None = it was not
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Answer:
    """The parts of an answer: what comes before any content, the first content, the rest."""

    kind: str
    opening: bytes
    content: bytes
    rest: bytes


class Holding(ScriptedRuntime):
    """What the three roles below have in common."""

    lingers_s = LINGERS_S

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.held: dict[str, Held] = {}
        self.overlaps: list[str] = []  # requests that came while another was at work
        self._at_work = 0

    def let_go(self, name: str) -> None:
        """Lets a held answer go on to its end."""
        self.held[name].go.set()

    async def _handle(self, exchange: Exchange) -> None:
        order = _ORDER.search(exchange.body)
        if order is None or exchange.method != "POST" or exchange.path not in ANSWERS:
            return await super()._handle(exchange)
        stage, name = order[1].decode(), order[2].decode()
        loop = asyncio.get_running_loop()
        assert name not in self.held, f"{name} was asked twice"
        held = self.held[name] = Held(exchange.path, loop.time())
        if self._at_work:
            self.overlaps.append(name)
        self._work(1)
        try:
            await self._answer(exchange, held, stage)
        finally:
            held.over.set()
            if exchange.hung_up:
                held.closed_s = loop.time()
                loop.call_later(self.lingers_s, self._work, -1)
            else:
                self._work(-1)

    def _work(self, step: int) -> None:
        self._at_work += step
        self.active += step

    async def _answer(self, exchange: Exchange, held: Held, stage: str) -> None:
        answer = ANSWERS[exchange.path]
        if stage == "claimed":
            held.reached.set()
            await held.go.wait()
        await exchange.begin(answer.kind)
        parts = [part for part in (answer.opening, answer.content) if part]
        for part in parts[: 1 if stage == "prefill" else None]:
            await exchange.write(part)
        if stage in ("prefill", "streaming"):
            held.reached.set()
            await held.go.wait()
        for part in [*(parts[1:] if stage == "prefill" else []), answer.rest]:
            await exchange.write(part)
        await exchange.end()


class HeldLlamaServer(Holding, ScriptedLlamaServer):
    """Speaks OpenAI's dialect only, and tells its busy slots."""


class HeldVllm(Holding, ScriptedVllm):
    """Speaks Anthropic's dialect too, and tells its busy slots."""


class HeldOllama(Holding, FakeOllama):
    """Speaks its own dialect too, and tells nobody whether it is busy."""

    lingers_s = 0.0


def _event(value: object, *, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


def _told(name: str, **more: Any) -> bytes:
    return _event({"type": name, **more}, name=name)


def _chunk(**choice: Any) -> bytes:
    known = {"index": 0, "finish_reason": None}
    return _event({"id": "c", "object": "chunk", "created": 1, "model": "weights", "choices": [known | choice]})


def _line(key: str, value: object, **more: Any) -> bytes:
    told = {"model": "weights", "created_at": "2026-08-04T08:52:19.385406455Z", key: value, "done": False}
    return json.dumps(told | more, separators=(",", ":")).encode() + b"\n"


def _lines(key: str, wrap: Any) -> Answer:
    end = {"done": True, "done_reason": "stop", "prompt_eval_count": 5, "eval_count": 2}
    words = (_line(key, wrap(word)) for word in ("", "Hello", " world"))
    opening, content, more = words
    return Answer("application/x-ndjson", opening, content, more + _line(key, wrap(""), **end))


def _whole(value: object) -> Answer:
    return Answer("application/json", b"", b"", json.dumps(value).encode())


_USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
_END = _event({"id": "c", "object": "chunk", "created": 1, "model": "weights", "choices": [], "usage": _USAGE})
_STREAM = "text/event-stream"
_MESSAGE: Final[dict[str, Any]] = {
    "id": "m", "type": "message", "role": "assistant", "content": [], "model": "weights", "stop_reason": None,
    "stop_sequence": None, "usage": {"input_tokens": 5, "output_tokens": 0},
}  # fmt: skip

ANSWERS: Final[dict[str, Answer]] = {
    "/v1/chat/completions": Answer(
        _STREAM,
        _chunk(delta={"role": "assistant", "content": None}),
        _chunk(delta={"content": "Hello"}),
        _chunk(delta={"content": " world"}) + _chunk(delta={}, finish_reason="stop") + _END + b"data: [DONE]\n\n",
    ),
    "/v1/completions": Answer(
        _STREAM,
        _chunk(text=""),
        _chunk(text="Hello"),
        _chunk(text=" world") + _chunk(text="", finish_reason="stop") + _END + b"data: [DONE]\n\n",
    ),
    "/v1/messages": Answer(
        _STREAM,
        _told("message_start", message=_MESSAGE)
        + _told("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        _told("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hello"}),
        _told("content_block_delta", index=0, delta={"type": "text_delta", "text": " world"})
        + _told("content_block_stop", index=0)
        + _told("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 2})
        + _told("message_stop"),
    ),
    "/api/chat": _lines("message", lambda word: {"role": "assistant", "content": word}),
    "/api/generate": _lines("response", lambda word: word),
    "/v1/embeddings": _whole(
        {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}], "model": "weights"}
    ),
    "/api/embed": _whole({"model": "weights", "embeddings": [[0.5, 1.0]], "prompt_eval_count": 2}),
    "/api/embeddings": _whole({"embedding": [0.5, 1.0]}),
}
"""By the path at which a runtime is asked. Vectors come whole: what is before them is status and headers alone."""
