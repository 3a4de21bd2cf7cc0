"""One scripted model server that plays llama-server, its router or vLLM, with the traps of each; `fake_ollama` is the
fourth role.

All roles answer chat requests alike: a role chunk that is no token, then `tokens` pieces and a finish. `trap` says how
the next answers end instead, `mute` that they never get a token although every health page is fine. Loads take as long
as a test says: `hold_loads()` makes them wait for `release_loads()`. Everything that was asked is written down.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs

from workers.runtimes.http_server import Exchange, HttpServer

TRAPS = ("silent end", "text error", "swallowed error", "error + [DONE]", "role only", "repeated token")
"""Endings that a client which trusts HTTP 200, `[DONE]` or a clean end takes for a whole answer."""

BREAKS = ("error", "cut")
"""Endings that say themselves that something is wrong."""

PROXY_ERROR = b"proxy error: Failed to read connection"


class Call(NamedTuple):
    """One request that the server got."""

    method: str
    path: str
    query: str
    at_s: float  # loop time


class ScriptedRuntime:
    """What all roles share: the server, what it was asked, and how it answers a chat request."""

    word = "scripted"  # how an answer begins
    opening: str | None = None  # content of the role chunk

    def __init__(self) -> None:
        self.url = ""
        self.server = HttpServer(self._note)
        self.calls: list[Call] = []
        self.headers: list[dict[str, str]] = []  # of chat requests
        self.chat_bodies: list[dict[str, Any]] = []
        self.embed_bodies: list[dict[str, Any]] = []
        self.active = 0
        self.trap = ""
        self.after = 2  # pieces before the trap closes
        self.falls: int | None = None  # how many answers fall into it, probes left out; None = all, and probes
        self.echo = False  # an answer that is gone on with begins with what there was of it, as some versions do
        self.mute = False
        self.lingering = 0  # closed generations that llama-server has not noticed yet
        self.prefill_steps = 0  # prompt_progress chunks, where the client asked for them
        self.load_seen = asyncio.Event()
        self._may_load = asyncio.Event()
        self._may_load.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Serves on a loopback port while the block runs."""
        async with self.server.listening() as port:
            self.url = f"http://127.0.0.1:{port}"
            try:
                yield self
            finally:
                self.release_loads()  # one that goes on without a client would keep the server

    def hold_loads(self) -> None:
        self._may_load.clear()

    def release_loads(self) -> None:
        self._may_load.set()

    async def _note(self, exchange: Exchange) -> None:
        self.calls.append(Call(exchange.method, exchange.path, exchange.query, asyncio.get_running_loop().time()))
        await self._handle(exchange)

    async def _handle(self, exchange: Exchange) -> None:
        raise NotImplementedError

    async def _chat(self, exchange: Exchange) -> None:
        """Answers a chat request of a loaded model, or falls into the trap."""
        body = exchange.json()
        self.chat_bodies.append(body)
        self.headers.append(exchange.headers)
        self.active += 1
        try:
            await exchange.begin("text/event-stream")
            for step in range(self.prefill_steps if body.get("return_progress") else 0):
                progress = {"total": 8 * self.prefill_steps, "cache": 0, "processed": 8 * step, "time_ms": step}
                await exchange.write(self._chunk(body, self._role(), prompt_progress=progress))
            await exchange.write(self._chunk(body, self._role()))
            if self.mute:
                await asyncio.get_running_loop().create_future()
            if not self.trap or (self.falls is not None and (not self.falls or body.get("max_tokens") == 1)):
                await self._say(exchange, body)
            else:
                self.falls = None if self.falls is None else self.falls - 1
                await self._fall(exchange, body)
        finally:
            self.active -= 1

    async def _embed(self, exchange: Exchange) -> None:
        """Answers one vector for each input."""
        body = exchange.json()
        self.embed_bodies.append(body)
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [{"object": "embedding", "index": n, "embedding": [0.5, 1.0]} for n in range(len(inputs))]
        await exchange.answer({"object": "list", "data": data, "model": body["model"]})

    async def _say(self, exchange: Exchange, body: dict[str, Any]) -> None:
        told = self._told(body)
        count = body.get("max_tokens") or 8 - told
        for number in range(count):
            await exchange.write(self._chunk(body, {"content": self._piece(body, number)}))
        await exchange.write(self._chunk(body, self._role() if self.opening == "" else {}, finish="length"))
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 5 + told, "completion_tokens": count, "total_tokens": 5 + told + count}
            await exchange.write(_event({**self._envelope(body, []), "usage": usage}))
        await exchange.write(b"data: [DONE]\n\n")
        await exchange.end()

    async def _fall(self, exchange: Exchange, body: dict[str, Any]) -> None:
        for number in range(0 if self.trap in ("role only", "repeated token") else self.after):
            await exchange.write(self._chunk(body, {"content": self._piece(body, number)}))
        match self.trap:
            case "silent end" | "role only":
                pass
            case "text error":  # the router's, when its child is gone
                await exchange.write(PROXY_ERROR)
            case "swallowed error":  # Ollama's /v1: the error line was read as a chunk without content
                await exchange.write(self._chunk(body, {"role": "assistant", "content": ""}))
            case "error + [DONE]":  # vLLM's
                await exchange.write(_event({"error": {"message": "EngineCore died", "type": "x", "code": 500}}))
                await exchange.write(b"data: [DONE]\n\n")
            case "repeated token":  # Ollama's: after 31 equal pieces it stops without a word
                for _ in range(31):
                    await exchange.write(self._chunk(body, {"content": " the"}))
            case "error":  # llama-server's
                await exchange.write(_event({"error": {"message": "slot failed", "type": "server_error", "code": 500}}))
            case "cut":
                exchange._connection.abort()
                return
            case other:
                raise ValueError(f"no trap {other!r}")
        await exchange.end()

    def _piece(self, body: dict[str, Any], number: int) -> str:
        """One of the numbered words of an answer; one that the request has begun goes on behind its last word."""
        told = self._told(body)
        piece = f" {told + number}" if told + number else self.word
        return body["messages"][-1]["content"] + piece if self.echo and told and number == 0 else piece

    def _told(self, body: dict[str, Any]) -> int:
        last = (body.get("messages") or [{}])[-1]
        return len(last["content"].split()) if last.get("role") == "assistant" else 0

    def _role(self) -> dict[str, Any]:
        return {"role": "assistant", "content": self.opening}

    def _chunk(self, body: dict[str, Any], delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        return _event({**self._envelope(body, [{"index": 0, "delta": delta, "finish_reason": finish}]), **more})

    def _envelope(self, body: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": body.get("model"), "choices": choices}


class ScriptedLlamaServer(ScriptedRuntime):
    """One model, loaded by whoever started the server: 503 to everything until then."""

    async def _handle(self, exchange: Exchange) -> None:
        if not self._may_load.is_set():
            await _refuse(exchange, 503, "Loading model", "unavailable_error")
            return
        match exchange.method, exchange.path:
            case "GET", "/health":
                await exchange.answer({"status": "ok"})
            case "GET", "/slots":
                busy = self.active + self.lingering
                await exchange.answer([{"id": n, "is_processing": n < busy} for n in range(2)])
            case "GET", "/models" | "/v1/models":
                entry = {"id": "weights", "object": "model", "owned_by": "llamacpp", "meta": {"n_ctx_train": 4096}}
                await exchange.answer({"models": [{"name": "weights"}], "object": "list", "data": [entry]})
            case "POST", "/v1/chat/completions":
                await self._chat(exchange)
            case "POST", "/v1/embeddings":
                await self._embed(exchange)
            case _:
                await _refuse(exchange, 404, "File Not Found", "not_found_error")


class ScriptedRouter(ScriptedRuntime):
    """llama-server as a router: loads on request, goes on with a load whose client went away, and loads on a GET."""

    def __init__(self, *models: str) -> None:
        super().__init__()
        self.states = dict.fromkeys(models, "unloaded")
        self.failed: set[str] = set()
        self.args: dict[str, list[str]] = {}  # command line of a model's child
        self.fail_loads = False
        self.models_max: int | None = None
        self.loads_started: list[str] = []
        self.sse_event = "status_change"  # newer and older ones differ in the name
        self._listeners: list[asyncio.Queue[dict[str, Any]]] = []
        self._streaming: dict[str, list[asyncio.Task[None]]] = {}

    async def _handle(self, exchange: Exchange) -> None:
        query = {key: values[0] for key, values in parse_qs(exchange.query).items()}
        match exchange.method, exchange.path:
            case "GET", "/health":
                await exchange.answer({"status": "ok"})  # whatever its models do
            case "GET", "/models" | "/v1/models":
                await exchange.answer({"object": "list", "data": [self._entry(name) for name in self.states]})
            case "GET", "/models/sse":
                await self._tell_news(exchange)
            case "POST", "/models/load":
                await self._load(exchange, exchange.json()["model"])
            case "POST", "/models/unload":
                await self._unload(exchange, exchange.json()["model"])
            case "GET", "/slots" | "/props" | "/metrics":
                if await self._reach(exchange, query.get("model", ""), query):
                    await exchange.answer([{"id": n, "is_processing": n < self.active} for n in range(2)])
            case "POST", "/v1/chat/completions":
                name = exchange.json().get("model", "")
                if await self._reach(exchange, name, query):
                    await self._stream(exchange, name)
            case "POST", "/v1/embeddings":
                if await self._reach(exchange, exchange.json().get("model", ""), query):
                    await self._embed(exchange)
            case _:
                await _refuse(exchange, 404, "File Not Found", "not_found_error")

    def become(self, name: str, state: str, **more: Any) -> None:
        """Moves a model to a state and says so to whoever listens."""
        self.states[name] = state
        for listener in self._listeners:
            listener.put_nowait({"model": name, "event": self.sse_event, "data": {"status": state, **more}})

    def say_progress(self, name: str, share: float) -> None:
        """Says how far a load is."""
        self.become(name, "loading", progress={"stage": "text_model", "value": share})

    def _entry(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = {"value": self.states[name], "args": self.args.get(name, [])}
        if name in self.failed:
            status |= {"failed": True, "exit_code": 1}
        return {"id": name, "aliases": [f"{name}-alias"], "object": "model", "status": status}

    async def _tell_news(self, exchange: Exchange) -> None:
        news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._listeners.append(news)
        try:
            await exchange.begin("text/event-stream")
            while True:
                await exchange.write(_event(await news.get()))
        finally:
            self._listeners.remove(news)

    async def _load(self, exchange: Exchange, name: str) -> None:
        name = name.removesuffix("-alias")
        if name not in self.states:
            await _refuse(exchange, 404, "model is not found", "not_found_error")
        elif self.states[name] not in ("unloaded", "downloaded"):
            await _refuse(exchange, 400, "model is already running", "invalid_request_error")
        elif self.models_max is not None and sum(s == "loaded" for s in self.states.values()) >= self.models_max:
            await _refuse(exchange, 500, "model limit reached, try again later", "server_error")
        else:
            self._start_load(name)
            await exchange.answer({"success": True})

    def _start_load(self, name: str) -> None:
        self.loads_started.append(name)
        self.failed.discard(name)
        self.become(name, "loading")
        self.load_seen.set()
        self.server.tasks.create_task(self._finish_load(name), name=f"load {name}")  # goes on whoever went away

    async def _finish_load(self, name: str) -> None:
        await self._may_load.wait()
        if self.states[name] != "loading":
            return
        if self.fail_loads:
            self.failed.add(name)
            self.become(name, "unloaded", exit_code=1)
        else:
            self.become(name, "loaded")

    async def _unload(self, exchange: Exchange, name: str) -> None:
        name = name.removesuffix("-alias")
        if self.states.get(name) in (None, "unloaded", "downloaded"):
            await _refuse(exchange, 400, "model is not running", "invalid_request_error")
            return
        for task in self._streaming.pop(name, []):
            task.cancel()
        self.become(name, "unloaded", exit_code=0)
        await exchange.answer({"success": True})

    async def _reach(self, exchange: Exchange, name: str, query: dict[str, str]) -> bool:
        """Whether the model's child can be asked: any request but one with autoload=false loads it."""
        if not any(name in (known, f"{known}-alias") for known in self.states):
            await _refuse(exchange, 400, f"model '{name}' not found", "invalid_request_error")
            return False
        name = name.removesuffix("-alias")
        if self.states[name] == "unloaded":
            if query.get("autoload") == "false":
                await _refuse(exchange, 400, "model is not loaded", "invalid_request_error")
                return False
            self._start_load(name)
        if self.states[name] == "sleeping":
            self.become(name, "loaded")  # whatever asks its child wakes it
        while self.states[name] == "loading":  # noqa: ASYNC110  # a double may poll itself
            await asyncio.sleep(0.01)
        return True

    async def _stream(self, exchange: Exchange, name: str) -> None:
        """Passes a child's answer on; when the child goes, its last words are plain text and the end is clean."""
        child = asyncio.create_task(self._chat(exchange), name=f"child {name}")
        self._streaming.setdefault(name, []).append(child)
        try:
            await child
        except asyncio.CancelledError:
            child.cancel()
            if exchange.hung_up:
                raise
            await exchange.write(PROXY_ERROR)
            await exchange.end()


class ScriptedVllm(ScriptedRuntime):
    """vLLM with one model, perhaps with its development endpoints: it sleeps, and hangs whoever asks it meanwhile."""

    opening = ""

    def __init__(self, *, dev: bool = True) -> None:
        super().__init__()
        self.dev = dev
        self.name = "weights"
        self.asleep = 0  # level; 0 = awake
        self.tags: set[str] = {"weights", "kv_cache"}  # what is in memory
        self.garbage = False  # woken without its weights
        self.waiting = 0
        self.refuse_new = False  # its own admission is at its limit
        self.dead = False
        self.sleep_enabled = True
        self.wake_error = ""
        self.steps: list[str] = []
        self._awake = asyncio.Event()
        self._awake.set()

    async def _handle(self, exchange: Exchange) -> None:
        query = {key: values for key, values in parse_qs(exchange.query).items()}
        match exchange.method, exchange.path:
            case "GET", "/health":
                await exchange.answer({}, status=503 if self.dead else 200)  # fine while asleep
            case "GET", "/v1/models":
                await exchange.answer({"object": "list", "data": [{"id": "weights", "max_model_len": 4096}]})
            case "GET", "/metrics":
                await self._metrics(exchange)
            case "POST", "/v1/chat/completions":
                await self._admit(exchange)
            case "POST", "/v1/embeddings":
                await self._awake.wait()
                await self._embed(exchange)
            case "GET", "/is_sleeping" if self.dev:
                await exchange.answer({"is_sleeping": self.asleep > 0})
            case "POST", "/sleep" if self.dev and not self.sleep_enabled:
                await _refuse(exchange, 500, "Sleep mode is not enabled.", "InternalServerError")
            case "POST", "/sleep" if self.dev:
                self.steps.append(f"sleep {query.get('level', ['1'])[0]} {query.get('mode', ['abort'])[0]}")
                self.put_to_sleep(int(query.get("level", ["1"])[0]))
                await exchange.answer({"status": "sleeping", "level": self.asleep})
            case "POST", "/wake_up" if self.dev:
                await self._wake(exchange, set(query.get("tags", ["weights", "kv_cache"])))
            case "POST", "/collective_rpc" if self.dev:
                self.steps.append(f"rpc {exchange.json()['method']}")
                self.garbage = False
                await exchange.answer({"results": [None]})
            case _:
                await exchange.answer({"detail": "Not Found"}, status=404)

    def put_to_sleep(self, level: int) -> None:
        """Gives the memory back, at level 2 the copy of the weights too."""
        self.asleep, self.garbage = level, False
        self.tags.clear()
        self._awake.clear()

    async def _wake(self, exchange: Exchange, tags: set[str]) -> None:
        self.steps.append(f"wake {' '.join(sorted(tags))}")
        if self.wake_error:
            await _refuse(exchange, 500, self.wake_error, "InternalServerError")
            return
        self.load_seen.set()
        await self._may_load.wait()
        if "weights" in tags and self.asleep == 2:
            self.garbage = True
        self.tags |= tags
        if self.tags == {"weights", "kv_cache"}:
            self.asleep = 0
            self._awake.set()
        await exchange.answer({"status": "sleeping" if self.asleep else "awake"})

    async def _admit(self, exchange: Exchange) -> None:
        if self.refuse_new:
            error = {"message": "The engine is currently busy with other requests.", "type": "x", "code": 503}
            await exchange.answer({"error": error}, status=503)
            return
        if exchange.json().get("model") != self.name:
            error = {"message": f"The model `{exchange.json().get('model')}` does not exist.", "code": 404}
            await exchange.answer({"error": error}, status=404)
            return
        self.word = "garbage" if self.garbage else "scripted"
        await self._awake.wait()  # asleep, it takes requests in and lets them wait
        await self._chat(exchange)

    async def _metrics(self, exchange: Exchange) -> None:
        labels = 'engine="0",model_name="weights"'
        level = {0: "awake", 1: "weights_offloaded", 2: "discard_all"}[self.asleep]
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{{{labels}}} {float(self.active)}",
            f"vllm:num_requests_waiting{{{labels}}} {float(self.waiting)}",
            f"vllm:kv_cache_usage_perc{{{labels}}} 0.25",
            *(
                f'vllm:engine_sleep_state{{{labels},sleep_state="{state}"}} {1.0 if state == level else 0.0}'
                for state in ("awake", "weights_offloaded", "discard_all")
            ),
        ]
        await exchange.begin("text/plain; version=0.0.4")
        await exchange.write(("\n".join(lines) + "\n").encode())
        await exchange.end()


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _refuse(exchange: Exchange, status: int, message: str, kind: str) -> None:
    await exchange.answer({"error": {"code": status, "message": message, "type": kind}}, status=status)
