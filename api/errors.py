"""What a client hears of each error of the broker: the one table from error to status, and the words around it.

Two of the choices need a reason. A job that was cancelled answers 499, gRPC's status for it: every SDK repeats a 409 or
a 503 by itself, and nobody wants a cancelled generation a second time. And whatever waiting cures is a 503 with a
`Retry-After`: clients keep 429 for a caller's own quota.
"""

import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from broker import errors
from broker.dialects import anthropic, ollama, openai, openai_completions, responses
from broker.dialects.openai_embeddings import PATH as EMBEDDINGS
from broker.records import Frame

log = logging.getLogger("warmlane.api")

RETRY_AFTER_S_MAX = 30
"""Clients give up, or sleep for hours, over a longer one."""

TOO_SLOW = 504
"""Of a runtime that was not broken, but too slow."""

INVALID = "invalid_request_error"
"""OpenAI's `type` of whatever the client itself can mend."""
BUSY = "service_unavailable"
"""… and of what waiting cures."""
PERMISSION = "permission_error"
_BROKEN, _LIMIT = "server_error", "rate_limit_error"


@dataclass(frozen=True)
class Row:
    """How one error is told: its status, its `type` in OpenAI's words, and when to come back, if that helps."""

    status: int
    kind: str
    retry_after_s: int | None = None
    retry_after_s_max: int = RETRY_AFTER_S_MAX


ROWS: dict[type[errors.BrokerError], Row] = {
    errors.LaneFull: Row(503, BUSY, 1),
    errors.CallerShare: Row(503, BUSY, 1),
    errors.CallerLimit: Row(429, _LIMIT, 1),
    errors.ScheduleFull: Row(429, _LIMIT, 1),
    errors.QuotaUsed: Row(429, _LIMIT, 60, 86_400),
    errors.ModelUnavailable: Row(503, BUSY, 5),
    errors.TrustZoneRefused: Row(403, PERMISSION),
    errors.UnknownModel: Row(404, INVALID),
    errors.UnknownLane: Row(404, INVALID),
    errors.UnknownHost: Row(404, INVALID),
    errors.UnknownCaller: Row(404, INVALID),
    errors.WishRefused: Row(409, INVALID),
    errors.WrongEndpoint: Row(400, INVALID),
    errors.ContextTooLong: Row(400, INVALID),
    errors.BadRequest: Row(400, INVALID),
    errors.BodyTooLarge: Row(413, INVALID),
    errors.BodiesTooMany: Row(503, BUSY, 1),
    errors.CallerTooMany: Row(429, _LIMIT, 1),
    errors.Unauthorized: Row(401, "authentication_error"),
    errors.LaneForbidden: Row(403, PERMISSION),
    errors.AdminOnly: Row(403, PERMISSION),
    errors.NoSuchJob: Row(404, INVALID),
    errors.NoSuchResponse: Row(404, INVALID),
    errors.BegunAgain: Row(410, INVALID),
    errors.NoSuchDelivery: Row(404, INVALID),
    errors.AddressRefused: Row(400, INVALID),
    errors.NoSuchFile: Row(404, INVALID),
    errors.FilesFull: Row(413, INVALID),
    errors.FileInUse: Row(409, INVALID),
    errors.NoSuchBatch: Row(404, INVALID),
    errors.BatchLimit: Row(429, _LIMIT, 30),
    errors.IdempotencyMismatch: Row(422, INVALID),
    errors.NotEnded: Row(409, INVALID),
    errors.NotRetryable: Row(409, INVALID),
    errors.NoSuchLetter: Row(404, INVALID),
    errors.PolicyInvalid: Row(422, INVALID),
    errors.ColdStartDeadline: Row(503, BUSY, 5),
    errors.JobExpired: Row(503, BUSY, 5),
    errors.WorkerLost: Row(503, BUSY, 1),
    errors.RuntimeFailed: Row(502, _BROKEN),
    errors.RuntimeRefused: Row(400, INVALID),
    errors.SlowReader: Row(503, BUSY, 1),
    errors.JobCancelled: Row(499, "cancelled"),
    # What follows is for our own processes; a client hears it only when something of ours went wrong.
    errors.DowngradesCapped: Row(503, BUSY, 1),
    errors.StaleAttempt: Row(500, _BROKEN),
    errors.Moved: Row(503, BUSY, 1),
    errors.StalePolicy: Row(503, BUSY, 1),
    errors.Unjudged: Row(503, BUSY, 1),
    errors.NotDue: Row(409, INVALID),
    errors.FrameGap: Row(500, _BROKEN),
    errors.CallerBusy: Row(503, BUSY, 1),
    errors.NotPutBack: Row(503, BUSY, 1),
    errors.AlreadyEnded: Row(409, INVALID),
    errors.LockHeld: Row(409, INVALID),
    errors.BadTransition: Row(500, _BROKEN),
    errors.BrokerUnavailable: Row(503, BUSY, 1),
    errors.RedisUnfit: Row(503, BUSY, 5),
    errors.PolicyUnreadable: Row(503, BUSY, 5),
}

_PARAMS: dict[type[errors.BrokerError], str] = {
    errors.UnknownModel: "model",
    errors.WrongEndpoint: "model",
    errors.IdempotencyMismatch: "Idempotency-Key",
    errors.BegunAgain: "starting_after",
    errors.AddressRefused: "webhook",
}


@dataclass(frozen=True)
class Wrong:
    """One thing that went wrong, ready to be told: as a status with a body, or inside a stream."""

    code: str
    message: str
    status: int
    kind: str
    param: str | None = None
    retry_after_s: int | None = None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that go with the status."""
        found = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found


@dataclass(frozen=True, eq=False)
class Dialect:
    """How clients of one dialect are told what went wrong: by a body and a status, or by an event inside a stream whose
    status has been sent, which nothing may follow."""

    schema: str  # of an error's body, as `/openapi.json` calls it
    told: Callable[[Wrong], dict[str, Any]]
    event: Callable[[Wrong], bytes]
    status: Callable[[Wrong], int] = lambda wrong: wrong.status

    def body(self, wrong: Wrong) -> bytes:
        """The error object."""
        return json.dumps(self.told(wrong), separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def _openais(prompt: str) -> Dialect:
    """OpenAI's, at an endpoint that calls its prompt so."""

    def words(wrong: Wrong) -> dict[str, Any]:
        param = prompt if wrong.code == errors.ContextTooLong.code else wrong.param
        return {"kind": wrong.kind, "param": param, "retry_after_s": wrong.retry_after_s}

    return Dialect(
        "OpenAIError",
        lambda wrong: openai.error_object(wrong.code, wrong.message, **words(wrong)),
        lambda wrong: openai.error_event(wrong.code, wrong.message, **words(wrong)),
    )


_OLLAMAS = Dialect(
    "OllamaError",
    lambda wrong: ollama.error_object(wrong.code, wrong.message, retry_after_s=wrong.retry_after_s),
    lambda wrong: ollama.error_event(wrong.code, wrong.message, retry_after_s=wrong.retry_after_s),
)
_ANTHROPICS = Dialect(
    "AnthropicError",
    lambda wrong: anthropic.error_object(
        wrong.code, wrong.message, status=wrong.status, retry_after_s=wrong.retry_after_s
    ),
    lambda wrong: anthropic.error_event(
        wrong.code, wrong.message, status=wrong.status, retry_after_s=wrong.retry_after_s
    ),
    lambda wrong: anthropic.own_status(wrong.status),
)
VERSION: Final = "anthropic-version"
"""The header that clients of Anthropic always send."""
MODELS: Final = "/v1/models"
"""The address that its list of models has in common with OpenAI's."""
_SPOKEN: tuple[tuple[str, Dialect], ...] = (
    ("/api/", _OLLAMAS),
    (anthropic.PATH, _ANTHROPICS),
    (responses.PATH, _openais("input")),
    (openai_completions.PATH, _openais("prompt")),
    (EMBEDDINGS, _openais("input")),
    ("", _openais("messages")),
)
"""How the paths of a dialect begin."""


def dialect_of(path: str, *, version: str = "") -> Dialect:
    """Gives the dialect that is spoken at a path, whether anything is served there or not. `version` is Anthropic's, by
    which its clients are known where it has an address in common with OpenAI's."""
    if version and path.startswith(MODELS):
        return _ANTHROPICS
    return next(dialect for beginning, dialect in _SPOKEN if path.startswith(beginning))


def statuses(kind: type[errors.BrokerError], dialect: Dialect) -> list[int]:
    """Gives every status by which a client of the dialect may hear of such an error."""
    row = ROWS[kind]
    found: tuple[int, ...] = (row.status,)
    if kind is errors.RuntimeFailed:
        found = (row.status, TOO_SLOW)
    if kind is errors.RuntimeRefused:
        found = errors.RuntimeRefused.STATUSES
    return [dialect.status(Wrong(kind.code, "", status, row.kind)) for status in found]


def wrong(error: errors.BrokerError) -> Wrong:
    """Says what a client hears of an error that was raised."""
    row = next((ROWS[kind] for kind in type(error).__mro__ if kind in ROWS), None)
    if row is None:  # a script's error that has no name in the tree
        return unexpected(error)
    retry_after_s = getattr(error, "retry_after_s", row.retry_after_s)
    return Wrong(
        error.code,
        str(error),
        getattr(error, "status", row.status) if isinstance(error, errors.RuntimeRefused) else row.status,
        row.kind,
        getattr(error, "param", None) or _PARAMS.get(type(error)),
        None if retry_after_s is None else max(1, min(row.retry_after_s_max, retry_after_s)),
    )


def ended(frame: Frame, *, retry_after_s: int | None = None) -> Wrong:
    """Says what a client hears of a terminal frame other than `done`; `retry_after_s` is how its lane drains."""
    said: dict[str, Any] = json.loads(frame.data)
    code, status = str(said.get("code") or frame.kind), said.get("status")
    kind = _BY_CODE.get(code, errors.RuntimeFailed)
    row = ROWS[kind]
    found = Wrong(code, str(said.get("message") or "the job ended without an answer"), row.status, row.kind)
    if kind is errors.RuntimeRefused and isinstance(status, int | float) and 400 <= status < 500:
        return replace(found, status=int(status))
    if kind is errors.RuntimeFailed and status == TOO_SLOW:
        found = replace(found, status=TOO_SLOW)
    if row.retry_after_s is None:
        return found
    wait_s = retry_after_s if retry_after_s and kind in (errors.ColdStartDeadline, errors.JobExpired) else None
    return replace(found, retry_after_s=min(RETRY_AFTER_S_MAX, wait_s or row.retry_after_s))


def unexpected(error: BaseException) -> Wrong:
    """Logs an error that nobody foresaw, without its words, and gives the client its number."""
    number = secrets.token_hex(4)
    log.error("event=unexpected id=%s", number, exc_info=error)
    return Wrong("internal_error", f"something of the gateway broke; its log knows more as {number}", 500, _BROKEN)


def _leaves(kind: type[errors.BrokerError]) -> list[type[errors.BrokerError]]:
    return [kind, *(leaf for sub in kind.__subclasses__() for leaf in _leaves(sub))]


_BY_CODE = {kind.code: kind for kind in _leaves(errors.BrokerError) if kind in ROWS}
