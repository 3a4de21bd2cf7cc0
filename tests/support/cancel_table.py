"""The table of cancels: which request is left in which state by which way, and how its end sounds in each dialect.

The endpoints and the ways in which a runtime is asked come from the tables of the product. What cannot be is a row of
`IMPOSSIBLE`, with its reason.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from broker.capabilities import EMBEDDING_ENDPOINTS
from tests.support.live_api import SDK
from workers.asking import OWN, THROUGH
from workers.runtimes import ollama, vllm

GRACE_S = 1.5
"""Longer than a cancel may take, so that one at once is never taken for one whose grace has passed."""

HOLD_S = 2.0
"""After so long a client is told to wait instead of being answered; a cell that wants a status is far quicker."""


def _talk(said: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": said}]}


ASKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/chat/completions": _talk,
    "/v1/completions": lambda said: {"prompt": said},
    "/v1/responses": lambda said: {"input": said},
    "/v1/messages": lambda said: {"max_tokens": 9, **_talk(said)},
    "/api/chat": _talk,
    "/api/generate": lambda said: {"prompt": said},
    "/v1/embeddings": lambda said: {"input": said},
    "/api/embed": lambda said: {"input": said},
    "/api/embeddings": lambda said: {"prompt": said},
}
"""What is asked at each endpoint, beside its model and whether it is to stream."""

NO_GENERATION = {"/v1/messages/count_tokens"}
"""It is answered at once, by the gateway itself."""

STATES = ("queued", "claimed", "prefill", "streaming")
"""In its lane; with the runtime, which has sent no byte; after its headers and before any content; after some of it."""


@dataclass(frozen=True)
class End:
    """How a client leaves its job."""

    headers: dict[str, str] = field(default_factory=dict)
    delete: bool = False
    told: bool = False  # only once it has been told to wait
    may_retry: bool = False
    keep: bool = False


KEY: dict[str, str] = {"idempotency_key": "{cell}"}
ENDS = {
    "DELETE": End(delete=True),
    "DELETE, told to wait": End(delete=True, told=True),
    "hang-up": End(),
    "hang-up, key": End(KEY, may_retry=True),
    "hang-up, SDK": End(SDK, may_retry=True),
    "hang-up, cancel": End({**KEY, **SDK, "x_gateway_on_disconnect": "cancel"}),
    "hang-up, keep": End({"x_gateway_on_disconnect": "keep"}, keep=True),
}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    path: str
    own: bool  # the runtime speaks the dialect
    stream: bool
    state: str
    way: str

    @property
    def name(self) -> str:
        """Also what its request is known by at the runtime."""
        how = f"{'own' if self.own else 'through'}.{'stream' if self.stream else 'whole'}"
        return ".".join(
            (self.path.strip("/").replace("/", "-"), how, self.state, self.way.replace(",", "").replace(" ", "-"))
        )

    @property
    def end(self) -> End:
        return ENDS[self.way]

    @property
    def vectors(self) -> bool:
        return self.path in EMBEDDING_ENDPOINTS

    @property
    def heard_some(self) -> bool:
        """Whether the client has content: no retry could take that up."""
        return self.stream and self.state == "streaming"

    @property
    def grace_s(self) -> float:
        """How long the job is kept for a retry."""
        return GRACE_S if self.end.may_retry and not self.heard_some else 0.0

    @property
    def double(self) -> str:
        """Which runtime is asked."""
        if not self.own or self.path not in THROUGH:
            return "llama vectors" if self.vectors else "llama"
        if self.path in vllm.SPEAKS:
            return "vllm"
        assert self.path in ollama.SPEAKS, f"no runtime speaks {self.path}"
        return "ollama vectors" if self.vectors else "ollama"


IMPOSSIBLE: dict[str, Callable[[Cell], bool]] = {
    "vectors come whole: there is no stream of them": lambda cell: cell.vectors and cell.stream,
    "vectors come whole: no first token is written before the end": lambda cell: (
        cell.vectors and not cell.stream and cell.state == "streaming"
    ),
    "who reads its answer is not told to wait": lambda cell: cell.heard_some and cell.end.told,
}


def table() -> list[Cell]:
    """Every combination."""
    ways = [(path, True) for path in OWN] + [(path, False) for path in THROUGH]
    return [
        Cell(path, own, stream, state, end)
        for path, own in ways
        for stream in (True, False)
        for state in STATES
        for end in ENDS
    ]


def cells() -> list[Cell]:
    """Every combination that can be, mixed: those that wait for their grace are not all at it at once."""
    possible = [cell for cell in table() if not any(reason(cell) for reason in IMPOSSIBLE.values())]
    random.Random(4).shuffle(possible)
    return possible


# --- how an end sounds in each dialect ---------------------------------------------------------------------------


def _openai(body: bytes, *, in_band: bool) -> dict[str, Any]:
    if in_band:
        assert b"[DONE]" not in body
        body = body.rpartition(b"data: ")[2]
    error: dict[str, Any] = json.loads(body)["error"]
    assert error["type"] == "cancelled"
    return error


def _responses(body: bytes, *, in_band: bool) -> dict[str, Any]:
    if not in_band:
        return _openai(body, in_band=False)
    events = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "invalid_prompt"  # the one that Codex does not try again
    return {**last["response"]["error"], "code": last["response"]["error"]["reason"]}


def _anthropic(body: bytes, *, in_band: bool) -> dict[str, Any]:
    if in_band:
        assert b"message_stop" not in body
        before, _, body = body.rpartition(b"data: ")
        assert before.endswith(b"event: error\n")
    told = json.loads(body)
    assert told["type"] == "error" and told["error"]["type"] == "api_error"
    error: dict[str, Any] = told["error"]
    return error


def _ollama(body: bytes, *, in_band: bool) -> dict[str, Any]:
    if in_band:
        assert b'"done":true' not in body
        body = body.splitlines()[-1]
    told: dict[str, Any] = json.loads(body)
    return {**told, "message": told["error"]}


DIALECTS: dict[str, Callable[..., dict[str, Any]]] = {
    **dict.fromkeys(("/v1/chat/completions", "/v1/completions", "/v1/embeddings"), _openai),
    "/v1/responses": _responses,
    "/v1/messages": _anthropic,
    **dict.fromkeys(("/api/chat", "/api/generate", "/api/embed", "/api/embeddings"), _ollama),
}
