"""llama-server as a router: one server at a `url`, with a child process for each model that it loads.

What shapes this file: any GET that names a model loads it (and may evict another), so only `/models` is asked for
state; generations carry `autoload=false`, so that none of them loads behind the gateway's back. A load that was asked
for goes on by itself. An unload kills what streams, so the waker asks for it only when nothing runs. A failed load
shows as `unloaded` with `failed`. A sleeping model has given its memory back: it counts as not loaded, and only a
generation wakes it.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from broker.dialects.openai_stream import read_complaint
from broker.dialects.sse import EventCutter, read_event
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
from workers.runtimes.families import TABLE
from workers.runtimes.llama_server import PROGRESS, probe_in
from workers.runtimes.process import occupied

if TYPE_CHECKING:
    from broker.policy import Model

LOOK_EVERY_S = 1.0
"""How often a load under way is looked at, where no event says that it moved."""

FULL_WAIT_S = 30.0
FULL_PAUSE_S = 2.0
UNLOAD_TIMEOUT_S = 30.0
UNLOAD_POLL_S = 0.25
NAMES_SHOWN = 8
WAKE_TIMEOUT_S = 3600.0
"""An upper bound: the limit of the load is usually less, and holds as well."""

_STATES: dict[str, State] = {"loaded": "loaded", "loading": "loading", "downloading": "loading"}


class LlamaRouter:
    """One model of a router, which may serve others beside it."""

    def __init__(self, name: str, model: "Model", *, url: str) -> None:
        self._title = f"model '{name}'"
        self._model = model.model
        self._id = model.model  # an alias leads to it
        self._url = url
        self._embeddings = model.embeddings
        self._client = client_for(url)
        self._progress: float | None = None
        self._slots = 0

    @property
    def kind(self) -> str:
        return "llama.cpp"

    @property
    def local(self) -> bool:
        return is_local(self._url)

    @property
    def manageable(self) -> bool:
        return True

    async def lacks(self) -> str:
        """The router is asked for the load: it says itself what it does not have."""
        return ""

    def turn(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def state(self) -> State:
        """Asks /models, the one question about a model that never loads it."""
        try:
            entry = await self._entry()
        except (httpx.HTTPError, TimeoutError, ValueError):
            return "unreachable"
        return _STATES.get(_value(entry), "absent")

    async def load(self, *, timeout_s: float) -> None:
        """Asks for the load and waits until the router says how it ended; it would end without us too."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._load()
                self._slots = len(await self._list_slots() or ())
        except TimeoutError:
            raise LoadFailed(
                f"{self._title}: the router at {self._url} did not load {self._model} within {timeout_s:g} s"
            ) from None
        except (httpx.HTTPError, ValueError) as error:
            raise LoadFailed(f"{self._title}: no router answers at {self._url}: {_words(error)}") from error
        finally:
            self._progress = None

    async def progress(self) -> float | None:
        """Gives what the router told last of a load that we wait for."""
        return self._progress

    async def unload(self) -> None:
        """Has the child stopped and waits until it is; one that loads is stopped too."""
        try:
            if _value(await self._entry()) in ("unloaded", "downloaded", ""):
                return
            answer = await self._client.post(f"{self._url}/models/unload", json={"model": self._model})
            if answer.status_code not in (200, 400):  # 400 = it does not run any more
                text = read_complaint(answer.content).message
                raise RuntimeProblem(f"{self._title}: the router did not unload {self._model}: {text}")
            give_up_at = time.monotonic() + UNLOAD_TIMEOUT_S
            while _value(await self._entry()) not in ("unloaded", "downloaded", ""):
                if time.monotonic() >= give_up_at:
                    raise RuntimeProblem(
                        f"{self._title}: the router still runs {self._model} {UNLOAD_TIMEOUT_S:g} s after its unload"
                    )
                await asyncio.sleep(UNLOAD_POLL_S)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            raise RuntimeUnreachable(f"{self._title}: no router answers at {self._url}: {_words(error)}") from error

    async def memory_bytes(self, *, of_gpus: bool = False) -> int | None:
        """Adds up the host memory of the model's child, which is found by its command line; None from elsewhere."""
        try:
            entry = await self._entry()
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        args = _status(entry).get("args")
        if not self.local or _value(entry) != "loaded" or not isinstance(args, list) or not args:
            return None
        return await asyncio.to_thread(_memory_of, [str(word) for word in args])

    async def file_bytes(self) -> int | None:
        """Looks at the file that the model's command line names; None where that is on another machine."""
        try:
            args = _status(await self._entry()).get("args")
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        if not self.local or not isinstance(args, list):
            return None
        return await asyncio.to_thread(_file_size, [str(word) for word in args])

    def process_ids(self) -> list[int]:
        return []

    def endpoint(self) -> Endpoint:
        extra = {} if self._embeddings else PROGRESS
        return Endpoint(self._url, model=self._model, slots=self._slots, query="autoload=false", extra=extra)

    async def probe(self, *, timeout_s: float, slot: int | None = None) -> float:
        """Times one token; refuses on a model that the probe itself would load or wake."""
        state = await self.state()
        if state == "unreachable":
            raise RuntimeUnreachable(f"{self._title}: no router answers at {self._url}")
        if state != "loaded":
            raise ProbeFailed(f"{self._title} is not loaded, and a probe must not load it")
        return await self._ask(self.endpoint(), timeout_s, slot)

    async def busy_slots(self) -> int | None:
        """Counts the slots at work; a model that is not loaded has none, and is not asked: asking would load it."""
        try:
            if _value(await self._entry()) != "loaded":
                return 0
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        slots = await self._list_slots()
        return None if slots is None else sum(1 for slot in slots if slot.get("is_processing"))

    async def close(self) -> None:
        """Closes our connections; the router and what it has loaded are left as they are."""
        await self._client.aclose()

    async def _load(self) -> None:
        async with self._news() as moved:
            value = _value(entry := await self._entry())
            if entry is None:
                raise LoadFailed(await self._unknown())
            if value == "sleeping":
                await self._wake()
                return
            if value not in ("loaded", "loading", "downloading"):
                await self._ask_for_load()
            while (value := _value(entry := await self._entry())) != "loaded":
                if value not in ("loading", "downloading"):
                    raise LoadFailed(f"{self._title}: the router could not load {self._model}{_reason(entry)}")
                moved.clear()
                try:
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await moved.wait()
                except TimeoutError:
                    continue

    async def _ask(self, endpoint: Endpoint, timeout_s: float, slot: int | None = None) -> float:
        """Asks for one token, or one vector, of the model."""
        if self._embeddings:
            return await probe_embedding(self._client, endpoint, timeout_s=timeout_s)
        return await probe_chat(self._client, endpoint, timeout_s=timeout_s, extra=probe_in(slot, self._slots))

    async def _wake(self) -> None:
        """Wakes a sleeping model by a generation, the only thing that does; the caller's timeout holds."""
        try:
            endpoint = Endpoint(self._url, model=self._model)
            await self._ask(endpoint, WAKE_TIMEOUT_S)
        except RuntimeProblem as error:
            raise LoadFailed(f"{self._title}: it sleeps and does not wake: {error}") from error

    async def _ask_for_load(self) -> None:
        """Asks until there is a place for it: a router holds so many models, and does not evict a busy one."""
        give_up_at = time.monotonic() + FULL_WAIT_S
        while True:
            answer = await self._client.post(f"{self._url}/models/load", json={"model": self._model})
            text = read_complaint(answer.content).message if answer.status_code != 200 else ""
            if answer.status_code == 200 or "already running" in text:
                return
            if "limit reached" not in text:
                raise LoadFailed(f"{self._title}: the router refused the load: {text}", looks_like_oom(text))
            if time.monotonic() >= give_up_at:
                raise LoadFailed(f"{self._title}: all models that the router may hold are busy: {text}")
            await asyncio.sleep(FULL_PAUSE_S)

    async def _unknown(self) -> str:
        names = [str(entry.get("id")) for entry in await self._entries()]
        shown = ", ".join(names[:NAMES_SHOWN]) + (" …" if len(names) > NAMES_SHOWN else "")
        return f"{self._title}: the router at {self._url} does not know {self._model}; it has {shown or 'no model'}"

    async def _list_slots(self) -> list[dict[str, Any]] | None:
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                answer = await self._client.get(
                    f"{self._url}/slots", params={"model": self._model, "autoload": "false"}
                )
            slots = answer.json()
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        return slots if answer.status_code == 200 and isinstance(slots, list) else None

    async def _entries(self) -> list[dict[str, Any]]:
        async with asyncio.timeout(STATE_TIMEOUT_S):
            answer = await self._client.get(f"{self._url}/models")
        answer.raise_for_status()
        told = answer.json()
        entries = told.get("data") if isinstance(told, dict) else None
        if not isinstance(entries, list):
            raise ValueError("the list of models cannot be read")
        return [entry for entry in entries if isinstance(entry, dict)]

    async def _entry(self) -> dict[str, Any] | None:
        entries = await self._entries()
        by_id = next((entry for entry in entries if entry.get("id") == self._model), None)
        entry = by_id or next((entry for entry in entries if self._model in (entry.get("aliases") or ())), None)
        self._id = str(entry.get("id")) if entry is not None else self._model
        return entry

    @asynccontextmanager
    async def _news(self) -> AsyncIterator[asyncio.Event]:
        """Listens to the router's events while the block runs; without them a load is only looked at less often."""
        moved = asyncio.Event()
        listener = asyncio.create_task(self._listen(moved), name=f"router events {self._model}")
        try:
            yield moved
        finally:
            listener.cancel()
            await asyncio.wait({listener})

    async def _listen(self, moved: asyncio.Event) -> None:
        cutter = EventCutter()
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        try:
            async with self._client.stream("GET", f"{self._url}/models/sse", timeout=timeout) as answer:
                if answer.status_code != 200:
                    return
                async for piece in answer.aiter_bytes():
                    for event in cutter.cut(piece).split(b"\n\n"):
                        self._hear(event, moved)
        except httpx.HTTPError:
            return

    def _hear(self, event: bytes, moved: asyncio.Event) -> None:
        """Takes one event in. Its name differs between versions, what it says does not."""
        try:
            told = json.loads(read_event(event).data or b"null")
        except ValueError:
            return
        if not isinstance(told, dict) or told.get("model") != self._id or not isinstance(told.get("data"), dict):
            return
        progress = told["data"].get("progress")
        share = progress.get("value") if isinstance(progress, dict) else progress
        if isinstance(share, int | float) and told["data"].get("status") == "loading":
            self._progress = min(1.0, max(0.0, float(share)))
        moved.set()


def _status(entry: dict[str, Any] | None) -> dict[str, Any]:
    status = (entry or {}).get("status")
    return status if isinstance(status, dict) else {}


def _value(entry: dict[str, Any] | None) -> str:
    return str(_status(entry).get("value") or "")


def _reason(entry: dict[str, Any] | None) -> str:
    status = _status(entry)
    if not status.get("failed"):
        return ": it was unloaded meanwhile"
    return f": its server ended with exit code {status.get('exit_code')}; the router's log says why"


def _words(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


def _memory_of(args: Sequence[str]) -> int | None:
    """Finds the one process with this command line, and adds up what it and its children occupy."""
    for process in psutil.process_iter():
        try:
            if process.cmdline() == args:
                return sum(map(occupied, TABLE.family(process.pid)))
        except psutil.Error:
            continue
    return None


def _file_size(args: Sequence[str]) -> int | None:
    for flag, value in pairwise(args):
        if flag in ("-m", "--model"):
            try:
                return Path(value).stat().st_size
            except OSError:
                return None
    return None
