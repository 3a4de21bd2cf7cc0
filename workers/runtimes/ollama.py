"""Ollama: loads and unloads by its native API, generates through its OpenAI endpoint.

What shapes this file: Ollama never shows that it loads, aborts a load when the connection that asked for it closes,
reloads a model whenever a runner option differs, and may leave /api/ps unanswered while a runner is set up or torn
down. So a load holds one connection until it ends, no request of ours carries an option, and a slow /api/ps means busy.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import httpx

from broker.dialects import anthropic, ollama
from broker.dialects.openai_stream import read_complaint
from broker.policy.warm_together import FILE_SHARE
from workers.runtimes.base import (
    CONNECT_TIMEOUT_S,
    STATE_TIMEOUT_S,
    Endpoint,
    LoadFailed,
    ProbeFailed,
    RuntimeUnreachable,
    State,
    client_for,
    is_local,
    looks_like_oom,
    probe_chat,
    probe_embedding,
)

if TYPE_CHECKING:
    from broker.policy import Model

log = logging.getLogger("warmlane.ollama")

DEFAULT_URL = "http://127.0.0.1:11434"
KEEP_FOR_EVER = -1  # A number: the string "-1" is refused, it lacks a unit.
UNLOAD_NOW = 0
UNLOAD_TIMEOUT_S = 30.0
UNLOAD_POLL_S = 0.25
NOT_FOR_OLLAMA = frozenset(
    {
        *("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "use_mlock", "num_thread", "numa", "low_vram"),
        *("draft_num_predict", "shift", "adapters", "keep_alive"),
    }
)
"""What makes Ollama load a loaded model again, or changes how long it stays: the policy's business, no client's."""

SPEAKS = frozenset({anthropic.PATH, ollama.CHAT, ollama.GENERATE, ollama.EMBED, ollama.EMBEDDINGS})

BUSY_PAUSE_S = 2.0
TURN_TIMEOUT_S = 1800.0
"""How long one load may wait for others of the same Ollama, each of which has a limit of its own."""

_lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""The line before the one loader of each Ollama; whoever holds or awaits a lock keeps it alive."""


class Ollama:
    """One model of an Ollama server, which may serve other models beside it."""

    def __init__(self, name: str, model: "Model") -> None:
        self._title = f"model '{name}'"
        self._model = model.model
        self._url = model.url or DEFAULT_URL
        self._client = client_for(self._url)
        self._embeddings = model.embeddings
        self._loads = 0
        self._digest: str | None = None
        self._file_bytes = 0
        self._estimate_told = False
        self._last_state: State = "absent"

    @property
    def kind(self) -> str:
        return "ollama"

    @property
    def local(self) -> bool:
        return is_local(self._url)

    @property
    def manageable(self) -> bool:
        return True

    async def lacks(self) -> str:
        """Ollama is asked for the load: it says itself what it does not have."""
        return ""

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for the loads of this Ollama that this worker has under way; it does them strictly one by one."""
        line = _lines.setdefault(self._url, asyncio.Lock())
        try:
            async with asyncio.timeout(TURN_TIMEOUT_S):
                await line.acquire()
        except TimeoutError:
            raise LoadFailed(
                f"{self._title}: Ollama at {self._url} was busy with other loads for {TURN_TIMEOUT_S:g} s"
            ) from None
        try:
            yield
        finally:
            line.release()

    async def state(self) -> State:
        """Asks /api/ps. A timeout means that Ollama is busy with some runner, so what we knew last still holds."""
        try:
            loaded = await self._running() is not None
        except (httpx.ConnectError, httpx.ConnectTimeout):
            self._last_state = "unreachable"
        except (httpx.TimeoutException, TimeoutError):
            self._last_state = "loaded" if self._last_state == "loaded" else "loading"
        except (httpx.HTTPError, ValueError):
            self._last_state = "unreachable"
        else:
            # A load never shows in /api/ps; only the one who asked for it knows.
            self._last_state = "loaded" if loaded else "loading" if self._loads else "absent"
        return self._last_state

    async def load(self, *, timeout_s: float) -> None:
        """Loads the model and keeps it until we unload it, on a connection that is held until Ollama answers.

        Sends no options: they would not match those of the chat endpoint and cost a reload with the first request.
        """
        self._loads += 1
        busy = ""
        try:
            async with asyncio.timeout(timeout_s):
                ask = self._embed_nothing if self._embeddings else self._generate
                while True:
                    answer = await ask(KEEP_FOR_EVER, read_timeout_s=timeout_s)
                    if answer.status_code != 503:  # its line of loads is full, which says nothing of this model
                        break
                    busy = f": {read_complaint(answer.content).message}"
                    await asyncio.sleep(BUSY_PAUSE_S)
        except (TimeoutError, httpx.ReadTimeout):
            raise LoadFailed(f"{self._title}: Ollama did not load {self._model} within {timeout_s:g} s{busy}") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise LoadFailed(f"{self._title}: no Ollama answers at {self._url}; is it running?") from error
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__} {error}".strip()
            raise LoadFailed(f"{self._title}: Ollama broke off the load of {self._model}: {reason}") from error
        finally:
            self._loads -= 1
        if answer.status_code == 404:
            raise LoadFailed(
                f"{self._title}: Ollama at {self._url} does not have {self._model}; run: ollama pull {self._model}"
            )
        if answer.status_code != 200 or b'"error"' in answer.content[:64]:
            text = read_complaint(answer.content).message
            raise LoadFailed(f"{self._title}: Ollama could not load {self._model}: {text}", looks_like_oom(text))
        self._last_state = "loaded"

    async def progress(self) -> float | None:
        """Ollama says nothing of a load before its end."""
        return None

    async def unload(self) -> None:
        """Asks Ollama to drop the model and waits until it has: its answer comes before the unload, not after it."""
        try:
            await self._generate(UNLOAD_NOW, read_timeout_s=UNLOAD_TIMEOUT_S)
            give_up_at = time.monotonic() + UNLOAD_TIMEOUT_S
            while await self.state() == "loaded":
                if time.monotonic() >= give_up_at:
                    raise RuntimeUnreachable(
                        f"{self._title}: Ollama still holds {self._model} {UNLOAD_TIMEOUT_S:g} s after its unload"
                    )
                await asyncio.sleep(UNLOAD_POLL_S)
        except httpx.HTTPError as error:
            raise RuntimeUnreachable(f"{self._title}: Ollama at {self._url} did not unload it: {error!r}") from error

    async def memory_bytes(self, *, of_gpus: bool = False) -> int | None:
        """Gives Ollama's own figures: a model that is too large for the GPUs lies in part in the system's memory. Where
        Ollama could not read its runner's log it tells the size of the file for both, which is too little by the
        context and the buffers: that is told by its equality, and estimated from."""
        try:
            running = await self._running()
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        size = int(running.get("size") or 0) if running is not None else 0
        if running is None or not size or size != self._file_bytes:
            return (int(running.get("size_vram") or 0) if of_gpus and running is not None else size) or None
        if not self._estimate_told:
            self._estimate_told = True
            log.warning(
                "event=memory_estimated model=%s file_mb=%d reason=Ollama tells the size of the file", self._model,
                size >> 20,
            )  # fmt: skip
        return int(size * FILE_SHARE)

    async def file_bytes(self) -> int | None:
        """Gives the size on disk that /api/tags tells."""
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                stored = await self._stored()
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        return int(stored.get("size") or 0) or None if stored is not None else None

    def process_ids(self) -> list[int]:
        """Ollama's runners are not ours, and their command lines name no model."""
        return []

    def endpoint(self) -> Endpoint:
        return Endpoint(
            base_url=self._url, model=self._model, drops=NOT_FOR_OLLAMA, speaks=SPEAKS, knows_continue=False
        )

    async def probe(self, *, timeout_s: float, slot: int | None = None) -> float:
        """Times one token, without keep_alive and options; refuses on a model that the probe itself would load."""
        state = await self.state()
        if state == "unreachable":
            raise RuntimeUnreachable(f"{self._title}: no Ollama answers at {self._url}")
        if state != "loaded":
            raise ProbeFailed(f"{self._title} is not loaded, and a probe must not load it")
        probe = probe_embedding if self._embeddings else probe_chat
        return await probe(self._client, self.endpoint(), timeout_s=timeout_s)

    async def busy_slots(self) -> int | None:
        """Ollama tells nobody how many generations run or wait."""
        return None

    async def close(self) -> None:
        await self._client.aclose()

    async def _generate(self, keep_alive: int, *, read_timeout_s: float) -> httpx.Response:
        """Sends the empty prompt that loads a model (or, with keep_alive 0, unloads it without loading it first)."""
        return await self._client.post(
            f"{self._url}/api/generate",
            json={"model": self._model, "keep_alive": keep_alive, "stream": False},
            timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S),
        )

    async def _embed_nothing(self, keep_alive: int, *, read_timeout_s: float) -> httpx.Response:
        """Loads a model that only embeds, which refuses to generate: no input, no vector, but the model stays."""
        return await self._client.post(
            f"{self._url}/api/embed",
            json={"model": self._model, "input": "", "keep_alive": keep_alive},
            timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S),
        )

    async def _running(self) -> dict[str, Any] | None:
        """Finds our model among the loaded ones: by digest, for /api/ps shortens names and a copy has two."""
        async with asyncio.timeout(STATE_TIMEOUT_S):
            running = await self._list("/api/ps")
            named = next((entry for entry in running if _same_name(_name_of(entry), self._model)), None)
            if self._digest is None or (named is not None and named.get("digest") != self._digest):
                self._digest = await self._stored_digest()
        if self._digest is None:
            return named
        return next((entry for entry in running if entry.get("digest") == self._digest), None)

    async def _stored_digest(self) -> str | None:
        stored = await self._stored() or {}
        self._file_bytes = int(stored.get("size") or 0)
        return stored.get("digest")

    async def _stored(self) -> dict[str, Any] | None:
        stored = await self._list("/api/tags")
        return next((entry for entry in stored if _same_name(_name_of(entry), self._model)), None)

    async def _list(self, path: str) -> list[dict[str, Any]]:
        answer = await self._client.get(f"{self._url}{path}")
        answer.raise_for_status()
        return answer.json().get("models") or []


def _name_of(entry: dict[str, Any]) -> str:
    return str(entry.get("model") or entry.get("name") or "")


def _same_name(left: str, right: str) -> bool:
    return _full_name(left) == _full_name(right)


def _full_name(name: str) -> str:
    """Writes out what Ollama lets one leave away: host, library, tag."""
    name = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
