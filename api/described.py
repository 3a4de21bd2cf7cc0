"""How an endpoint is described to those who write clients. The description stands at the endpoint itself, and
`openapi` makes the document of what it finds there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from api.visit import KEY, SESSION, WITHIN_MS_MAX
from broker import errors
from broker.dialects.json_schema import Schema, one_of, ref, some, text, whole

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
FORM: Final = "multipart/form-data"
OCTETS: Final = "application/octet-stream"

UNSEEN: Final[Schema] = {}
"""What the pieces of a stream are, OpenAPI 3.1 has no words for: the answer's description tells it."""

Kinds = tuple[type[errors.BrokerError], ...]


@dataclass(frozen=True)
class Answer:
    """What is said when all goes well: a schema for each media type, none where there is no body."""

    words: str
    content: Mapping[str, Schema] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)


@dataclass(frozen=True)
class Described:
    """One endpoint. Its errors are kinds of the broker's tree: their statuses and bodies are those of `api.errors`."""

    summary: str
    tag: str
    answers: Mapping[int, Answer]
    words: str = ""
    body: str = ""
    """The named schema of the request's body, "" where it has none."""
    body_type: str = JSON
    bodyless: bool = False
    """The request may come without that body."""
    fails: Kinds = ()
    headers: Mapping[str, Schema] = field(default_factory=dict)
    query: Mapping[str, Schema] = field(default_factory=dict)
    within: Mapping[str, Schema] = field(default_factory=dict)
    """What stands in the path."""
    keyless: bool = False
    """Nobody has to say who they are."""

    @property
    def all_fails(self) -> Kinds:
        """What can go wrong, the missing key included."""
        return self.fails if self.keyless else (errors.Unauthorized, *self.fails)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def described(what: Described) -> Callable[[_Function], _Function]:
    """Describes the function of an endpoint; stands below the line that routes to it."""

    def note(function: _Function) -> _Function:
        function.described = what  # type: ignore[attr-defined]  # read back by `openapi`
        return function

    return note


def says(words: str, *schemas: str) -> Mapping[int, Answer]:
    """The usual answer: 200 and one named object, or one of several."""
    found = [ref(schema) for schema in schemas]
    return {200: Answer(words, {JSON: found[0] if len(found) == 1 else some(*found)})}


WISHES: Final[Mapping[str, Schema]] = {
    "X-Gateway-Lane": text("Enter this lane instead of the one that `model` leads to."),
    "X-Session-Affinity": text(
        "Names the conversation: its requests go where its prompt is cached.", pattern=f"^({SESSION.pattern})?$"
    ),
    "X-SLO-TTFT-Ms": whole(
        "The first token is wanted within this time: the cold-start deadline comes forward, never later.",
        least=1,
        most=WITHIN_MS_MAX,
    ),
    "X-Gateway-Allow-Remote": one_of("true", "false", words="Whether the request may leave for a remote provider."),
    "X-Gateway-On-Disconnect": one_of(
        "keep", "cancel", words="What happens to the job when its client hangs up; by default a retry may come back."
    ),
    "Idempotency-Key": text(
        "The same key with the same body comes back to the same job, live or finished.", pattern=f"^({KEY.pattern})?$"
    ),
    "traceparent": text("W3C trace context: the job's spans and the runtime's belong to this trace."),
    "X-Stainless-Retry-Count": text("An SDK's own: above 0, the request comes back to what its first try left behind."),
    "X-Stainless-Read-Timeout": text("An SDK's own, in seconds: the fallback is tried before it hangs up."),
}
"""What the headers of a generation may ask for; `visit.Wishes` reads them, and an empty one as if it had not come."""

TELLS: Final[Mapping[str, Schema]] = {
    "X-Gateway-Job": text("The job's id, for GET /v1/jobs/{job_id}."),
    "X-Gateway-Lane": text("The lane that served it."),
    "X-Gateway-Served-By": text("The model and host that answered, as far as known."),
    "X-Gateway-Queue-Ms": whole("How long it waited, where that was noticeable."),
    "X-Gateway-First-Token-Ms": whole("How long the first token took, from when the job was handed in."),
}
"""What the headers of an answer tell, as far as it is known when they are sent; the job's record knows all."""

GENERATION_FAILS: Final[Kinds] = (
    errors.BadRequest,
    errors.WrongEndpoint,
    errors.ContextTooLong,
    errors.RuntimeRefused,
    errors.TrustZoneRefused,
    errors.LaneForbidden,
    errors.UnknownModel,
    errors.UnknownLane,
    errors.BodyTooLarge,
    errors.CallerTooMany,
    errors.BodiesTooMany,
    errors.IdempotencyMismatch,
    errors.JobCancelled,
    errors.RuntimeFailed,
    errors.CallerLimit,
    errors.QuotaUsed,
    errors.LaneFull,
    errors.CallerShare,
    errors.ModelUnavailable,
    errors.ColdStartDeadline,
    errors.JobExpired,
    errors.WorkerLost,
    errors.BrokerUnavailable,
    errors.PolicyUnreadable,
)


def generation(
    summary: str,
    *,
    tag: str,
    body: str,
    answer: str,
    stream: tuple[str, str] | None = None,
    words: str = "",
) -> Described:
    """Describes an endpoint that makes a job; `stream` is the media type of its streams, and what they are."""
    content: dict[str, Schema] = {JSON: ref(answer)}
    said = "The answer."
    if stream is not None:
        content[stream[0]] = UNSEEN
        said = f"The answer; where a stream was asked for: {stream[1]}"
    return Described(
        summary,
        tag,
        {200: Answer(said, content, TELLS)},
        words=words,
        body=body,
        fails=GENERATION_FAILS,
        headers=WISHES,
    )
