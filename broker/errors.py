"""What can go wrong, as a tree. Every leaf has a code, and the code is what clients and Lua see.

BrokerError
├── Refused                     we said no and nothing happened; the client may act
│   ├── LaneFull                lane_full                 retry_after_s
│   ├── ScheduleFull            schedule_full             retry_after_s: the caller's jobs that start later in a lane
│   ├── CallerShare             caller_share              retry_after_s
│   ├── CallerLimit             caller_limit              retry_after_s: the key's own limit of waiting jobs
│   ├── QuotaUsed               quota_used                retry_after_s: the key's tokens of the day
│   ├── ModelUnavailable        model_unavailable         retry_after_s
│   ├── DowngradesCapped        downgrades_capped         for us: its client hears what its own lane says
│   ├── TrustZoneRefused        trust_zone
│   ├── UnknownModel            model_not_found           suggestions
│   ├── UnknownLane             lane_not_found            suggestions
│   ├── UnknownHost             host_not_found            suggestions
│   ├── UnknownCaller           caller_not_found          suggestions
│   ├── WishRefused             wish_refused              what an operator asked for cannot be done now
│   ├── WrongEndpoint           wrong_endpoint
│   ├── ContextTooLong          context_length_exceeded
│   ├── BadRequest              invalid_request           param
│   ├── BodyTooLarge            body_too_large            limit_bytes
│   ├── BodiesTooMany           too_many_bodies           retry_after_s
│   ├── CallerTooMany           too_many_requests         retry_after_s
│   ├── Unauthorized            invalid_api_key
│   ├── LaneForbidden           lane_forbidden            the key may not ask for this
│   ├── AdminOnly               admin_only                the key has no administrator's rights
│   ├── NoSuchJob               job_not_found
│   ├── NoSuchResponse          response_not_found
│   ├── BegunAgain              begun_again               the part of the answer that it goes on from is void
│   ├── NoSuchDelivery          delivery_not_found
│   ├── AddressRefused          address_refused           a webhook would go where the policy lets none go
│   ├── NoSuchFile              file_not_found
│   ├── FilesFull               files_full                the caller's files hold as much as they may
│   ├── FileInUse               file_in_use               a batch reads it
│   ├── NoSuchBatch             batch_not_found
│   ├── BatchLimit              batch_limit               the caller has as many batches as are kept
│   ├── IdempotencyMismatch     idempotency_mismatch
│   ├── NotEnded                not_ended                 the job has no result yet
│   ├── NotRetryable            not_retryable             the job lives or is done, or its request is not kept
│   ├── NoSuchLetter            letter_not_found
│   └── PolicyInvalid           policy_invalid            problems
├── JobEnded                    it was accepted and ended, but not well
│   ├── ColdStartDeadline       cold_start_deadline       the model was not warm before the give-up instant
│   ├── JobExpired              expired                   no slot was free before the give-up instant
│   ├── WorkerLost              worker_lost
│   ├── RuntimeFailed           runtime_failed            status, retryable
│   ├── RuntimeRefused          runtime_refused           the runtime answered 4xx: the request's own fault
│   ├── SlowReader              slow_reader
│   └── JobCancelled            cancelled
├── Lost                        a write of ours came too late or at the wrong moment; whoever wrote stops or reads again
│   ├── StaleAttempt            stale_attempt             not the holder any more: stop, quietly
│   ├── Moved                   moved                     the job is in another lane or entry: read again
│   ├── StalePolicy             stale_policy              decided under an old policy: reload and decide again
│   ├── Unjudged                unjudged                  its content was not judged by the rules in force
│   ├── NotDue                  not_due                   the instant has not passed yet
│   ├── FrameGap                frame_gap                 a frame is missing before this one
│   ├── CallerBusy              caller_busy               its caller runs as many jobs as its key may
│   ├── NotPutBack              not_put_back              batch work that runs on: it was put back often enough
│   ├── AlreadyEnded            already_ended             the job has ended
│   └── LockHeld                lock_held                 somebody else holds the wake lock or the host's name
├── BadTransition               bad_transition            a bug of ours: log it loudly, never retry
└── BrokerUnavailable           broker_unavailable        Redis does not answer
    ├── RedisFull               broker_unavailable        it answers, and has no room for anything new
    ├── RedisUnfit              redis_unfit               it answers, but is too old or not a Redis
    └── PolicyUnreadable        policy_unreadable         version, problems: its policy is for a later version of ours
"""

from typing import ClassVar

NAME_SHOWN = 100
"""Characters of a name that somebody sent which an error repeats."""


class BrokerError(Exception):
    """Root of everything that the broker raises on purpose."""

    code: ClassVar[str] = "internal_error"


class Refused(BrokerError):
    """We said no and nothing happened."""


class LaneFull(Refused):
    """The lane's queue budget is used up, and so are its fallbacks'."""

    code = "lane_full"

    def __init__(self, lane: str, *, retry_after_s: int = 1, before: int = 0) -> None:
        """`before` = callers that are in line for a place there before this one."""
        super().__init__(f"lane {lane} is full; try again in {retry_after_s} s")
        self.lane, self.before = lane, before
        self.retry_after_s = retry_after_s


class ScheduleFull(Refused):
    """As many of the caller's jobs start later in the lane as may."""

    code = "schedule_full"

    def __init__(self, lane: str, *, retry_after_s: int = 1) -> None:
        """`retry_after_s` = until the first of them starts."""
        super().__init__(
            f"as many of your jobs as may start later in {lane} are scheduled; the first starts in {retry_after_s} s"
        )
        self.lane = lane
        self.retry_after_s = retry_after_s


class CallerShare(Refused):
    """The caller holds its share of the lane's places, and others want in."""

    code = "caller_share"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CallerLimit(Refused):
    """As many of the caller's jobs wait as its key allows."""

    code = "caller_limit"

    def __init__(self, caller: str, *, retry_after_s: int = 1) -> None:
        super().__init__(f"as many jobs of {caller} wait as its key allows; try again in {retry_after_s} s")
        self.caller = caller
        self.retry_after_s = retry_after_s


class QuotaUsed(Refused):
    """The caller has used its tokens of the day."""

    code = "quota_used"

    def __init__(self, *, retry_after_s: int) -> None:
        super().__init__("the tokens of this key for today (UTC) are used up")
        self.retry_after_s = retry_after_s


class ModelUnavailable(Refused):
    """No live host can serve the model now."""

    code = "model_unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DowngradesCapped(Refused):
    """Too many of the last jobs that asked for the model are served by another one already."""

    code = "downgrades_capped"


class TrustZoneRefused(Refused):
    """The job may not enter the zone that this lane leads to."""

    code = "trust_zone"


class UnknownModel(Refused):
    """Nothing in the policy answers to the name that was asked for."""

    code = "model_not_found"

    def __init__(self, asked: str, suggestions: list[str] | None = None) -> None:
        hint = f"; did you mean {', '.join(suggestions)}?" if suggestions else ""
        super().__init__(f"no model, alias or lane is called {asked[:NAME_SHOWN]!r}{hint}")
        self.asked = asked
        self.suggestions = suggestions or []


class UnknownLane(Refused):
    """The lane that the request names does not exist."""

    code = "lane_not_found"

    def __init__(self, asked: str, suggestions: list[str] | None = None, *, param: str = "X-Gateway-Lane") -> None:
        """`param` = what of the request named it."""
        hint = f"; did you mean {', '.join(suggestions)}?" if suggestions else ""
        super().__init__(f"no lane is called {asked[:NAME_SHOWN]!r}{hint}")
        self.asked = asked
        self.suggestions = suggestions or []
        self.param = param


class UnknownHost(Refused):
    """No live host has this name."""

    code = "host_not_found"

    def __init__(self, asked: str, suggestions: list[str] | None = None) -> None:
        hint = f"; did you mean {', '.join(suggestions)}?" if suggestions else ""
        super().__init__(f"no live host is called {asked[:NAME_SHOWN]!r}{hint}")
        self.asked = asked
        self.suggestions = suggestions or []


class UnknownCaller(Refused):
    """No caller with a key has this name."""

    code = "caller_not_found"

    def __init__(self, asked: str, suggestions: list[str] | None = None) -> None:
        hint = f"; did you mean {', '.join(suggestions)}?" if suggestions else ""
        super().__init__(f"no caller is called {asked[:NAME_SHOWN]!r}{hint}")
        self.asked = asked
        self.suggestions = suggestions or []


class WishRefused(Refused):
    """What an operator asked for cannot be done as things are."""

    code = "wish_refused"


class WrongEndpoint(Refused):
    """The model does not give what this endpoint is for: it gives vectors and no text, or text and no vectors."""

    code = "wrong_endpoint"


class ContextTooLong(Refused):
    """Prompt plus answer do not fit the context of any model that may serve the job."""

    code = "context_length_exceeded"


class BadRequest(Refused):
    """The request itself is wrong; `param` names the part of it."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLarge(Refused):
    """The request body is over the limit."""

    code = "body_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the request body is larger than {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class BodiesTooMany(Refused):
    """The large bodies of all requests together are too much to hold."""

    code = "too_many_bodies"
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("the gateway holds too many large requests at the moment; try again")


class CallerTooMany(Refused):
    """A caller has too many requests under way."""

    code = "too_many_requests"
    retry_after_s = 1

    def __init__(self, limit: int) -> None:
        super().__init__(f"a caller may have {limit} requests under way; try again when one has ended")


class Unauthorized(Refused):
    """No key, or not one of ours."""

    code = "invalid_api_key"


class LaneForbidden(Refused):
    """The caller's key does not open this lane."""

    code = "lane_forbidden"


class AdminOnly(Refused):
    """Only an administrator's key may do this."""

    code = "admin_only"


class NoSuchJob(Refused):
    """No job of this caller has this id (any more)."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"no job {job_id} is known here (ended jobs are kept for the policy's keepMs, asynchronous ones for "
            "keepAsyncMs)"
        )
        self.job_id = job_id


class NoSuchResponse(Refused):
    """No response that this caller had made in the background has this id (any more)."""

    code = "response_not_found"


class BegunAgain(Refused):
    """What was told of an answer is void: it was lost before its end, and is made anew."""

    code = "begun_again"

    def __init__(self) -> None:
        super().__init__(
            "the answer was lost before its end and is made anew: what was told of it is void; follow it from its "
            "beginning, or wait for its end"
        )


class NoSuchDelivery(Refused):
    """No webhook of this caller has this id (any more)."""

    code = "delivery_not_found"

    def __init__(self, delivery_id: str) -> None:
        super().__init__(
            f"no webhook delivery {delivery_id[:NAME_SHOWN]} is known here (delivered ones go after a day)"
        )
        self.delivery_id = delivery_id


class AddressRefused(Refused):
    """A webhook would go to an address of an inner network, which nobody has opened to webhooks."""

    code = "address_refused"

    def __init__(self, host: str, kind: str) -> None:
        super().__init__(
            f"webhooks do not go to {host[:NAME_SHOWN]}, which is {kind}; an administrator opens it with this line in "
            f"the policy: `webhooks: {{ allow: [{host[:NAME_SHOWN]!r}] }}`"
        )


class NoSuchFile(Refused):
    """No such file; it was deleted, or its time is over."""

    code = "file_not_found"

    def __init__(self, file_id: str) -> None:
        super().__init__(f"no file {file_id!r}: it was deleted, or its time is over")


class FilesFull(Refused):
    """The caller's files hold as much as they may."""

    code = "files_full"


class FileInUse(Refused):
    """A batch that has not ended reads or writes the file."""

    code = "file_in_use"


class NoSuchBatch(Refused):
    """No such batch; it may have been forgotten."""

    code = "batch_not_found"

    def __init__(self, batch_id: str) -> None:
        super().__init__(f"no batch {batch_id!r}: there never was one, or its time is over")


class BatchLimit(Refused):
    """As many of the caller's batches are kept as may be."""

    code = "batch_limit"


class IdempotencyMismatch(Refused):
    """The Idempotency-Key was used before with another body."""

    code = "idempotency_mismatch"

    def __init__(self, used_for: str) -> None:
        super().__init__(
            f"the Idempotency-Key was used for {used_for} with another request or leave to go to a remote model"
        )


class NotEnded(Refused):
    """The job has no result yet."""

    code = "not_ended"

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(f"job {job_id} has no result yet: it is {state}")


class NotRetryable(Refused):
    """The job lives or is done, or its request is not kept."""

    code = "not_retryable"


class NoSuchLetter(Refused):
    """No dead letter of this caller has this id, or is about this job."""

    code = "letter_not_found"

    def __init__(self, letter: str) -> None:
        super().__init__(f"no dead letter {letter[:NAME_SHOWN]} is known here (the newest 10,000 are kept)")


class PolicyInvalid(Refused):
    """The policy file does not hold together; `problems` are whole sentences."""

    code = "policy_invalid"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class JobEnded(BrokerError):
    """The job was accepted and ended, but not well."""


class ColdStartDeadline(JobEnded):
    """The model was not warm before the give-up instant."""

    code = "cold_start_deadline"


class JobExpired(JobEnded):
    """No slot was free before the give-up instant."""

    code = "expired"


class WorkerLost(JobEnded):
    """The worker went away, and the answer could not be started again."""

    code = "worker_lost"


class RuntimeFailed(JobEnded):
    """The runtime broke, closed, stalled or answered with a server error."""

    code = "runtime_failed"

    def __init__(self, message: str, *, status: int = 502, retryable: bool = True) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = retryable


class RuntimeRefused(JobEnded):
    """The runtime read the request and refused it with a 4xx."""

    code = "runtime_refused"
    STATUSES: ClassVar = (400, 404, 413, 415, 422)
    """Those of a runtime that are its word on the request; any other is the runtime's own trouble."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class SlowReader(JobEnded):
    """The client reads too slowly and its frames are no longer kept."""

    code = "slow_reader"


class JobCancelled(JobEnded):
    """Somebody cancelled the job."""

    code = "cancelled"


class Lost(BrokerError):
    """A write of ours came too late or at the wrong moment; nothing was written."""


class StaleAttempt(Lost):
    """We are not the holder of the job any more: stop, quietly."""

    code = "stale_attempt"


class Moved(Lost):
    """The job is in another lane or entry than we thought."""

    code = "moved"


class StalePolicy(Lost):
    """The policy changed since we decided."""

    code = "stale_policy"


class Unjudged(Lost):
    """The job's content was not judged by the rules in force: judge it, then try again."""

    code = "unjudged"


class NotDue(Lost):
    """The instant that would allow this has not passed."""

    code = "not_due"


class FrameGap(Lost):
    """A frame is missing before this one."""

    code = "frame_gap"


class CallerBusy(Lost):
    """The job's caller runs as many jobs as its key allows: it waits on."""

    code = "caller_busy"


class NotPutBack(Lost):
    """Batch work that is not put back for interactive work: it was often enough, or would give up too soon."""

    code = "not_put_back"


class AlreadyEnded(Lost):
    """The job has ended."""

    code = "already_ended"


class LockHeld(Lost):
    """Somebody else holds it; the message says who."""

    code = "lock_held"


class BadTransition(BrokerError):
    """The lifecycle table has no such arrow: a bug of ours."""

    code = "bad_transition"


class BrokerUnavailable(BrokerError):
    """Redis does not answer."""

    code = "broker_unavailable"


class RedisFull(BrokerUnavailable):
    """Redis has no room for what was asked, and nothing happened. What it holds already goes on and ends as ever."""

    retry_after_s = 5


class RedisUnfit(BrokerUnavailable):
    """A server answers, but we cannot work with it."""

    code = "redis_unfit"


class PolicyUnreadable(BrokerUnavailable):
    """The active policy says what this version of ours does not know; `problems` are for the operator alone."""

    code = "policy_unreadable"

    def __init__(self, version: int, problems: list[str]) -> None:
        super().__init__(f"policy {version} is active, and this version of warmlane cannot read it")
        self.version, self.problems = version, problems

    def anew(self) -> "PolicyUnreadable":
        """The same to be raised: one that is kept would hold every frame that it was ever raised from."""
        return PolicyUnreadable(self.version, self.problems)


def without_quotes(error: BrokerError) -> str:
    """Gives an error's words for a log. A runtime's own may repeat the prompt: they stand behind the first colon, or
    are all there is."""
    if isinstance(error, RuntimeRefused | ContextTooLong):
        return f"the runtime refused the request ({error.code})"
    return str(error).partition(":")[0] if isinstance(error, RuntimeFailed) else str(error)


def said_without_quotes(code: str, message: str) -> str:
    """The same of an error that stands in a record, by its code and words."""
    if code in (RuntimeRefused.code, ContextTooLong.code):
        return "the runtime refused the request"
    return message.partition(":")[0] if code == RuntimeFailed.code else message
