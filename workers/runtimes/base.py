"""What every runtime can do, how it fails, and the probe that proves a first token.

The clients made here are for loads, probes and questions about state. Answers for users travel on the token path's
own client: a slow probe must never hold a connection that a user's tokens need.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import httpx

from broker.dialects.openai_embeddings import PATH as EMBEDDINGS
from broker.dialects.openai_embeddings import EmbeddingReader
from broker.dialects.openai_stream import ChatReader, read_complaint
from broker.policy.content import is_loopback

State = Literal["absent", "loading", "loaded", "unreachable"]

CONNECT_TIMEOUT_S = 2.0
STATE_TIMEOUT_S = 2.0
PROBE_DRAIN_S = 1.0

_OUT_OF_MEMORY = re.compile(
    r"out of (device |system |host )?memory|OutOfDeviceMemory|OutOfHostMemory|cudaMalloc failed|std::bad_alloc"
    r"|(failed|unable|cannot) to allocate|cannot allocate memory|requires more (system )?memory",
    re.IGNORECASE,
)


class RuntimeProblem(Exception):
    """A runtime could not do what we asked; the message is one sentence for the operator."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class LoadFailed(RuntimeProblem):
    """The model did not load; `oom` tells that memory was the reason."""

    def __init__(self, sentence: str, oom: bool = False) -> None:
        super().__init__(sentence)
        self.oom = oom


class RuntimeUnreachable(RuntimeProblem):
    """Nobody answers at the runtime's address."""


class ProbeFailed(RuntimeProblem):
    """The runtime answered, but produced no token."""


class ProbeRefused(ProbeFailed):
    """The runtime refused the probe with a status of its own."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"the probe was answered {status}: {words}")
        self.status = status
        self.words = words


@dataclass(frozen=True)
class Endpoint:
    """Where generations go (`POST {base_url}/v1/chat/completions`) and under which model name."""

    base_url: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)  # may hold a key
    model: str = ""
    slots: int = 0
    """How many slots a request may name by `id_slot`; 0 = the runtime chooses."""
    key_env: str = ""
    """The environment variable whose value is in the headers; errors name it and never what is in it."""
    metered: bool = False
    """Each token costs money: no probe but the one that a wake needs."""
    query: str = ""
    drops: frozenset[str] = frozenset()
    """Keys of a request that the runtime must not see."""

    extra: Mapping[str, object] = field(default_factory=dict)
    """Keys that every request carries."""

    speaks: frozenset[str] = frozenset()
    """Endpoints of other dialects than OpenAI's that it answers itself."""

    knows_continue: bool = True
    """Whether `continue_final_message` tells it to go on with an answer; else a last message of the assistant does."""

    tokenizer: Literal["", "llama", "vllm"] = ""
    """How it is asked for the tokens of a prompt; "" = it cannot be."""

    def path(self, path: str) -> str:
        """Gives the path of a request, with what the runtime must be told beside its body."""
        return f"{path}?{self.query}" if self.query else path


class Runtime(Protocol):
    """One model on one runtime, as the waker and the attempts see it."""

    @property
    def kind(self) -> str:
        """The backend's word in the policy file: such as "llama.cpp" or "ollama"."""

    @property
    def local(self) -> bool:
        """Whether the memory it takes is this host's: not so for a url elsewhere or a provider."""

    @property
    def manageable(self) -> bool:
        """Whether we can load and unload it; where only the runtime itself can tell, False until it was asked."""

    async def state(self) -> State:
        """Tells where the model is, within 2 s; never loads it and never wakes it."""

    async def lacks(self) -> str:
        """Says in a sentence what is not there without which a load must fail, such as its file, "" = nothing that we
        could tell without asking for the load; takes no time, so that nobody makes room for such a load."""

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Waits until the runtime would start on a load at once; to be held while it loads. Ollama loads one model at
        a time, and what it keeps in line has not begun: its time must not run yet."""

    async def load(self, *, timeout_s: float) -> None:
        """Returns when the runtime calls the model loaded, no proof of warmth; cancelling abandons the load."""

    async def progress(self) -> float | None:
        """Tells how much of a load under way is done, 0 to 1, by the runtime's own word; None = it can't tell."""

    async def unload(self) -> None:
        """Gives the model's memory back."""

    async def memory_bytes(self, *, of_gpus: bool = False) -> int | None:
        """Tells what the loaded model occupies, in bytes; None = the runtime can't tell. `of_gpus` = only what of it
        lies in the GPUs' memory, where the runtime tells that apart."""

    async def file_bytes(self) -> int | None:
        """Tells the size of the model's file, without loading it; None = it can't tell."""

    def process_ids(self) -> list[int]:
        """Lists the processes of ours that hold the model in their memory; empty where they are not ours."""

    def endpoint(self) -> Endpoint:
        """Tells where generations go; on a runtime we start ourselves the port changes with every load."""

    async def probe(self, *, timeout_s: float, slot: int | None = None) -> float:
        """Asks for one token and returns the ms to its first content; takes a slot, so only on an idle model: this one,
        where the runtime lets slots be named, or it might choose one that has somebody's prompt in its cache."""

    async def busy_slots(self) -> int | None:
        """Tells how many generations the runtime itself says are running; None = it can't tell. At most every 2 s."""

    async def close(self) -> None:
        """Stops what we started and closes our connections; an external server is left as it is."""


KEY_REFUSED = (401, 403)


def refusal_words(endpoint: Endpoint, status: int, words: str) -> str:
    """Says why a provider refused. A provider that refuses a key often repeats parts of it: its words are left out
    then, and wherever the key stands in them."""
    if status in KEY_REFUSED and endpoint.key_env:
        return f"the provider refused the key that is in {endpoint.key_env} ({status})"
    return f"the provider answered {status}: {without_key(endpoint, words)}"


def without_key(endpoint: Endpoint, words: str) -> str:
    """Blots the key out of what a provider said."""
    key = endpoint.headers.get("Authorization", "").removeprefix("Bearer ")
    return words.replace(key, "***") if key else words


def client_for(url: str) -> httpx.AsyncClient:
    """Makes one runtime's own client: nothing shared, no proxy from the environment between us and a loopback port."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(STATE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        # llama-server promises keep-alive and then closes after every streamed answer, so that the next request on
        # the same connection may be lost. A new connection each time costs nothing at our rates.
        limits=httpx.Limits(max_keepalive_connections=0),
        verify=url.startswith("https:"),  # Reading the CA bundle takes 50 ms and only https needs it.
        trust_env=False,
    )


def is_local(url: str) -> bool:
    """Tells whether an address is on this host, without asking any name server."""
    return is_loopback(url)


def looks_like_oom(text: str) -> bool:
    """Tells whether a runtime's message says that memory ran out."""
    return _OUT_OF_MEMORY.search(text) is not None


async def probe_chat(
    client: httpx.AsyncClient, endpoint: Endpoint, *, timeout_s: float, extra: Mapping[str, object] | None = None
) -> float:
    """Streams a one-token chat generation and returns the ms until its first content piece."""
    body: dict[str, object] = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(extra or {}),
    }
    url = endpoint.base_url + endpoint.path("/v1/chat/completions")
    body = {key: value for key, value in body.items() if value is not None}
    timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
    started = time.perf_counter()
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream("POST", url, json=body, headers=endpoint.headers, timeout=timeout) as response,
        ):
            if response.status_code != 200:
                complaint = read_complaint(await response.aread())
                raise ProbeRefused(response.status_code, complaint.message)
            pieces = response.aiter_bytes()
            await _first_token(pieces)
            elapsed_ms = (time.perf_counter() - started) * 1000
            await _drain(pieces)
            return elapsed_ms
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise RuntimeUnreachable(f"nobody answers at {endpoint.base_url}: {error}") from error
    except (TimeoutError, httpx.TimeoutException) as error:
        raise ProbeFailed(f"the probe got no token within {timeout_s:g} s") from error
    except httpx.HTTPError as error:
        raise ProbeFailed(f"the probe broke off before its first token: {type(error).__name__} {error}") from error


async def probe_embedding(
    client: httpx.AsyncClient, endpoint: Endpoint, *, timeout_s: float, extra: Mapping[str, object] | None = None
) -> float:
    """Asks for one vector and returns the ms until it is there: the first token of an embedding model."""
    body: dict[str, object] = {"model": endpoint.model, "input": "Hi", **(extra or {})}
    url = endpoint.base_url + endpoint.path(EMBEDDINGS)
    timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
    started = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            response = await client.post(url, json=body, headers=endpoint.headers, timeout=timeout)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise RuntimeUnreachable(f"nobody answers at {endpoint.base_url}: {error}") from error
    except (TimeoutError, httpx.TimeoutException) as error:
        raise ProbeFailed(f"the probe got no vector within {timeout_s:g} s") from error
    except httpx.HTTPError as error:
        raise ProbeFailed(f"the probe broke off before its vector: {type(error).__name__} {error}") from error
    elapsed_ms = (time.perf_counter() - started) * 1000
    if response.status_code != 200:
        raise ProbeRefused(response.status_code, read_complaint(response.content).message)
    reader = EmbeddingReader("probe")
    reader.feed(response.content)
    reader.end()
    if reader.error is not None:
        raise ProbeFailed(f"the probe got no vector: {reader.error}")
    return elapsed_ms


async def _first_token(pieces: AsyncIterator[bytes]) -> None:
    """Waits for the first content, or for the runtime's own count of one token that has no text of its own.

    A reasoning model's first token is often a marker that the server swallows (`<think>`), so that a one-token answer
    ends without content. Its usage or timings still prove that a token was made; a finish without them proves nothing.
    """
    reader = ChatReader("probe", include_usage=True)
    async for piece in pieces:
        reader.feed(piece)
        if reader.has_content:
            return
        if reader.error is not None:
            break
    reader.end()
    if reader.error is not None:
        raise ProbeFailed(f"the probe got an error instead of a token: {reader.error}")
    if not (reader.usage or {}).get("completion_tokens"):
        raise ProbeFailed("the probe's answer ended without a token")


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    """Reads a one-token stream to its end, so that the slot is freed at once and not by noticing a hang-up."""
    try:
        async with asyncio.timeout(PROBE_DRAIN_S):
            async for _ in pieces:
                pass
    except (TimeoutError, httpx.HTTPError, httpx.StreamError):
        pass  # The token has been seen; what follows it is not the probe's business.
