"""An Ollama double that keeps Ollama's traps and writes down what it was asked: one role of the scripted runtime.

It hides a model that loads, aborts a load whose client goes away, shortens names in /api/ps, insists on a keep_alive
that Ollama would take, reloads when a runner option differs, and serves its OpenAI endpoint without a limit. Loads take
as long as a test says: `hold_loads()` makes them wait for `release_loads()`.
"""

import asyncio
import json
from typing import Any

from tests.support.scripted_runtime import ScriptedRuntime
from workers.runtimes.http_server import Exchange

GIB = 1024**3


class FakeOllama(ScriptedRuntime):
    """A server with some models on its disk, none of them loaded."""

    word = "ollama"
    opening = ""

    def __init__(self, *stored: str) -> None:
        super().__init__()
        self.digests = {_full(name): f"sha256:{index:064x}" for index, name in enumerate(stored, start=1)}
        self.loaded: dict[str, Any] = {}  # full name -> the keep_alive it was loaded with
        self.loads_started: list[str] = []
        self.loads_aborted: list[str] = []
        self.generate_bodies: list[dict[str, Any]] = []
        self.native_bodies: list[dict[str, Any]] = []  # of /api/chat
        self.tool_calls: list[dict[str, Any]] = []  # what the native endpoints call after their words
        self.only_embeds: set[str] = set()  # full names of the models that refuse to generate
        self.ps_size, self.ps_vram = 2 * GIB, GIB
        self.unload_after_s = 0.0  # how long it holds a model that it was told to drop, after its answer
        self.busy_answers = 0  # so many loads are refused before one is taken in: the line of loads is full
        self.load_error: tuple[int, str] | None = None
        self.abort_seen = asyncio.Event()
        self.ps_blocked = asyncio.Event()
        self.ps_blocked.set()  # set = /api/ps answers
        self._one_load = asyncio.Lock()

    def block_ps(self) -> None:
        """Leaves /api/ps unanswered, as Ollama does while its scheduler sets a runner up or tears one down."""
        self.ps_blocked.clear()

    def unblock_ps(self) -> None:
        self.ps_blocked.set()

    async def _handle(self, exchange: Exchange) -> None:
        match exchange.method, exchange.path:
            case "GET", "/api/tags":
                await exchange.answer({"models": [self._tag(name) for name in self.digests]})
            case "GET", "/api/ps":
                await self.ps_blocked.wait()
                await exchange.answer({"models": [self._running(name) for name in self.loaded]})
            case "GET", "/api/version":
                await exchange.answer({"version": "0.33.0"})
            case "POST", "/api/generate":
                await self._generate(exchange, exchange.json())
            case "POST", "/api/chat":
                await self._native(exchange, exchange.json())
            case "POST", "/api/embed" | "/api/embeddings":
                await self._embed(exchange, exchange.json())
            case "POST", "/v1/embeddings":
                await self._vectors(exchange, exchange.json())
            case "POST", "/v1/chat/completions":
                await self._open_chat(exchange, exchange.json())
            case _:
                await exchange.answer({"error": "not found"}, status=404)

    def _tag(self, name: str) -> dict[str, Any]:
        return {"name": name, "model": name, "size": GIB, "digest": self.digests[name]}

    def _running(self, name: str) -> dict[str, Any]:
        short = name.removesuffix(":latest").removeprefix("library/")
        return {
            "name": short,
            "model": short,
            "size": self.ps_size,
            "size_vram": self.ps_vram,
            "digest": self.digests[name],
        }

    async def _generate(self, exchange: Exchange, body: dict[str, Any]) -> None:
        self.generate_bodies.append(body)
        name, keep_alive = _full(body["model"]), body.get("keep_alive", 300)
        if isinstance(keep_alive, str) and keep_alive.lstrip("-").isdigit():
            await exchange.answer({"error": f'time: missing unit in duration "{keep_alive}"'}, status=400)
        elif name not in self.digests:
            await exchange.answer({"error": f"model '{body['model']}' not found"}, status=404)
        elif keep_alive == 0:
            await exchange.answer(_done(name, "unload"))
            if self.unload_after_s:
                asyncio.get_running_loop().call_later(self.unload_after_s, self.loaded.pop, name, None)
            else:
                self.loaded.pop(name, None)  # After the answer, as Ollama does: before it asks what the model can do.
        elif name in self.only_embeds:
            await exchange.answer({"error": f'"{body["model"]}" does not support generate'}, status=400)
        elif self.busy_answers:
            self.busy_answers -= 1
            text = "server busy, please try again.  maximum pending requests exceeded"
            await exchange.answer({"error": text}, status=503)
        elif await self._load(exchange, name, keep_alive):
            if body.get("prompt"):
                await self._lines(exchange, body)
            else:
                await exchange.answer(_done(name, "load"))

    async def _native(self, exchange: Exchange, body: dict[str, Any]) -> None:
        """Its own chat endpoint, which loads like any other."""
        self.native_bodies.append(body)
        name = _full(body["model"])
        if name not in self.digests:
            await exchange.answer({"error": f"model '{body['model']}' not found"}, status=404)
        elif body.get("options", {}).keys() & {"num_ctx", "num_gpu"}:
            await exchange.answer({"error": "this double takes no reload"}, status=500)
        elif await self._load(exchange, name, body.get("keep_alive", 300)):
            await self._lines(exchange, body)

    async def _lines(self, exchange: Exchange, body: dict[str, Any]) -> None:
        """Says a few words as lines, or falls into a trap of its own: an error line, or an end without `done`."""
        self.active += 1
        try:
            await exchange.begin("application/x-ndjson")
            await exchange.write(_line(body, ""))
            if self.mute:
                await asyncio.get_running_loop().create_future()
            for word in ("Hello", " from", " Ollama"):
                await exchange.write(_line(body, word))
                if self.trap == "error line":
                    await exchange.write(b'{"error":"an error was encountered while running the model"}\n')
                if self.trap:
                    return await exchange.end()
            for call in self.tool_calls:
                await exchange.write(_line(body, "", tool_calls=[call]))
            figures = {"prompt_eval_count": 11, "eval_count": 3, "total_duration": 9, "load_duration": 1}
            await exchange.write(_line(body, "", done=True, done_reason="stop", **figures))
            await exchange.end()
        finally:
            self.active -= 1

    async def _load(self, exchange: Exchange, name: str, keep_alive: Any) -> bool:
        """Loads one model at a time, as Ollama does; the load dies with the connection that asked for it."""
        async with self._one_load:
            if name not in self.loaded:
                self.loads_started.append(name)
                self.load_seen.set()
                try:
                    await self._may_load.wait()
                except asyncio.CancelledError:
                    self.loads_aborted.append(name)
                    self.abort_seen.set()
                    raise
            if self.load_error is not None:
                status, text = self.load_error
                await exchange.answer({"error": text}, status=status)
                return False
            self.loaded[name] = keep_alive
            return True

    async def _embed(self, exchange: Exchange, body: dict[str, Any]) -> None:
        """Loads like any other endpoint; without input there are no vectors."""
        self.embed_bodies.append(body)
        name = _full(body["model"])
        if name not in self.digests:
            await exchange.answer({"error": f"model '{body['model']}' not found"}, status=404)
        elif await self._load(exchange, name, body.get("keep_alive", 300)):
            if exchange.path == "/api/embeddings":
                return await exchange.answer({"embedding": [0.5, 1.0] if body.get("prompt") else []})
            given = body.get("input") or []
            vectors = [[0.5, 1.0]] * (1 if isinstance(given, str) else len(given))
            await exchange.answer({"model": body["model"], "embeddings": vectors, "prompt_eval_count": 2})

    async def _vectors(self, exchange: Exchange, body: dict[str, Any]) -> None:
        """Its OpenAI face: texts only, and a load like any other where the model is away."""
        self.embed_bodies.append(body)
        name, given = _full(body["model"]), body["input"]
        inputs = [given] if isinstance(given, str) else given
        if not all(isinstance(text, str) for text in inputs):
            error = {"message": "invalid input type", "type": "invalid_request_error"}
            await exchange.answer({"error": error}, status=400)
        elif name in self.loaded or await self._load(exchange, name, 300):
            data = [{"object": "embedding", "index": index, "embedding": [0.5, 1.0]} for index in range(len(inputs))]
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            await exchange.answer({"object": "list", "data": data, "model": body["model"], "usage": usage})

    async def _open_chat(self, exchange: Exchange, body: dict[str, Any]) -> None:
        name = _full(body["model"])
        if name not in self.digests:
            error = {"message": f"model '{body['model']}' not found", "type": "not_found_error"}
            await exchange.answer({"error": error}, status=404)
        elif name in self.loaded or await self._load(exchange, name, 300):
            await self._chat(exchange)


def _line(body: dict[str, Any], text: str, *, tool_calls: Any = None, done: bool = False, **more: Any) -> bytes:
    """One line in the order of keys that Go writes."""
    told: dict[str, Any] = {"model": body["model"], "created_at": "2026-08-04T08:52:19.385406455Z"}
    if "messages" in body:
        told["message"] = {"role": "assistant", "content": text} | ({"tool_calls": tool_calls} if tool_calls else {})
    else:
        told["response"] = text
    return json.dumps({**told, "done": done, **more}, separators=(",", ":")).encode() + b"\n"


def _full(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def _done(name: str, reason: str) -> dict[str, Any]:
    return {"model": name, "created_at": "2026-01-01T00:00:00Z", "response": "", "done": True, "done_reason": reason}
