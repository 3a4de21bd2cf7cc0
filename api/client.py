"""Asks a gateway over HTTP, for the commands that work from any teammate's machine: GATEWAY_URL, GATEWAY_KEY."""

import os
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from api.cli_policy import UNREACHABLE, Failed
from api.listen import DEFAULT_URL

ANSWER_S_MAX = 10.0
REMEDY = "start `gateway up`, or set GATEWAY_URL to where it listens"


def gateway_url() -> str:
    """Where the gateway listens, as the environment says."""
    return os.environ.get("GATEWAY_URL", DEFAULT_URL).rstrip("/")


async def ask(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Gives what the gateway answers within ANSWER_S_MAX; whatever it refuses becomes its own sentence."""
    url = gateway_url()
    key = os.environ.get("GATEWAY_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with httpx.AsyncClient(timeout=ANSWER_S_MAX, headers=headers, trust_env=not _is_loopback(url)) as client:
            response = await client.request(method, url + path, json=body)
        told = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        why = str(problem) or "no answer"
        raise Failed(f"The gateway at {url} can't be reached ({why}): {REMEDY}.", UNREACHABLE) from None
    except ValueError:
        raise Failed(f"What answers at {url} is no warmlane gateway: {REMEDY}.", UNREACHABLE) from None
    if response.is_error:
        error = told.get("error") if isinstance(told, dict) else None
        raise Failed(error["message"] if isinstance(error, dict) else f"{url} says {response.status_code}.")
    if not isinstance(told, dict):
        raise Failed(f"What answers at {url} is no warmlane gateway: {REMEDY}.", UNREACHABLE)
    return told


def part(name: str) -> str:
    """Writes a name as one part of a path, whatever is in it."""
    return quote(name, safe="")


def _is_loopback(url: str) -> bool:
    """Whether a proxy of the environment has no business between us and this address."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host == "::1" or host.startswith("127.")
