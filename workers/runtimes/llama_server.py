"""llama.cpp's own server: one model per process, started and stopped by us (`command`) or by someone else (`url`)."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from workers.runtimes.base import (
    STATE_TIMEOUT_S,
    Endpoint,
    LoadFailed,
    ProbeFailed,
    ProbeRefused,
    RuntimeUnreachable,
    State,
    client_for,
    is_local,
    probe_chat,
    probe_embedding,
)
from workers.runtimes.process import ChildServer, fill_command, free_port

if TYPE_CHECKING:
    from broker.policy import Model

log = logging.getLogger("warmlane.llama_server")

# Small batches, so that a cancelled prefill ends soon; no prompt cache in host memory, or headroom sums are wrong.
DEFAULT_COMMAND = "llama-server -m {model} --port {port} -np {parallel} -c {context} -cram 0 -b 256 -ub 256".split()
EMBEDDING_COMMAND = "llama-server -m {model} --port {port} -np {parallel} -c {context} -cram 0 --embeddings".split()
EMBEDDING_BATCH = 2048  # The whole of an input must fit one batch; what a model has that says no context.
# Where a first token is long in coming, this shows that the prompt is being read and how much of it has been.
PROGRESS = {"return_progress": True}
REFUSED_WAIT_S = 10.0
URL_POLL_S = 0.25


class LlamaServer:
    """One llama-server: its process is the load, its /health is the state."""

    def __init__(self, name: str, model: "Model", *, state_dir: Path) -> None:
        self._name = name
        self._model = model
        self._url = model.url
        self._child = ChildServer(name, state_dir=state_dir) if model.command or not model.url else None
        self._base_url = self._url or ""
        self._loaded_once = False
        self._loading = asyncio.Lock()
        self._slots = 0
        self._client = client_for(self._base_url)

    @property
    def kind(self) -> str:
        return "llama.cpp"

    @property
    def local(self) -> bool:
        return self._url is None or is_local(self._url)

    @property
    def manageable(self) -> bool:
        """Whether the process is ours; one that somebody else started has nothing that loads or unloads."""
        return self._child is not None

    async def lacks(self) -> str:
        """Names weights or a program that are not there; of one at a `url` both are somebody else's."""
        if self._child is None:
            return ""
        argv = self._command(port=0)
        return self._lacking_file(argv) or self._child.lacking_program(argv[0])

    def turn(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def state(self) -> State:
        """Asks /health, which answers 503 while loading and never wakes a sleeping model."""
        if self._child is not None and not self._child.running:
            return "loading" if self._loading.locked() else "absent"
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                status = (await self._client.get(f"{self._base_url}/health")).status_code
        except (httpx.HTTPError, TimeoutError):
            # Our own process that has not answered yet is still on its way up.
            return "loading" if self._child is not None and not self._loaded_once else "unreachable"
        if status == 200:
            return "loaded"
        return "loading" if status == 503 else "unreachable"

    async def load(self, *, timeout_s: float) -> None:
        """Starts our server, or waits for someone else's, until it calls the model loaded."""
        async with self._loading:
            if self._child is None:
                await self._wait_for_url(timeout_s)
            elif not (self._child.running and await self._is_loaded()):
                await self._start(self._child, timeout_s)
            self._slots = len(await self._list_slots() or ()) if self._child is not None else 0

    async def progress(self) -> float | None:
        """A llama-server that loads answers 503 to everything, without a figure."""
        return None

    async def unload(self) -> None:
        """Stops our server; one that runs at a `url` is not ours to stop and keeps its memory."""
        if self._child is None:
            log.info("event=unload model=%s url=%s skipped=%s", self._name, self._url, "the server is not ours to stop")
            return
        await self._child.stop()

    async def memory_bytes(self, *, of_gpus: bool = False) -> int | None:
        """Adds up the host memory of our server's processes; None for one at a `url`."""
        return await asyncio.to_thread(self._child.memory_bytes) if self._child is not None else None

    async def file_bytes(self) -> int | None:
        """Looks at the file; None for a name that llama-server itself would resolve."""
        return await asyncio.to_thread(_size_of, Path(self._file()))

    def process_ids(self) -> list[int]:
        return self._child.process_ids() if self._child is not None else []

    def endpoint(self) -> Endpoint:
        if self._model.embeddings:
            return Endpoint(base_url=self._base_url, model=self._model.model, slots=self._slots)
        return Endpoint(
            base_url=self._base_url,
            model=self._model.model,
            slots=self._slots,
            extra=PROGRESS,
            tokenizer="llama",
        )

    async def probe(self, *, timeout_s: float, slot: int | None = None) -> float:
        """Times one token; `cache_prompt` is off so that the probe measures work and not the last probe's leftovers."""
        if self._child is not None and not self._child.running:
            raise RuntimeUnreachable(f"model '{self._name}': {self._child.exit_problem() or 'its server does not run'}")
        if self._model.embeddings:
            return await self._probe_vector(timeout_s)
        extra = probe_in(slot, self._slots)
        return await probe_chat(self._client, self.endpoint(), timeout_s=timeout_s, extra=extra)

    async def _probe_vector(self, timeout_s: float) -> float:
        """Asks for a vector; what a llama-server lacks for it has a remedy, which its own words leave out."""
        try:
            return await probe_embedding(self._client, self.endpoint(), timeout_s=timeout_s)
        except ProbeRefused as error:
            if error.status == 501:
                remedy = "start it with --embeddings" if self._url else "its command needs --embeddings"
            elif "ooling type" in error.words:
                remedy = "its GGUF says no pooling, so its command needs --pooling mean, cls or last, as its maker says"
            else:
                raise
            raise ProbeFailed(f"model '{self._name}' gives no vectors: {remedy}") from None

    async def busy_slots(self) -> int | None:
        """Counts the slots at work; asking more than once a second hides closed connections from the server."""
        if self._child is not None and not self._child.running:
            return 0
        slots = await self._list_slots()
        return None if slots is None else sum(1 for slot in slots if slot.get("is_processing"))

    async def _list_slots(self) -> list[dict[str, Any]] | None:
        """Lists the slots; None while it loads, or if it was started with --no-slots."""
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                answer = await self._client.get(f"{self._base_url}/slots")
            slots = answer.json()
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        return slots if answer.status_code == 200 and isinstance(slots, list) else None

    async def close(self) -> None:
        if self._child is not None:
            await self._child.stop()
        await self._client.aclose()

    def _command(self, port: int) -> list[str]:
        model = self._model
        context = (model.context_tokens or 0) * model.max_concurrent  # 0 = as long as the GGUF says
        return fill_command(
            model.command or (self._embedding_command() if model.embeddings else DEFAULT_COMMAND),
            {"model": self._file(), "port": port, "parallel": model.max_concurrent, "context": context},
        )

    def _embedding_command(self) -> list[str]:
        """The pooling is the GGUF's own: another one would give vectors that mean nothing, and nobody would notice."""
        batch = str(self._model.context_tokens or EMBEDDING_BATCH)
        return [*EMBEDDING_COMMAND, "-b", batch, "-ub", batch]

    def _environment(self) -> Mapping[str, str]:
        return {}

    def _lacking_file(self, argv: Sequence[str]) -> str:
        """Names weights that are named by path and not there (a name for `-hf` is none of our business)."""
        for flag, value in pairwise(argv):
            if flag in ("-m", "--model") and value == self._file() and not Path(value).is_file():
                return f"model '{self._name}': there is no GGUF file at {value}"
        return ""

    def _file(self) -> str:
        return str(Path(self._model.model).expanduser()) if self._model.model.startswith("~") else self._model.model

    async def _start(self, child: ChildServer, timeout_s: float) -> None:
        port = httpx.URL(self._url).port or 80 if self._url else free_port()
        argv = self._command(port)
        if missing := self._lacking_file(argv):
            raise LoadFailed(missing)
        self._base_url = self._url or f"http://127.0.0.1:{port}"
        self._loaded_once = False
        try:
            await child.start(argv, env=self._environment())
            await child.until_ready(self._is_loaded, timeout_s=timeout_s)
        except BaseException:  # A cancelled load is an abandoned one: nothing may go on loading without an owner.
            await child.stop()
            raise
        self._loaded_once = True

    async def _wait_for_url(self, timeout_s: float) -> None:
        """Waits while the server says that it loads; one that nobody started is given up on much sooner."""
        give_up_at = time.monotonic() + timeout_s
        refused_until = time.monotonic() + min(timeout_s, REFUSED_WAIT_S)
        while (state := await self.state()) != "loaded":
            now = time.monotonic()
            if state != "unreachable":
                refused_until = now + REFUSED_WAIT_S
            elif now >= refused_until:
                raise LoadFailed(
                    f"model '{self._name}': no llama-server answers at {self._url}; start it, or name a command"
                )
            if now >= give_up_at:
                raise LoadFailed(f"model '{self._name}' at {self._url} did not load within {timeout_s:g} s")
            await asyncio.sleep(URL_POLL_S)

    async def _is_loaded(self) -> bool:
        return await self.state() == "loaded"


def probe_in(slot: int | None, slots: int) -> dict[str, object]:
    """What a llama-server must be told of a probe; of several free slots it would choose the one whose prompt begins
    like the probe, as all do with one chat template."""
    return {"cache_prompt": False, **({"id_slot": slot} if slot is not None and slot < slots else {})}


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
