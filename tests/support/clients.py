"""Clients as teammates use them: the stock OpenAI SDK with its attempts counted, and one that keeps every byte."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

PATIENCE_S = 60.0


class Attempts(list[float]):
    """The instants at which an SDK sent a request, its own retries included."""

    def note(self, _request: httpx.Request) -> None:
        self.append(time.monotonic())

    async def note_async(self, _request: httpx.Request) -> None:
        self.append(time.monotonic())


@contextmanager
def sdk(url: str, *, attempts: Attempts | None = None, **more: Any) -> Iterator[openai.OpenAI]:
    """The synchronous OpenAI client, pointed at a gateway and otherwise as it comes."""
    hooks = {"request": [attempts.note]} if attempts is not None else {}
    with (
        httpx.Client(event_hooks=hooks, timeout=PATIENCE_S) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", http_client=http, **more) as client,
    ):
        yield client


@asynccontextmanager
async def async_sdk(url: str, *, attempts: Attempts | None = None, **more: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The asynchronous one."""
    hooks = {"request": [attempts.note_async]} if attempts is not None else {}
    async with (
        httpx.AsyncClient(event_hooks=hooks, timeout=PATIENCE_S) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", http_client=http, **more) as client,
    ):
        yield client
    gc.collect()  # the SDK leaves the generators of its streams to the collector, which then needs the loop
    await asyncio.sleep(0.01)


def user(said: str) -> list[Any]:
    """A conversation of one message."""
    return [{"role": "user", "content": said}]


def text_of(chunks: Iterable[Any]) -> str:
    """The words of an answer, from the SDK's chunks."""
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


async def heard_out(stream: Any) -> list[Any]:
    """Every chunk of an asynchronous stream, which is then closed; nothing of it is left to be tidied up later."""
    async with stream:
        return [chunk async for chunk in stream]


@dataclass
class Told:
    """What one client was told, and when; instants are of `time.monotonic()`."""

    asked: dict[str, Any]
    job_id: str = ""
    status: int = 0
    retry_after: str = ""
    text: str = ""
    finish: str = ""
    done: bool = False
    error: dict[str, Any] = field(default_factory=dict)
    cut: str = ""
    started_at: float = 0.0
    content_at: float = 0.0
    ended_at: float = 0.0

    @property
    def stream(self) -> bool:
        return bool(self.asked.get("stream"))

    @property
    def served(self) -> bool:
        """A whole answer that says so itself."""
        return self.status == 200 and bool(self.finish) and not self.error and not self.cut

    @property
    def saw_some(self) -> bool:
        return bool(self.text)

    @property
    def code(self) -> str:
        return str(self.error.get("code") or "")

    @property
    def outcome(self) -> str:
        """One word: served, refused, told (in-band), cut, or silent for an end that says nothing."""
        if self.served:
            return "served"
        if self.error:
            return "refused" if self.status != 200 else "told"
        return "cut" if self.cut else "silent"


async def ask(http: httpx.AsyncClient, url: str, body: dict[str, Any], **headers: str) -> Told:
    """Sends one chat request without any retry, and reads whatever comes to its end; never raises for what it hears."""
    told = Told(body, started_at=time.monotonic())
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body, headers=sent) as response:
            told.status = response.status_code
            told.job_id = response.headers.get("x-gateway-job", "")
            told.retry_after = response.headers.get("retry-after", "")
            if response.status_code == 200 and told.stream:
                await _read_stream(told, response)
            else:
                _read_object(told, await response.aread())
    except httpx.HTTPError as problem:
        told.cut = f"{type(problem).__name__}: {problem}"
    finally:
        told.ended_at = time.monotonic()
    return told


async def _read_stream(told: Told, response: httpx.Response) -> None:
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data == line:
            assert not line or line.startswith(":"), f"no line of a chat stream: {line!r}"
        elif data == "[DONE]":
            told.done = True
        else:
            _read_chunk(told, json.loads(data))


def _read_chunk(told: Told, chunk: dict[str, Any]) -> None:
    assert not told.done, f"something came after the end: {chunk}"
    if "error" in chunk:
        told.error = chunk["error"]
        return
    assert not told.error, f"something came after an error: {chunk}"
    for choice in chunk["choices"]:
        if piece := choice["delta"].get("content"):
            told.text += piece
            told.content_at = time.monotonic()
        told.finish = choice.get("finish_reason") or told.finish


def _read_object(told: Told, body: bytes) -> None:
    answer = json.loads(body)
    if "error" in answer:
        told.error = answer["error"]
        return
    choice = answer["choices"][0]
    told.text, told.finish = choice["message"]["content"], choice["finish_reason"]


@dataclass(frozen=True)
class Event:
    """One server-sent event of a job."""

    id: str
    name: str
    data: dict[str, Any]


async def follow(
    http: httpx.AsyncClient, url: str, job_id: str, *, after: str = "", cut_after: int | None = None
) -> list[Event]:
    """Follows a job's events, from after an id; hangs up after so many of them if told to."""
    headers = {"last-event-id": after} if after else {}
    events: list[Event] = []
    async with http.stream("GET", f"{url}/v1/jobs/{job_id}/events", headers=headers) as response:
        if response.status_code == 204:
            return events
        assert response.status_code == 200, await response.aread()
        found: dict[str, str] = {}
        async for line in response.aiter_lines():
            if line:
                name, _, value = line.partition(":")
                found[name] = value.strip()
                continue
            if "data" in found:
                events.append(Event(found.get("id", ""), found["event"], json.loads(found["data"])))
                if cut_after is not None and len(events) >= cut_after:
                    break
            found = {}
    return events


async def gather_bounded(*asks: Any, timeout_s: float) -> list[Any]:
    """Waits for all of them, and for no longer than that."""
    async with asyncio.timeout(timeout_s):
        return list(await asyncio.gather(*asks))
