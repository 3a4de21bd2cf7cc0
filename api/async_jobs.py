"""Jobs without a client that waits: what the body of POST /v1/jobs asks for, and how such a job is let in.

The generation's own body is cut out of the bytes that came, so a runtime gets it as its client wrote it.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from api import letting_in
from api.durations import instant_ms, length_ms
from api.gateway import Gateway
from api.visit import Wishes
from broker import admission, errors, jobs, kept, requests, webhooks
from broker.callers import Caller, Rights
from broker.dialects import openai
from broker.dialects.bounds import read_request
from broker.lifecycle import ENDED, State
from broker.policy.sentences import meant_or_known
from broker.records import JobRecord
from broker.trust import addresses

log = logging.getLogger("warmlane.api")

AHEAD_MS_MAX: Final = 30 * 86_400_000
"""How far ahead a job may start, and how long it may wait from there."""
EXPIRES_MS_MIN: Final = 1_000
AGAIN_MAX: Final = 100
"""How many jobs that tried the same request are looked through for the newest."""
LANE_CHARACTERS_MAX: Final = 256
METADATA_KEYS_MAX, METADATA_KEY_CHARACTERS_MAX, METADATA_TEXT_CHARACTERS_MAX = 16, 64, 512
"""OpenAI's bounds."""

_KEYS = ("endpoint", "body", "lane", "webhook", "metadata", "notBefore", "expiresAfter", "priority")


@dataclass(frozen=True)
class Order:
    """What is to be generated, and how the job is to go."""

    body: bytes
    endpoint: str = openai.PATH
    lane: str = ""
    lane_param: str = "lane"  # what of the request named it
    webhook: str = ""
    metadata: str = ""
    not_before: int = 0  # ms since 1970, 0 = now
    give_up_within_ms: int | None = None  # counted from its start; None = as its lane says
    priority: str = "batch"
    retry_of: str = ""


def read_order(said: bytes, wishes: Wishes, *, now_ms: int) -> Order:
    """Reads the body of POST /v1/jobs, which counts before the headers; raises BadRequest."""
    members = {member.key: member for member in read_request(said)}
    for key in members:
        if key not in _KEYS:
            shown = key[: errors.NAME_SHOWN]
            raise errors.BadRequest(f"unknown key {shown!r}{meant_or_known(key, _KEYS)}", shown)
    asked = {key: member.value for key, member in members.items() if member.value is not None}
    if not isinstance(asked.get("body"), dict):
        raise errors.BadRequest("body must be the object that the endpoint takes", "body")
    body, lane = members["body"], _lane(asked.get("lane", ""))
    return Order(
        body=said[body.start : body.end],
        endpoint=_one_of(asked, "endpoint", tuple(requests.ENDPOINTS), openai.PATH),
        lane=lane or wishes.lane,
        lane_param="lane" if lane else "X-Gateway-Lane",
        webhook=_webhook(asked.get("webhook", "")),
        metadata=_metadata(asked.get("metadata", {})),
        not_before=_not_before(asked.get("notBefore"), now_ms),
        give_up_within_ms=_expires_after(asked.get("expiresAfter")),
        priority=_one_of(asked, "priority", ("batch", "interactive"), "batch"),
    )


def job_of(gateway: Gateway, order: Order, wishes: Wishes, caller: Caller) -> JobRecord:
    """Writes the job that an order asks for; raises BadRequest, UnknownModel, UnknownLane, LaneForbidden."""
    if order.priority == "interactive" and caller.rights.priority == "batch":
        raise errors.LaneForbidden(f"the key of {caller.name} is for batch work: its jobs may not be interactive")
    asked = requests.ENDPOINTS[order.endpoint].read(order.body)
    if asked.nothing is not None:
        raise errors.BadRequest("the gateway answers this request itself: ask the endpoint", "body")
    with gateway.book.deciding() as active, requests.told_of_lanes(order.lane, param=order.lane_param):
        job = requests.job_of(
            order.endpoint, asked, active, caller, lane=order.lane, session=wishes.session, leave=wishes.leave,
            traceparent=wishes.traceparent,
        )  # fmt: skip
    return replace(
        job,
        mode="async",
        priority=order.priority,
        keep_ms=active.policy.keep_async_ms,
        not_before=order.not_before,
        webhook=order.webhook,
        metadata=order.metadata,
        retry_of=order.retry_of,
    )


async def again(gateway: Gateway, old: JobRecord, caller: Caller) -> JobRecord:
    """Tries the request of a job that ended badly once more, as a new job of the same caller, or gives the job that
    does so already. It starts no sooner than the other was to. Raises NotRetryable, UnknownCaller, and what POST
    /v1/jobs may be refused with."""
    for _ in range(AGAIN_MAX):  # the newest of those that tried it: two of them never go on side by side
        known = await jobs.find(gateway.store, old.retried_as) if old.retried_as else None
        if known is None:
            break
        if known.live or known.state is State.DONE:
            return known
        old = known
    if old.live or old.state is State.DONE:
        raise errors.NotRetryable(f"job {old.id} is {old.state.value}: there is nothing to try again")
    body = await kept.request_of(gateway.store, old.id)
    if not body:
        raise errors.NotRetryable(f"the request of job {old.id} is not kept")
    owner = caller if caller.name == old.caller else _owner(gateway, old.caller)
    order = Order(
        body,
        old.endpoint,
        lane=old.asked,
        webhook=old.webhook,
        metadata=old.metadata,
        not_before=old.not_before if old.not_before > await gateway.store.now_ms() else 0,
        give_up_within_ms=old.give_up_at - max(old.submitted_at, old.not_before),
        priority="batch" if owner.rights.priority == "batch" else old.priority,
        retry_of=old.id,
    )
    leave = None if old.exits else old.zone == "remote"
    job = _no_further(job_of(gateway, order, Wishes(session=old.session, leave=leave), owner), old)
    return await let_in(gateway, job, order, rights=owner.rights)


def _no_further(job: JobRecord, old: JobRecord) -> JobRecord:
    """The job, leaving by no lane by which the one that it tries again could not, whatever its key allows by now."""
    if not old.exits:
        return job
    exits = " ".join(sorted({*job.exits.split()} & {*old.exits.split()}))
    return replace(job, exits=exits, zone=job.zone if exits else "local")


def _owner(gateway: Gateway, name: str) -> Caller:
    """Whose job an administrator tries again, with the rights that it has now; raises UnknownCaller."""
    rights = gateway.keys.rights_of(name)
    if rights is None and gateway.keys and name not in gateway.keys.names:
        raise errors.UnknownCaller(name)
    return Caller(name) if rights is None else Caller(name, rights)


async def let_in(
    gateway: Gateway, job: JobRecord, order: Order, *, rights: Rights, key: str = "", said: bytes = b""
) -> JobRecord:
    """Lets a job in, or finds the one that an Idempotency-Key leads to; gives it as it is now. Raises Refused.

    An ended job that freed its key is nobody's answer: then the request is a new one.
    """
    for _ in range(letting_in.JOIN_TRIES):
        try:
            admitted = await _admit(gateway, job, order, rights=rights, key=key, said=said)
        except errors.Refused as refusal:
            gateway.metrics.refused(gateway.known_lane(getattr(refusal, "lane", job.asked)), refusal.code)
            raise
        found = await jobs.find(gateway.store, admitted.job_id)
        if found is None:
            continue
        if not admitted.attached or found.state not in ENDED - {State.DONE}:
            gateway.metrics.submitted(gateway.known_lane(found.lane), attached=admitted.attached)
            return found
    raise errors.ModelUnavailable("the earlier jobs of this request end as fast as they begin", retry_after_s=1)


async def _admit(
    gateway: Gateway, job: JobRecord, order: Order, *, rights: Rights, key: str, said: bytes
) -> admission.Admitted:
    async def vet() -> None:  # whoever is to be told of its end must be one whom somebody may tell
        if job.webhook:
            allow = gateway.book.active.policy.webhooks.allow
            await webhooks.accept(gateway.store, caller=job.caller, url=job.webhook, allow=allow)

    async def admit() -> admission.Admitted:
        with requests.told_of_lanes(order.lane, param=order.lane_param):
            return await admission.admit(
                gateway.store,
                gateway.book,
                gateway.fleet,
                job,
                order.body,
                idempotency_key=key,
                give_up_within_ms=order.give_up_within_ms,
                said=said,
                vet=vet,
                rights=rights,
            )

    return await letting_in.let_in(gateway.store, job.id, admit, why_not=lambda: None)


def _one_of(asked: Mapping[str, Any], key: str, allowed: tuple[str, ...], default: str) -> str:
    value = asked.get(key, default)
    if value not in allowed:
        raise errors.BadRequest(f"{key} must be one of {', '.join(allowed)}", key)
    return str(value)


def _lane(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LANE_CHARACTERS_MAX or not value.isprintable():
        raise errors.BadRequest("lane must be the name of a lane", "lane")
    return value


def _webhook(value: Any) -> str:
    """Reads where the job's end is to be told."""
    if value == "":
        return ""
    if not isinstance(value, str):
        raise errors.BadRequest("webhook must be the URL that is told of the job's end", "webhook")
    addresses.target_of(value)
    return value


def _metadata(value: Any) -> str:
    if not isinstance(value, dict) or len(value) > METADATA_KEYS_MAX:
        raise errors.BadRequest(f"metadata must be an object of at most {METADATA_KEYS_MAX} keys", "metadata")
    for key, text in value.items():
        if not isinstance(text, str) or len(text) > METADATA_TEXT_CHARACTERS_MAX:
            raise errors.BadRequest(
                f"a value of metadata must be a text of at most {METADATA_TEXT_CHARACTERS_MAX} characters", "metadata"
            )
        if not 0 < len(key) <= METADATA_KEY_CHARACTERS_MAX:
            raise errors.BadRequest(
                f"a key of metadata must have 1 to {METADATA_KEY_CHARACTERS_MAX} characters", "metadata"
            )
    noted = json.dumps(value, separators=(",", ":"), ensure_ascii=False) if value else ""
    try:
        noted.encode()
    except UnicodeEncodeError:
        raise errors.BadRequest("metadata may hold no halves of surrogate pairs", "metadata") from None
    return noted


def _not_before(value: Any, now_ms: int) -> int:
    if value is None:
        return 0
    try:
        at = instant_ms(value, now_ms=now_ms)
    except (ValueError, OverflowError) as wrong:
        raise errors.BadRequest(f"notBefore {wrong}", "notBefore") from None
    if at > now_ms + AHEAD_MS_MAX:
        raise errors.BadRequest(f"notBefore may be {AHEAD_MS_MAX // 86_400_000} days ahead at most", "notBefore")
    return at if at > now_ms else 0


def _expires_after(value: Any) -> int | None:
    if value is None:
        return None
    try:
        length = length_ms(value if isinstance(value, str) else str(value))
    except ValueError as wrong:
        raise errors.BadRequest(f"expiresAfter: {wrong}", "expiresAfter") from None
    if not EXPIRES_MS_MIN <= length <= AHEAD_MS_MAX:
        raise errors.BadRequest(f"expiresAfter must be 1s to {AHEAD_MS_MAX // 86_400_000}d", "expiresAfter")
    return length
