"""The response object, and the events around it, in the bytes that the gateway sends.

Every event is `event: TYPE`, then one line that begins with its type and its sequence number: the api finds and
changes the number there without reading the rest, because it says events of its own between a worker's.
"""

import re
from typing import Any, Final

from broker.dialects import json_splice
from broker.errors import BadRequest

CREATED: Final = "response.created"
IN_PROGRESS: Final = "response.in_progress"
QUEUED: Final = "response.queued"
FAILED: Final = "response.failed"

NUMBER: Final = re.compile(rb'^(data: \{"type":"[^"]*","sequence_number":)(\d+)', re.MULTILINE)
"""Where an event has its number, as `event` writes it."""

_ECHOED: Final = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
    "user",
)
_DEFAULTS: Final[dict[str, Any]] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "reasoning": {"effort": None, "summary": None},
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "temperature": None,
    "top_p": None,
}
_LARGE: Final[dict[str, Any]] = {"instructions": None, "tools": []}
_CROCKFORD: Final = {sign: value for value, sign in enumerate("0123456789ABCDEFGHJKMNPQRSTVWXYZ")}


class ResponseObject:
    """The response of one job in each of its states. Its id and its time are the job's, so that every part of the
    gateway, and every attempt, makes the same ones."""

    def __init__(self, body: bytes, *, job_id: str, model: str) -> None:
        try:
            request = {member.key: member.value for member in json_splice.scan(body)} if body else {}
        except BadRequest:
            request = {}
        echoed = {key: request[key] for key in _ECHOED if request.get(key) is not None}
        self.id = f"resp_{job_id}"
        self.created_at = created_s(job_id)
        self._base: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": "in_progress",
            "background": request.get("background") is True,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "parallel_tool_calls": request.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "store": request.get("background") is True,  # nothing else is kept
            "truncation": "disabled",
            "usage": None,
            **_DEFAULTS,
            **echoed,
        }
        asked = self._base["reasoning"]
        self.wants_summary = isinstance(asked, dict) and bool(asked.get("summary") or asked.get("generate_summary"))

    def state(self, status: str, **changes: Any) -> dict[str, Any]:
        """Gives the whole object in a state."""
        return self._base | {"status": status} | changes

    def slim(self) -> dict[str, Any]:
        """Gives it while it runs, for an event that is said again and again: without what may be very large."""
        return self._base | _LARGE


def event(kind: str, number: int, **fields: Any) -> bytes:
    """Writes one event."""
    rest = json_splice.encode(fields)[1:]
    comma = b"," if fields else b""
    return b'event: %s\ndata: {"type":"%s","sequence_number":%d%s%s\n\n' % (
        kind.encode(),
        kind.encode(),
        number,
        comma,
        rest,
    )


def created_s(job_id: str) -> int:
    """Reads the second in which a job was made out of its id, of a batch's line that of the batch; 0 where the id holds
    no ULID."""
    ulid = job_id.removeprefix("batch_").partition("-")[0]
    stamp = ulid[:10].upper()
    if len(ulid) != 26 or not all(sign in _CROCKFORD for sign in stamp):
        return 0
    ms = 0
    for sign in stamp:
        ms = ms * 32 + _CROCKFORD[sign]
    return ms // 1000
