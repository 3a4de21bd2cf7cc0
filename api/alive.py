"""`gateway alive PART`: whether a part of this machine works, for the health checks of containers and supervisors.

It runs every few seconds beside the models, so it imports hardly anything: `api/entry` comes here past the rest.
"""

import http.client
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from api.listen import DEFAULT_BIND, reached_at
from api.state_dir import where
from broker import alive

PARTS: Final = ("api", "scheduler", "worker")
ASK_S_MAX: Final = 3.0

ALIVE, NOT_ALIVE = 0, 1


def tell(part: str, environ: Mapping[str, str], *, data: Path | None = None) -> int:
    """Gives the exit code, and says on stderr why a part is not alive."""
    if problem := why_not(part, environ, data=data):
        print(problem, file=sys.stderr)
        return NOT_ALIVE
    return ALIVE


def why_not(part: str, environ: Mapping[str, str], *, data: Path | None = None) -> str:
    """Why a part of this machine is not alive, by the settings that it was started with; "" where it is. `data` is
    the state directory, where it does not stand in the environment."""
    if part == "api":
        return _ask_api(environ.get("GATEWAY_BIND") or _bind_of(environ.get("GATEWAY_URL", "")) or DEFAULT_BIND)
    given = environ.get("GATEWAY_STATE_DIR", "")
    return alive.why_not(where(data or (Path(given) if given else None), environ), part, now_s=time.monotonic())


def _bind_of(url: str) -> str:
    """Where the api listens by a URL such as `gateway up` prints; "" by one that a proxy answers, or none."""
    at = url.removeprefix("http://").rstrip("/")
    return at if url.startswith("http://") and at.rpartition(":")[2].isdecimal() else ""


def _ask_api(bind: str) -> str:
    host, _, port = bind.rpartition(":")
    if not host or not port.isdecimal():
        return f"GATEWAY_BIND is {bind!r}, which is no host and port"
    connection = http.client.HTTPConnection(reached_at(host.strip("[]")), int(port), timeout=ASK_S_MAX)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as problem:
        return f"the api at {bind} does not answer: {problem}"
    finally:
        connection.close()
    return "" if status == 200 else f"the api at {bind} answers {status}"
