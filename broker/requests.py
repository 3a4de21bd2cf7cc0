"""From a request's body to the job that it asks for, in whatever dialect it comes. No I/O: what decides is passed in.

`ENDPOINTS` has a row for each path that makes jobs. The front door reads requests so, and so does whoever has bodies
without a client that waits: what is submitted for later, and the lines of a batch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from ulid import ULID

from broker import errors, traces
from broker.callers import Caller
from broker.dialects import (
    anthropic,
    ollama,
    ollama_embeddings,
    ollama_request,
    openai,
    openai_completions,
    openai_embeddings,
    responses,
)
from broker.policies import Active
from broker.policy import Lane, Policy
from broker.records import JobRecord
from broker.trust import door

VECTORS_KEEP_MS_MAX: Final = 60_000
"""Vectors are large, and cheap to ask for again: an answer is kept for a retry, and no longer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What admission must know of a request that has been read; the fields are those of its job."""

    model: str
    session: str = ""
    stream: bool = False
    include_usage: bool = False
    choices: int = 1
    needs: str = ""
    tokens: int = 0
    longest: int = 0
    max_tokens: int = 0
    background: bool = False
    """Whether its client comes back for the answer: nobody's leaving ends it, and it is kept as long as a job is."""
    nothing: Callable[[int], bytes] | None = None
    """Where nothing is to be generated: how the gateway answers by itself, at a moment in ns since 1970."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path that makes jobs: how its bodies are read (raises BadRequest), and how long at most a whole answer is kept
    for a client that waited for it."""

    read: Callable[[bytes], Asked]
    keep_ms_max: int = sys.maxsize
    tagged: bool = False  # its clients add `:latest` to names


def known_name(policy: Policy, asked: str) -> str:
    """Leaves the tag away that Ollama's clients add to a name without one, unless the policy knows the name with it."""
    short = asked.removesuffix(":latest")
    names = policy.names()
    return short if asked not in names and short in names else asked


def lane_of(policy: Policy, caller: Caller, name: str, *, endpoint: str, prompt_tokens: int = 0) -> Lane:
    """The lane that a name leads this caller to; raises UnknownModel, and LaneForbidden where its key opens no such."""
    try:
        lane = policy.route(name, caller=caller.name, endpoint=endpoint, prompt_tokens=prompt_tokens)
    except (errors.UnknownModel, errors.UnknownLane) as unknown:
        near = [other for other in unknown.suggestions if caller.rights.may_ask_for(other)]
        raise type(unknown)(unknown.asked, near) from None
    if not caller.rights.may_ask_for(name, lane.name):
        opens = ", ".join(caller.rights.lanes)
        raise errors.LaneForbidden(f"the key of {caller.name} is for {opens}, not for {name[: errors.NAME_SHOWN]!r}")
    return lane


@contextmanager
def told_of_lanes(lane: str, *, param: str = "X-Gateway-Lane") -> Iterator[None]:
    """Whoever named a lane, not "", by that part of the request, hears of a lane where nothing has the name, and not of
    a model."""
    try:
        yield
    except errors.UnknownModel as unknown:
        if not lane:
            raise
        raise errors.UnknownLane(unknown.asked, unknown.suggestions, param=param) from None


def name_of(endpoint: str, asked: Asked, policy: Policy, *, lane: str = "") -> str:
    """The name by which a request asks for a lane: the one it names beside its body, else its model."""
    return lane or (known_name(policy, asked.model) if ENDPOINTS[endpoint].tagged else asked.model)


def job_of(
    endpoint: str,
    asked: Asked,
    active: Active,
    caller: Caller,
    *,
    lane: str = "",
    session: str = "",
    leave: bool | None = None,
    grace_ms: int = -1,
    traceparent: str = "",
) -> JobRecord:
    """Writes the job that a request asks for; raises UnknownModel, LaneForbidden.

    `lane` and `session` stand beside the body, in headers mostly, and count before what it says itself; `leave` is what
    was said of remote models, None = nothing. `grace_ms`: how long it outlives its last reader, -1 = it needs none.
    `traceparent`: the client's own trace, "" = none.
    """
    policy, rights, later = active.policy, caller.rights, asked.background
    name = name_of(endpoint, asked, policy, lane=lane)
    if rights.lanes:
        lane_of(policy, caller, name, endpoint=endpoint, prompt_tokens=asked.longest or asked.tokens)
    zone, exits = door.consent(leave, may_leave=rights.remote, standing=rights.exits)
    return JobRecord(
        id=str(ULID()),
        asked=name,
        caller=caller.name,
        priority=rights.priority,
        max_running=rights.max_running,
        session=session or asked.session,
        zone=zone,
        exits=exits,
        mode="async" if later else "sync",
        grace_ms=-1 if later else grace_ms,
        keep_ms=policy.keep_async_ms if later else min(policy.keep_ms, ENDPOINTS[endpoint].keep_ms_max),
        endpoint=endpoint,
        stream=asked.stream,
        include_usage=asked.include_usage,
        choices=asked.choices,
        needs=asked.needs,
        tokens=asked.tokens,
        longest=asked.longest,
        max_tokens=asked.max_tokens,
        trace=traces.accepted(traceparent),
    )


def _generation(facts: Any, **more: Any) -> Asked:
    told = {"session": facts.session, "stream": facts.stream, "include_usage": True, "tokens": facts.prompt_tokens}
    return Asked(facts.model, **told | more, max_tokens=facts.max_tokens or 0)


def _chat(body: bytes) -> Asked:
    facts = openai.read_chat(body)
    return _generation(facts, include_usage=facts.include_usage, choices=facts.n)


def _completion(body: bytes) -> Asked:
    facts = openai_completions.read_completion(body)
    longest = facts.longest_tokens if facts.prompts > 1 else 0
    return _generation(facts, include_usage=facts.include_usage, choices=facts.choices, longest=longest)


def _response(body: bytes) -> Asked:
    facts = responses.read_responses(body)
    return _generation(facts, needs=_words(facts.needs), background=facts.background)


def _messages(body: bytes) -> Asked:
    facts = anthropic.read_messages(body)
    return _generation(facts, needs=_words(facts.needs))


def _embeddings(body: bytes) -> Asked:
    facts = openai_embeddings.read_embeddings(body)
    return Asked(facts.model, tokens=facts.prompt_tokens, longest=facts.longest_tokens)


def _ollama(read: Callable[[bytes], ollama_request.Asked]) -> Endpoint:
    def asked(body: bytes) -> Asked:
        facts = read(body)
        nothing = (lambda now_ns: ollama.nothing(facts, now_ns=now_ns)) if facts.empty else None
        return _generation(facts, needs=_words(facts.needs), nothing=nothing)

    return Endpoint(asked, tagged=True)


def _ollama_vectors(read: Callable[[bytes], ollama_embeddings.AskedVectors]) -> Endpoint:
    def asked(body: bytes) -> Asked:
        facts = read(body)
        nothing = (lambda _now_ns: ollama_embeddings.nothing(facts)) if facts.empty else None
        return Asked(facts.model, tokens=facts.prompt_tokens, longest=facts.longest_tokens, nothing=nothing)

    return Endpoint(asked, VECTORS_KEEP_MS_MAX, tagged=True)


def _words(needs: frozenset[str]) -> str:
    return " ".join(sorted(needs))


ENDPOINTS: Final[Mapping[str, Endpoint]] = {
    openai.PATH: Endpoint(_chat),
    openai_completions.PATH: Endpoint(_completion),
    openai_embeddings.PATH: Endpoint(_embeddings, VECTORS_KEEP_MS_MAX),
    responses.PATH: Endpoint(_response),
    anthropic.PATH: Endpoint(_messages),
    ollama.CHAT: _ollama(ollama_request.read_chat),
    ollama.GENERATE: _ollama(ollama_request.read_generate),
    ollama.EMBED: _ollama_vectors(ollama_embeddings.read_embed),
    ollama.EMBEDDINGS: _ollama_vectors(ollama_embeddings.read_embeddings),
}
