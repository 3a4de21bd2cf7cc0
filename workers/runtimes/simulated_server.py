"""A model server without a model: it speaks like llama-server, at speeds and with faults of one's choice.

    python -P -m workers.runtimes.simulated_server --port 18080 --model pretend --cold-start-ms 2000

Every answer says "simulated", and its words are numbered (`simulated 1 2 3 …`), so that a lost, doubled or reordered
piece shows. A closed connection is noticed at once, whatever the generation is doing: llama-server is slower at that
(see its runtime), so a test that passes here says nothing about how soon a real slot is free.

Asked to go on with an answer (`continue_final_message`), it counts on.
`POST /simulated/faults` with {"stall_after_tokens": 3, "times": 1} breaks the next generation, `GET /simulated/stats`
tells what the server has seen. Times are `time.monotonic()` in ms, which all processes of a machine share.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.runtimes import simulated_vectors
from workers.runtimes.http_server import Exchange, HttpServer
from workers.runtimes.simulated_model import (
    CHARS_PER_TOKEN,
    ErrorInStream,
    Faults,
    Generation,
    SilentEnd,
    Slots,
    die,
    for_ever,
)

ABORTS_KEPT = 200


@dataclass(frozen=True)
class Settings:
    """How the pretended model behaves."""

    port: int
    model: str
    parallel: int
    context: int
    cold_start_ms: float
    prefill_tps: float
    decode_tps: float
    memory_mb: float
    answer_tokens: int
    load_fails: int
    oom: bool
    embeddings: bool
    load_log: Path | None


@dataclass
class Stats:
    """What the server has seen since it started; `aborted` = ended by the client."""

    requests_started: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    active: int = 0
    max_active: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    aborts: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=ABORTS_KEPT))


class SimulatedServer:
    """The routes of a llama-server, answered by arithmetic."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.faults = Faults()
        self.stats = Stats()
        self.slots = Slots(settings.parallel)
        self.ready = False
        self.started = time.monotonic()
        self.loads = _note_load(settings.load_log)

    async def load(self) -> None:
        """Pretends to load weights; ends the process when it was told to fail."""
        await asyncio.sleep(self.settings.cold_start_ms / 1000)
        if self.settings.oom:
            die("simulated: cudaMalloc failed: out of memory")
        if self.settings.load_fails < 0 or self.loads <= self.settings.load_fails:
            die("simulated: the load fails, as asked")
        self.ready = True

    async def handle(self, exchange: Exchange) -> None:
        """Answers one request; while loading every route of llama-server is 503, as there."""
        if not self.ready and not exchange.path.startswith("/simulated/"):
            await exchange.answer(_error(503, "Loading model", "unavailable_error"), status=503)
            return
        match exchange.method, exchange.path:
            case "POST", "/v1/chat/completions":
                await self._chat(exchange)
            case "POST", "/v1/completions":
                await self._chat(exchange, of_text=True)
            case "POST", "/v1/embeddings":
                await self._embed(exchange)
            case "GET", "/health":
                await exchange.answer({"status": "ok"})
            case "GET", "/slots":
                await exchange.answer([{"id": slot.number, "is_processing": slot.busy} for slot in self.slots.slots])
            case "GET", "/v1/models":
                model = {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "simulated"}
                await exchange.answer({"object": "list", "data": [model]})
            case "GET", "/simulated/stats":
                await exchange.answer(self._stats())
            case "GET", "/simulated/faults":
                await exchange.answer(dataclasses.asdict(self.faults))
            case "POST", "/simulated/faults":
                await self._change_faults(exchange)
            case _:
                await exchange.answer(_error(404, "File Not Found", "not_found_error"), status=404)

    async def _change_faults(self, exchange: Exchange) -> None:
        try:
            self.faults.change(exchange.json())
        except ValueError as error:
            await exchange.answer(_error(400, str(error), "invalid_request_error"), status=400)
        else:
            await exchange.answer(dataclasses.asdict(self.faults))

    def _stats(self) -> dict[str, Any]:
        seen = dataclasses.asdict(self.stats) | {"aborts": list(self.stats.aborts)}
        slots = {"waiting": self.slots.waiting, "max_waiting": self.slots.max_waiting, "busy_slots": self.slots.busy}
        share = 1.0 if self.ready else (time.monotonic() - self.started) * 1000 / max(self.settings.cold_start_ms, 1.0)
        seen["loaded_share"] = round(min(1.0, share), 3)
        return {"loads": self.loads, "memory_mb": self.settings.memory_mb, **seen, **slots}

    async def _chat(self, exchange: Exchange, *, of_text: bool = False) -> None:
        try:
            generation = self._read(exchange, of_text=of_text)
        except ValueError as error:
            await exchange.answer(_error(400, str(error), "invalid_request_error"), status=400)
            return
        if await self._fits(exchange, generation.prompt_tokens):
            await self._count(exchange, generation, self._generate)

    async def _embed(self, exchange: Exchange) -> None:
        """Answers with vectors; without the flag that a llama-server needs for them, 501 as there."""
        if not self.settings.embeddings:
            words = "This server does not support embeddings. Start it with `--embeddings`"
            await exchange.answer(_error(501, words, "not_supported_error"), status=501)
            return
        try:
            body = exchange.json()
            inputs = simulated_vectors.read_inputs(body)
        except ValueError as error:
            await exchange.answer(_error(400, str(error), "invalid_request_error"), status=400)
            return
        generation = Generation(
            number=self.stats.requests_started + 1,
            model=str(body.get("model") or self.settings.model),
            prompt="".join(inputs),
            limit=0,
            finish_reason="stop",
            stream=False,
            include_usage=True,
            cache_prompt=False,
            slot=None,
        )

        async def answer(exchange: Exchange, generation: Generation, faults: Faults) -> None:
            await self._vectors(exchange, generation, faults, body, inputs)

        if await self._fits(exchange, max(map(len, inputs)) // CHARS_PER_TOKEN + 1):  # each input by itself
            await self._count(exchange, generation, answer)

    async def _fits(self, exchange: Exchange, tokens: int) -> bool:
        if self.settings.context and tokens >= self.settings.context:
            await exchange.answer(_too_long(tokens, self.settings.context), status=400)
            return False
        return True

    async def _vectors(
        self, exchange: Exchange, generation: Generation, faults: Faults, body: dict[str, Any], inputs: list[str]
    ) -> None:
        if not await self._fails_at_once(exchange, faults):
            slot = await self.slots.acquire(generation.prompt, None)
            try:
                async with aclosing(
                    generation.pieces(slot, faults, prefill_tps=self.settings.prefill_tps, decode_tps=0)
                ) as nothing:
                    async for _ in nothing:
                        raise AssertionError("vectors are no words")
                model, prompt_tokens = generation.model, generation.prompt_tokens
                await exchange.answer(simulated_vectors.answer(body, inputs, model=model, prompt_tokens=prompt_tokens))
            except (SilentEnd, ErrorInStream):
                await exchange.answer(_error(500, "simulated fault", "server_error"))  # with status 200
            finally:
                self.slots.release(slot)

    async def _count(
        self,
        exchange: Exchange,
        generation: Generation,
        answer: Callable[[Exchange, Generation, Faults], Awaitable[None]],
    ) -> None:
        """Runs one request and counts it, however it ends."""
        stats = self.stats
        stats.requests_started += 1
        stats.active += 1
        stats.max_active = max(stats.max_active, stats.active)
        try:
            await answer(exchange, generation, self.faults.take())
            stats.requests_finished += 1
        except asyncio.CancelledError:
            stats.requests_aborted += 1
            noticed = {"request": generation.number, "step": generation.step, "tokens": generation.tokens}
            stats.aborts.append({**noticed, "at_monotonic_ms": time.monotonic() * 1000})
            raise
        finally:
            stats.active -= 1
            stats.prompt_tokens += generation.prompt_tokens
            stats.cached_tokens += generation.cached_tokens

    def _read(self, exchange: Exchange, *, of_text: bool) -> Generation:
        """Reads what we need of a request and leaves the rest alone, as a runtime does with unknown options. `of_text`:
        it asks to go on with a text, and not for the next message of a chat."""
        body = exchange.json()
        asked = body.get("prompt" if of_text else "messages") if isinstance(body, dict) else None
        if not isinstance(asked, str if of_text else list):
            raise ValueError("a simulated model takes one 'prompt', a text" if of_text else "'messages' must be a list")
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is None:
            limit = -1
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < -1:
            raise ValueError("'max_tokens' must be a whole number")
        slot, begun = body.get("id_slot"), "" if of_text else _begun(body)
        left = max(0, self.settings.answer_tokens - len(begun.split()))
        return Generation(
            number=self.stats.requests_started + 1,
            model=str(body.get("model") or self.settings.model),
            prompt=json.dumps(asked, separators=(",", ":")),
            limit=left if limit == -1 else limit,
            finish_reason="stop" if limit == -1 else "length",
            stream=bool(body.get("stream")),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
            cache_prompt=body.get("cache_prompt", True) is not False,
            slot=slot if isinstance(slot, int) and 0 <= slot < self.settings.parallel else None,
            begun=begun,
            of_text=of_text,
        )

    async def _fails_at_once(self, exchange: Exchange, faults: Faults) -> bool:
        if faults.oom:
            die("simulated: ggml_cuda_compute_forward failed: out of memory")
        if faults.ready_but_mute:
            await for_ever()
        if faults.error_status:
            error = _error(faults.error_status, "simulated fault", "server_error")
            await exchange.answer(error, status=faults.error_status)
            return True
        return False

    async def _generate(self, exchange: Exchange, generation: Generation, faults: Faults) -> None:
        if await self._fails_at_once(exchange, faults):
            return
        slot = await self.slots.acquire(generation.prompt, generation.slot)
        speeds = {"prefill_tps": self.settings.prefill_tps, "decode_tps": self.settings.decode_tps}
        try:
            async with aclosing(generation.pieces(slot, faults, **speeds)) as pieces:
                await (self._stream if generation.stream else self._answer_whole)(exchange, generation, pieces)
        finally:
            self.slots.release(slot)

    async def _stream(self, exchange: Exchange, generation: Generation, pieces: AsyncIterator[str]) -> None:
        await exchange.begin("text/event-stream")
        if not generation.of_text:
            # As llama-server: the role comes when the slot starts, before any work; it is no first token.
            await exchange.write(_event(_chunk(generation, {"role": "assistant", "content": None})))
        try:
            async for piece in pieces:
                await exchange.write(_event(_chunk(generation, {"content": piece})))
        except SilentEnd:
            await exchange.end()
            return
        except ErrorInStream:
            await exchange.write(_event(_error(500, "simulated fault in the stream", "server_error")))
            await exchange.end()
            return
        timings = {"timings": _timings(generation)}
        await exchange.write(_event(_chunk(generation, {}, generation.finish_reason) | timings))
        if generation.include_usage:
            usage = _envelope(generation, "chat.completion.chunk", []) | {"usage": _usage(generation)} | timings
            await exchange.write(_event(usage))
        await exchange.write(b"data: [DONE]\n\n")
        await exchange.end()

    async def _answer_whole(self, exchange: Exchange, generation: Generation, pieces: AsyncIterator[str]) -> None:
        try:
            text = "".join([piece async for piece in pieces])
        except (SilentEnd, ErrorInStream):
            await exchange.answer(_error(500, "simulated fault", "server_error"), status=500)
            return
        said = {"text": text} if generation.of_text else {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **said, "finish_reason": generation.finish_reason}
        figures = {"usage": _usage(generation), "timings": _timings(generation)}
        await exchange.answer(_envelope(generation, "chat.completion", [choice]) | figures)


def _begun(body: dict[str, Any]) -> str:
    """The answer so far, where the request asks to go on with one: its words count as said."""
    last = body["messages"][-1] if body["messages"] else None
    if not body.get("continue_final_message") or not isinstance(last, dict) or last.get("role") != "assistant":
        return ""
    content = last.get("content")
    return content if isinstance(content, str) else ""


def _chunk(generation: Generation, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    said = {"text": delta.get("content", "")} if generation.of_text else {"delta": delta}
    choice = {"index": 0, **said, "finish_reason": finish_reason}
    return _envelope(generation, "chat.completion.chunk", [choice])


def _envelope(generation: Generation, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    name = f"{'cmpl' if generation.of_text else 'chatcmpl'}-simulated-{generation.number}"
    kind = "text_completion" if generation.of_text else kind
    return {"id": name, "object": kind, "created": 0, "model": generation.model, "choices": choices}


def _usage(generation: Generation) -> dict[str, Any]:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.tokens,
        "total_tokens": generation.prompt_tokens + generation.tokens,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def _timings(generation: Generation) -> dict[str, Any]:
    return {
        "cache_n": generation.cached_tokens,
        "prompt_n": generation.prompt_tokens - generation.cached_tokens,
        "prompt_ms": generation.prompt_ms,
        "predicted_n": generation.tokens,
    }


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _error(code: int, message: str, kind: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "type": kind}}


def _too_long(prompt_tokens: int, context: int) -> dict[str, Any]:
    error = _error(400, "the request exceeds the available context size", "exceed_context_size_error")
    error["error"] |= {"n_prompt_tokens": prompt_tokens, "n_ctx": context}
    return error


def _note_load(load_log: Path | None) -> int:
    """Writes this start into the load log and counts the starts in it: one line per process, however it ends."""
    if load_log is None:
        return 1
    with load_log.open("a") as log:
        log.write(f"{os.getpid()} {time.monotonic() * 1000:.0f}\n")
    return len(load_log.read_text().splitlines())


def _settings(words: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(prog="simulated_server", description="A model server without a model.")
    flag = parser.add_argument
    flag("--port", type=int, required=True)
    flag("--model", default="simulated")
    flag("--parallel", type=int, default=1, help="slots; more requests wait in line")
    flag("--context", type=int, default=0, help="longest prompt in tokens; 0 = no limit")
    flag("--cold-start-ms", type=float, default=0.0)
    flag("--prefill-tps", type=float, default=0.0, help="prompt tokens per second; 0 = at once")
    flag("--decode-tps", type=float, default=0.0, help="answer tokens per second; 0 = at once")
    flag("--memory-mb", type=float, default=0.0, help="what the model pretends to occupy")
    flag("--answer-tokens", type=int, default=64, help="length of an answer without max_tokens")
    flag("--load-fails", type=int, nargs="?", const=-1, default=0, help="how many starts fail; no number = all")
    flag("--oom", action="store_true", help="run out of memory while loading")
    flag("--embeddings", action="store_true", help="answer /v1/embeddings too")
    flag("--load-log", type=Path, default=None, help="file that gets a line per start")
    return Settings(**vars(parser.parse_args(words)))


async def _serve(settings: Settings) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    simulated = SimulatedServer(settings)
    server = HttpServer(simulated.handle)
    async with server.listening(settings.port):
        loading = server.tasks.create_task(simulated.load(), name="load")
        print(f"simulated model {settings.model} on port {settings.port}, pid {os.getpid()}", flush=True)
        await stop.wait()
        loading.cancel()


if __name__ == "__main__":
    asyncio.run(_serve(_settings()))
