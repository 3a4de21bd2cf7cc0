"""Asks a gateway over HTTP, for the commands that work from any teammate's machine: GATEWAY_URL, GATEWAY_KEY."""

import os
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from api.exit_codes import UNREACHABLE, USAGE, Failed, of_status
from api.listen import DEFAULT_URL
from broker.status import Snapshot

ANSWER_S_MAX = 10.0
REMEDY = "start `gateway up`, or set GATEWAY_URL to where it listens"


def gateway_url() -> str:
    """Where the gateway listens, as the environment says."""
    return os.environ.get("GATEWAY_URL", DEFAULT_URL).rstrip("/")


def connect(*, answer_s_max: float = ANSWER_S_MAX, connections_max: int = 100) -> httpx.AsyncClient:
    """A client of the gateway that the environment names, with the key that it holds. What no header can carry is a
    Failed that does not repeat it: a pipeline's log is read by many."""
    key = os.environ.get("GATEWAY_KEY", "").strip()  # a secret out of a file ends with a line feed, mostly
    if not fits_header(key):
        raise Failed("GATEWAY_KEY holds characters that no key has.", USAGE)
    return httpx.AsyncClient(
        timeout=httpx.Timeout(answer_s_max, connect=ANSWER_S_MAX, pool=None),
        limits=httpx.Limits(max_connections=connections_max, max_keepalive_connections=connections_max),
        headers={"authorization": f"Bearer {key}"} if key else {},
        trust_env=not _is_loopback(gateway_url()),
    )


async def ask(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Gives what the gateway answers within ANSWER_S_MAX; whatever it refuses becomes its own sentence."""
    url = gateway_url()
    try:
        async with connect() as client:
            response = await client.request(method, url + path, json=body)
        told = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        raise unreachable(str(problem)) from None
    except ValueError:
        raise no_gateway() from None
    if response.is_error:
        error = told.get("error") if isinstance(told, dict) else None
        sentence = error.get("message") if isinstance(error, dict) else None
        if not isinstance(sentence, str):
            sentence = f"{url} says {response.status_code}."
        raise Failed(with_remedy(sentence, response.status_code), of_status(response.status_code))
    if not isinstance(told, dict):
        raise no_gateway()
    return told


def with_remedy(sentence: str, status: int) -> str:
    """A refusal in the gateway's words, with what whoever types a command can do about it."""
    if status != 401:
        return sentence
    holds_one = os.environ.get("GATEWAY_KEY", "").strip()
    return f"{sentence} ({'it' if holds_one else 'a command sends what'} stands in GATEWAY_KEY)"


def snapshot_of(told: dict[str, Any]) -> Snapshot:
    """Reads what /v1/status says; raises Failed where it is another program that said it."""
    try:
        return Snapshot.from_json(told)
    except ValueError:
        raise no_gateway() from None


def unreachable(why: str) -> Failed:
    """Says that nobody answers."""
    return Failed(f"The gateway at {gateway_url()} can't be reached ({why or 'no answer'}): {REMEDY}.", UNREACHABLE)


def no_gateway() -> Failed:
    """Says that somebody else answers."""
    return Failed(f"What answers at {gateway_url()} is no warmlane gateway: {REMEDY}.", UNREACHABLE)


def fits_header(text: str) -> bool:
    """Whether a header can carry it: ASCII without control characters."""
    return text.isascii() and text.isprintable()


def part(name: str) -> str:
    """Writes a name as one part of a path, whatever is in it."""
    return quote(name, safe="")


def _is_loopback(url: str) -> bool:
    """Whether a proxy of the environment has no business between us and this address."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False  # whoever uses it says what is wrong with it
    return host == "localhost" or host == "::1" or host.startswith("127.")
