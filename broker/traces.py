"""The trace of a job: a span for each step of its life, told when the step is over by whichever part ended it.

Which trace a job belongs to stands in its record, and a span's id follows from the job's: no part needs another's
memory to name a parent, and an attempt whose worker was killed is told by whoever recovers its job. Where two parts
tell the same step, because a reply was lost or a worker was only frozen, it has the same id twice. Nothing is told, and
nothing costs, until `begin` is given somebody to tell; that is `otel`.

Instants are ms of Redis' clock. Trace context is W3C's (Trace Context, Level 1).
"""

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from broker import errors
from broker.records import JobRecord

log = logging.getLogger("warmlane.traces")

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_NO_TRACE, NO_PARENT = "0" * 32, "0" * 16

SPANS: Final[dict[str, str]] = {
    "job": "the whole of it, from its submit to its end; named by what was asked for, and by `chat` alone if refused",
    "scheduled": "from its submit to the start that its caller set",
    "wait": "in one lane, until a worker claimed it or it left the lane otherwise (`warmlane.outcome`)",
    "wake": "the part of that wait in which its model was woken: loaded, and its first token proved",
    "attempt": "a worker's hold on it; the runtime gets this span as its parent",
    "first token": "from the claim to the attempt's first token: the prompt is read",
    "answer": "from there to the end of the answer",
}
"""The steps, and what each is. docs/traces.md prints them."""


@dataclass(frozen=True)
class Context:
    """What a job's record says of its trace: ids in hex; `parent` is NO_PARENT where the trace begins here."""

    trace_id: str
    parent: str
    sampled: bool

    @classmethod
    def read(cls, traceparent: str) -> "Context | None":
        """Reads a `traceparent`; None where it is none, which a receiver has to treat like its absence."""
        found = _TRACEPARENT.fullmatch(traceparent)
        if found is None or (traceparent.startswith("00") and len(traceparent) != 55):
            return None
        trace_id, parent, flags = found.groups()
        return None if trace_id == _NO_TRACE else cls(trace_id, parent, bool(int(flags, 16) & 1))

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.parent}-{int(self.sampled):02x}"


@dataclass(frozen=True, kw_only=True)
class Span:
    """One step that is over. `parent_id` is "" where it has none."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ms: int
    end_ms: int
    served: bool = False  # it is the whole of what a client asked for
    error: str = ""
    attributes: dict[str, str | int | float] = field(default_factory=dict)


class Teller(Protocol):
    """Who is told, and who says which traces are worth it."""

    def samples(self, context: Context) -> bool:
        """Decides about a trace that begins here, or about one that a client began."""

    def tell(self, span: Span) -> None:
        """Takes a span; never waits."""


_teller: Teller | None = None


def begin(teller: Teller | None) -> None:
    """Names who is told of the steps that this process ends; None = nobody."""
    global _teller
    _teller = teller


def accepted(traceparent: str) -> str:
    """Gives what the record of a new job says of its trace: that of the client, if it named one, else one of its own
    where somebody wants it, else "". A client's is kept when nobody is told too: its runtime may have somebody."""
    theirs = Context.read(traceparent) if traceparent else None
    if theirs is not None and theirs.parent == NO_PARENT:
        theirs = None
    if _teller is None:
        return str(theirs) if theirs is not None else ""
    context = theirs or Context(secrets.token_hex(16), NO_PARENT, True)
    try:
        sampled = _teller.samples(context)
    except Exception as e:  # noqa: BLE001  # a sampler may be anybody's
        _broke(e)
        return str(theirs) if theirs is not None else ""
    if theirs is None and not sampled:
        return ""
    return str(Context(context.trace_id, context.parent, sampled))


def told(job: JobRecord) -> bool:
    """Whether somebody is told of this job's steps."""
    return _teller is not None and _context_of(job) is not None


def onward(job: JobRecord) -> str:
    """Gives the `traceparent` that the runtime of the job's present attempt gets, "" = none."""
    context = Context.read(job.trace) if job.trace else None
    if context is None:
        return ""
    if _teller is not None and context.sampled:
        return str(Context(context.trace_id, span_id(job.id, f"attempt {job.attempt}"), True))
    return "" if context.parent == NO_PARENT else str(context)


def span_id(job_id: str, step: str) -> str:
    """The id of a job's step, 16 hex digits: the same whoever tells it."""
    return hashlib.blake2b(f"{job_id} {step}".encode(), digest_size=8).hexdigest()


def as_markdown() -> str:
    """The table for people."""
    rows = [f"| {'the job, `chat MODEL`' if name == 'job' else f'`{name}`'} | {what} |" for name, what in SPANS.items()]
    return "\n".join(["| span | what it is |", "|---|---|", *rows])


# --- the steps --------------------------------------------------------------------------------------------------------


@contextmanager
def admission(job: JobRecord, now_ms: Callable[[], int]) -> Iterator["Admission"]:
    """Tells of a request that is refused, or led to an earlier job. A line of a batch is asked for again and again
    until there is a place: its refusals are nobody's."""
    search = Admission()
    if not told(job):
        yield search
        return
    since = now_ms()
    try:
        yield search
    except errors.Refused as refusal:
        if not job.batch:
            _tell_whole(
                replace(job, lane=getattr(refusal, "lane", "")), "job", since, now_ms(), outcome="refused",
                error=refusal.code,
            )  # fmt: skip
        raise
    if search.led_to:
        about = {"warmlane.attached_to": search.led_to}
        _tell_whole(job, "attach", since, now_ms(), outcome="attached", **about)


class Admission:
    """A search for a lane that goes on; `led_to`: the earlier job that it found, "" = none."""

    led_to: str = ""


def waited(job: JobRecord, *, until_ms: int, outcome: str) -> None:
    """It has left its lane, or the schedule, as `outcome` says."""
    if not told(job):
        return
    if job.entry:
        _tell(job, "wait", f"wait {job.entry}", job.entered_at, until_ms, **{"warmlane.outcome": outcome})
    else:
        _tell(job, "scheduled", "scheduled", job.submitted_at, until_ms, **{"warmlane.outcome": outcome})


def claimed(job: JobRecord, *, waking_at: int) -> None:
    """A worker has it, whose model's last wake began then."""
    if not told(job):
        return
    waited(job, until_ms=job.claimed_at, outcome="claimed")
    since = max(job.entered_at, waking_at)
    if since < job.woke_at:
        _tell(job, "wake", f"wake {job.entry}", since, job.woke_at, parent=f"wait {job.entry}")


def attempted(
    job: JobRecord, outcome: str, *, first_token_ms: float, total_ms: float, error: str = "", ended_at: int = 0
) -> None:
    """The attempt that holds it is over, `total_ms` after its claim; `first_token_ms` = 0 where it gave none. Where the
    job is over with it, that was at `ended_at`."""
    if not told(job):
        return
    step, end = f"attempt {job.attempt}", ended_at or round(job.claimed_at + total_ms)
    _tell(job, "attempt", step, job.claimed_at, end, error=error, **_of_attempt(job, outcome))
    if first_token_ms > 0:
        first = min(end, round(job.claimed_at + first_token_ms))
        _tell(job, "first token", f"first token {job.attempt}", job.claimed_at, first, parent=step)
        _tell(job, "answer", f"answer {job.attempt}", first, end, parent=step)


def lost(job: JobRecord, *, at_ms: int) -> None:
    """Its worker is gone, and with it what that would have told of the attempt."""
    if told(job):
        about = _of_attempt(job, "lost")
        step, error = f"attempt {job.attempt}", errors.WorkerLost.code
        _tell(job, "attempt", step, job.claimed_at, at_ms, error=error, **about)


def ended(job: JobRecord) -> None:
    """It is over, as its record says."""
    if not told(job) or job.live:
        return
    tokens = json.loads(job.usage) if job.usage else {}
    figures = {
        f"gen_ai.usage.{name}_tokens": int(tokens[key])
        for name, key in (("input", "prompt_tokens"), ("output", "completion_tokens"))
        if tokens.get(key)
    }
    _tell_whole(job, "job", job.submitted_at, job.ended_at, outcome=job.state.value, error=job.error, **figures)


# --- how they are told ------------------------------------------------------------------------------------------------

_OPERATIONS = {
    "/v1/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
}
"""What OpenTelemetry's conventions call what an endpoint does, where it is not a chat."""


def _context_of(job: JobRecord) -> Context | None:
    context = Context.read(job.trace) if job.trace else None
    return context if context is not None and context.sampled else None


def _of_attempt(job: JobRecord, outcome: str) -> dict[str, Any]:
    return {"warmlane.outcome": outcome, "warmlane.attempt": job.attempt, "warmlane.host": job.owner}


def _tell(
    job: JobRecord, name: str, step: str, start_ms: int, end_ms: int, *, parent: str = "job", error: str = "",
    **more: str | int | float,
) -> None:  # fmt: skip
    context = _context_of(job)
    if context is None:
        return
    about: dict[str, str | int | float] = {"warmlane.job": job.id, "warmlane.lane": job.lane}
    _hand_over(
        Span(
            name=name,
            trace_id=context.trace_id,
            span_id=span_id(job.id, step),
            parent_id=span_id(job.id, parent),
            start_ms=start_ms,
            end_ms=max(start_ms, end_ms),
            error=error,
            attributes={key: value for key, value in (about | more).items() if value != ""},
        )
    )


def _tell_whole(
    job: JobRecord, step: str, since_ms: int, at_ms: int, *, outcome: str, error: str = "", **more: str | int
) -> None:
    context = _context_of(job)
    if context is None:
        return
    operation = _OPERATIONS.get(job.endpoint, "chat")
    asked = job.asked if job.asked_model else ""  # else a client's own words, of any length, and no name of ours
    about: dict[str, str | int | float] = {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": asked,
        "gen_ai.response.model": job.model,
        "http.route": job.endpoint,
        "warmlane.job": job.id,
        "warmlane.lane": job.lane,
        "warmlane.caller": job.caller,
        "warmlane.priority": job.priority,
        "warmlane.mode": job.mode,
        "warmlane.batch": job.batch,
        "warmlane.outcome": outcome,
        **more,
    }
    _hand_over(
        Span(
            name=f"{operation} {asked}".rstrip(),
            trace_id=context.trace_id,
            span_id=span_id(job.id, step),
            parent_id="" if context.parent == NO_PARENT else context.parent,
            start_ms=since_ms,
            end_ms=max(since_ms, at_ms),
            served=True,
            error=error,
            attributes={key: value for key, value in about.items() if value != ""},
        )
    )


def _hand_over(span: Span) -> None:
    """Tells; whatever breaks over that must not break the job's path, on which this is."""
    if _teller is None:
        return
    try:
        _teller.tell(span)
    except Exception as e:  # noqa: BLE001
        _broke(e)


def _broke(error: Exception) -> None:
    """Nobody is told any more: what breaks once would break for every step of every job."""
    log.error("event=traces_off reason=telling broke", exc_info=error)
    begin(None)
