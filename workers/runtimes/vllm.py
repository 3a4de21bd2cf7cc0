"""vLLM at a `url`: one model per server, which we can put to sleep and wake where it was started for that.

What shapes this file: the server is started by somebody else, does not listen before its engine is up, and its /health
is fine while it sleeps. A request that reaches a sleeping one waits for ever, so nothing is sent before it says that it
is awake. Level 1 keeps the weights in host memory; level 2 drops them, and a wake must read them again between its two
halves or the model answers nonsense. Sleep needs `VLLM_SERVER_DEV_MODE=1` and `--enable-sleep-mode`; a server without
them is used as it is.
"""

import asyncio
import logging
import re
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from broker.dialects import anthropic
from broker.dialects.openai_stream import read_complaint
from workers.runtimes.base import (
    CONNECT_TIMEOUT_S,
    STATE_TIMEOUT_S,
    Endpoint,
    LoadFailed,
    ProbeFailed,
    RuntimeProblem,
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

log = logging.getLogger("warmlane.vllm")

SPEAKS = frozenset({anthropic.PATH})

REFUSED_WAIT_S = 10.0
POLL_S = 0.25
SLEEP_TIMEOUT_S = 60.0
AWAKE_WAIT_S = 10.0
"""How long a server may still call itself asleep after it answered the wake."""

_SAMPLE = re.compile(r"^(vllm:\w+)(?:\{(.*)\})? ([0-9.eE+-]+)\s*$", re.MULTILINE)
_LEVELS = {"weights_offloaded": 1, "discard_all": 2}


@dataclass(frozen=True)
class Load:
    """What vLLM says of its work now."""

    running: int
    waiting: int
    cache_used: float  # share of the KV cache, 0 to 1
    sleep_level: int  # 0 = awake, or it does not say


class Vllm:
    """The one model of a vLLM server."""

    def __init__(self, name: str, model: "Model") -> None:
        self._title = f"model '{name}'"
        self._model = model.model
        self._slots = model.max_concurrent
        self._embeddings = model.embeddings
        self._url = model.url or ""
        self._level = int(model.options.get("sleepLevel", 1))
        self._client = client_for(self._url)
        self._sleeps: bool | None = None  # whether it can sleep; None = not known
        self._waking = False
        self._queue_told = False

    @property
    def kind(self) -> str:
        return "vllm"

    @property
    def local(self) -> bool:
        return is_local(self._url)

    @property
    def manageable(self) -> bool:
        return self._sleeps is True

    async def lacks(self) -> str:
        return ""

    def turn(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def state(self) -> State:
        """Asks /health, and /is_sleeping where there is one: asleep is not loaded."""
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                if (await self._client.get(f"{self._url}/health")).status_code != 200:
                    return "unreachable"  # its engine is dead
                asleep = await self._is_sleeping()
        except (httpx.HTTPError, TimeoutError, ValueError):
            return "unreachable"
        if not asleep:
            return "loaded"
        return "loading" if self._waking else "absent"

    async def load(self, *, timeout_s: float) -> None:
        """Wakes the server, or finds it awake; one that does not answer is given up on soon."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._until_it_answers()
                self._waking = True
                await self._wake()
        except TimeoutError:
            raise LoadFailed(f"{self._title}: vLLM at {self._url} did not wake within {timeout_s:g} s") from None
        except (httpx.HTTPError, ValueError) as error:
            words = f"{type(error).__name__} {error}".strip()
            raise LoadFailed(f"{self._title}: vLLM at {self._url} broke off the wake: {words}") from error
        finally:
            self._waking = False

    async def progress(self) -> float | None:
        """vLLM says nothing of a wake before its end."""
        return None

    async def unload(self) -> None:
        """Puts the server to sleep once its generations have ended; one that cannot sleep keeps its memory."""
        try:
            if await self._is_sleeping():
                return
            if not self._sleeps:
                log.info("event=unload model=%s url=%s skipped=%s", self._model, self._url, "the server cannot sleep")
                return
            answer = await self._client.post(
                f"{self._url}/sleep",
                params={"level": self._level, "mode": "wait"},
                timeout=httpx.Timeout(SLEEP_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            )
            if answer.status_code != 200:
                self._sleeps = False
                text = read_complaint(answer.content).message
                raise RuntimeProblem(
                    f"{self._title}: vLLM refused to sleep; was it started with --enable-sleep-mode? {text}"
                )
            await self._until_it_says(asleep=True, timeout_s=SLEEP_TIMEOUT_S)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            raise RuntimeUnreachable(f"{self._title}: vLLM at {self._url} did not fall asleep: {error!r}") from error

    async def memory_bytes(self, *, of_gpus: bool = False) -> int | None:
        """vLLM takes its share of the card at its start and tells nobody what of it is used for what."""
        return None

    async def file_bytes(self) -> int | None:
        """It takes what its flags say, whatever the size of the file."""
        return None

    def process_ids(self) -> list[int]:
        return []

    def endpoint(self) -> Endpoint:
        return Endpoint(self._url, model=self._model, speaks=SPEAKS, tokenizer="vllm")

    async def probe(self, *, timeout_s: float, slot: int | None = None) -> float:
        """Times one token; refuses on a sleeping server, where it would wait for ever."""
        state = await self.state()
        if state == "unreachable":
            raise RuntimeUnreachable(f"{self._title}: no vLLM answers at {self._url}")
        if state != "loaded":
            raise ProbeFailed(f"{self._title} is asleep, and a probe must not wake it")
        probe = probe_embedding if self._embeddings else probe_chat
        return await probe(self._client, self.endpoint(), timeout_s=timeout_s)

    async def busy_slots(self) -> int | None:
        """Counts what runs and what waits inside vLLM; a line in there hides from us, so it is logged once."""
        load = await self.work()
        if load is None:
            return None
        if load.waiting and not self._queue_told:
            log.warning(
                "event=hidden_queue model=%s waiting=%d running=%d slots=%d cache_used=%.2f",
                self._model, load.waiting, load.running, self._slots, load.cache_used,
            )  # fmt: skip
        self._queue_told = load.waiting > 0
        return load.running + load.waiting

    async def work(self) -> Load | None:
        """Reads /metrics; None when it has nothing to say."""
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                answer = await self._client.get(f"{self._url}/metrics")
        except (httpx.HTTPError, TimeoutError):
            return None
        return read_metrics(answer.text) if answer.status_code == 200 else None

    async def close(self) -> None:
        await self._client.aclose()

    async def _until_it_answers(self) -> None:
        refused_until = time.monotonic() + REFUSED_WAIT_S
        while await self.state() == "unreachable":
            if time.monotonic() >= refused_until:
                raise LoadFailed(
                    f"{self._title}: no vLLM answers at {self._url}; it does not listen before its engine is up"
                )
            await asyncio.sleep(POLL_S)

    async def _wake(self) -> None:
        if not await self._is_sleeping():
            return
        load = await self.work()
        level = (load.sleep_level if load is not None else 0) or self._level  # somebody else may have chosen another
        if level == 2:
            await self._post("/wake_up", params={"tags": "weights"})
            await self._post("/collective_rpc", json={"method": "reload_weights"})
            await self._post("/wake_up", params={"tags": "kv_cache"})
        else:
            await self._post("/wake_up")
        try:
            await self._until_it_says(asleep=False, timeout_s=AWAKE_WAIT_S)
        except TimeoutError:
            raise LoadFailed(f"{self._title}: vLLM was woken and still calls itself asleep; is it paused?") from None

    async def _post(self, path: str, *, params: dict[str, str] | None = None, json: object = None) -> None:
        """Sends one step of a wake; the caller's timeout holds."""
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        answer = await self._client.post(f"{self._url}{path}", params=params, json=json, timeout=timeout)
        if answer.status_code != 200:
            text = read_complaint(answer.content).message
            raise LoadFailed(f"{self._title}: vLLM did not wake, {path} was answered {text}", looks_like_oom(text))

    async def _until_it_says(self, *, asleep: bool, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while await self._is_sleeping() is not asleep:  # noqa: ASYNC110  # the server tells nobody
                await asyncio.sleep(POLL_S)

    async def _is_sleeping(self) -> bool:
        """Also learns whether it can sleep at all: without its development endpoints it answers 404."""
        answer = await self._client.get(f"{self._url}/is_sleeping")
        if answer.status_code == 404:
            self._sleeps = False
            return False
        answer.raise_for_status()
        if self._sleeps is None:
            self._sleeps = True
        told = answer.json()
        return isinstance(told, dict) and told.get("is_sleeping") is True


def read_metrics(text: str) -> Load | None:
    """Reads what we need of vLLM's Prometheus text, added up over its engines; None if it is not there."""
    sums: dict[str, float] = {}
    cache: list[float] = []
    level = 0
    for name, labels, value in _SAMPLE.findall(text):
        number = float(value)
        sums[name] = sums.get(name, 0.0) + number
        if name == "vllm:kv_cache_usage_perc":
            cache.append(number)
        elif name == "vllm:engine_sleep_state" and number > 0:
            level = next((n for word, n in _LEVELS.items() if f'sleep_state="{word}"' in labels), level)
    if "vllm:num_requests_running" not in sums:
        return None
    return Load(
        running=int(sums["vllm:num_requests_running"]),
        waiting=int(sums.get("vllm:num_requests_waiting", 0)),
        cache_used=max(cache, default=0.0),
        sleep_level=level,
    )
