"""The jobs of a gateway, from a client's side: hand in, look, wait, follow, fetch. No terminal.

Whatever can go wrong is one of three: nobody answers (`Away`), not now (`Busy`), or no (`Refusal`). The first two are
worth another try, and every call here may be made again: a submit by its key, the rest by its nature. An address where
no gateway can be is a `Failed` at once.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

import httpx

from api.client import connect, gateway_url, no_gateway, part, unreachable, with_remedy

POLL_S: Final = 30
"""How long one look waits at the gateway for the job's end."""
ANSWER_S_MAX: Final = POLL_S + 15.0
"""A gateway that says nothing for so long is away; on a stream it says something every few seconds."""


class Away(Exception):
    """Nobody answers, or somebody between us says that nobody does."""


class Busy(Exception):
    """Not now: come back after `retry_after_s`."""

    def __init__(self, sentence: str, retry_after_s: float) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Refusal(Exception):
    """No, with the gateway's own status, code and sentence; `told` is the whole object."""

    def __init__(self, status: int, code: str, sentence: str, told: Any) -> None:
        super().__init__(sentence)
        self.status, self.code, self.told = status, code, told


@dataclass(frozen=True)
class Result:
    """What a job ended with: the endpoint's own answer, or its own error with its own status."""

    status: int
    body: Any

    @property
    def good(self) -> bool:
        return self.status < 400


@dataclass(frozen=True)
class Event:
    """One event of a job's stream: `frame`, `end`, `restarted` or `gone`."""

    name: str
    id: str
    said: dict[str, Any]


class JobsClient:
    """Calls that may fail with Away, Busy, Refusal."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def submit(self, order: dict[str, Any] | bytes, *, key: str) -> dict[str, Any]:
        """Hands a job in, or finds the one that the key leads to."""
        content = order if isinstance(order, bytes) else json.dumps(order).encode()
        headers = {"content-type": "application/json", "idempotency-key": key}
        return await self._object("POST", "/v1/jobs", content=content, headers=headers)

    async def look(self, job_id: str, *, wait_s: float = 0) -> dict[str, Any]:
        """How a job stands, once it has ended or `wait_s` are over."""
        wait = f"?wait={max(1, round(wait_s))}s" if wait_s else ""
        return await self._object("GET", f"/v1/jobs/{part(job_id)}{wait}")

    async def page(self, **filters: Any) -> dict[str, Any]:
        """One page of the caller's jobs, newest first."""
        question = urlencode({name: value for name, value in filters.items() if value})
        return await self._object("GET", "/v1/jobs" + (f"?{question}" if question else ""))

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancels a job; one that has ended stays as it ended."""
        return await self._object("DELETE", f"/v1/jobs/{part(job_id)}")

    async def retry(self, job_id: str) -> dict[str, Any]:
        """Hands the request of a job that ended badly in once more; gives the new job."""
        return await self._object("POST", f"/v1/jobs/{part(job_id)}/retry")

    async def let_go(self, job_id: str) -> None:
        """Takes out the dead letter of a job, if there is one."""
        try:
            await self._object("DELETE", f"/v1/dead/{part(job_id)}")
        except Refusal as refusal:
            if refusal.code != "letter_not_found":
                raise

    async def result(self, job_id: str) -> Result:
        """What an ended job ended with."""
        response = await self._asked("GET", f"/v1/jobs/{part(job_id)}/result")
        told = _json(response)
        if response.is_error and "x-gateway-job" not in response.headers:  # it is not the job that says so
            raise _refusal(response, told)
        if told is None:
            raise no_gateway()
        return Result(response.status_code, told)

    @asynccontextmanager
    async def events(self, job_id: str, after: str = "") -> AsyncIterator[AsyncIterator[Event]]:
        """A job's stream from behind the frame `after`; where it breaks off before `end` or `gone` it is Away."""
        headers = {"last-event-id": after} if after else {}
        try:
            async with self._http.stream(
                "GET", f"{gateway_url()}/v1/jobs/{part(job_id)}/events", headers=headers
            ) as response:
                if response.is_error:
                    await response.aread()
                    raise _refusal(response, _json(response))
                yield _events(response)
        except (httpx.HTTPError, httpx.InvalidURL) as problem:
            raise _away(problem) from None

    async def _object(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        response = await self._asked(method, path, **more)
        told = _json(response)
        if response.is_error:
            raise _refusal(response, told)
        if not isinstance(told, dict):
            raise no_gateway()
        return told

    async def _asked(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            return await self._http.request(method, gateway_url() + path, **more)
        except (httpx.HTTPError, httpx.InvalidURL) as problem:
            raise _away(problem) from None


@asynccontextmanager
async def jobs_client(*, connections_max: int = 10) -> AsyncIterator[JobsClient]:
    """A client of the gateway that the environment names, for as long as the block."""
    async with connect(answer_s_max=ANSWER_S_MAX, connections_max=connections_max) as http:
        yield JobsClient(http)


def code_of(told: Any) -> str:
    """The stable code in an error object of any dialect, "" without one."""
    if not isinstance(told, dict):
        return ""
    error = told.get("error")
    return str((error if isinstance(error, dict) else told).get("code") or "")


def param_of(told: Any) -> str:
    """What of the request an error object is about, "" where it does not say."""
    error = told.get("error") if isinstance(told, dict) else None
    return str(error.get("param") or "") if isinstance(error, dict) else ""


def sentence_of(told: Any) -> str:
    """The words in an error object of any dialect, "" without any."""
    error = told.get("error") if isinstance(told, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else error if isinstance(error, str) else ""


async def _events(response: httpx.Response) -> AsyncIterator[Event]:
    fields: dict[str, str] = {}
    async for line in _lines(response):
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif "event" in fields:
            event = Event(fields["event"], fields.get("id", ""), json.loads(fields.get("data") or "{}"))
            yield event
            if event.name in ("end", "gone"):
                return
            fields = {}
    if response.status_code != 204:  # all of it was seen before
        raise Away("the stream broke off")


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines end with a line feed here, and with nothing else: httpx's own end at whatever Unicode calls one."""
    left = ""
    async for piece in response.aiter_text():
        *lines, left = (left + piece).split("\n")
        for line in lines:
            yield line


def _refusal(response: httpx.Response, told: Any) -> Exception:
    sentence = sentence_of(told) or f"{gateway_url()} answers {response.status_code}"
    after = response.headers.get("retry-after", "")
    if response.status_code in (429, 503) and (told is not None or after):
        return Busy(sentence, float(after) if re.fullmatch(r"\d{1,9}", after) else 1.0)
    if not code_of(told):  # a proxy that finds no gateway behind it, or somebody else's server
        return Away(sentence) if response.status_code >= 500 else no_gateway()
    return Refusal(response.status_code, code_of(told), with_remedy(sentence, response.status_code), told)


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _away(problem: Exception) -> Exception:
    why = str(problem) or type(problem).__name__
    hopeless = isinstance(problem, httpx.InvalidURL | httpx.UnsupportedProtocol)
    return unreachable(why) if hopeless else Away(why)
