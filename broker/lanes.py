"""Lanes: how a job enters one, is taken from it, moves to another, and leaves it unserved."""

import hashlib
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from broker import downgrades, errors, traces
from broker.hosts import Fleet
from broker.jobs import GoOn, closing_keys, prefixes, tell_end, tell_lost
from broker.keyspace import GROUP
from broker.lifecycle import State
from broker.policies import Active
from broker.policy import Lane, Model
from broker.records import Claimed, JobRecord, Waiting
from broker.store import Store
from broker.trust import door

log = logging.getLogger("warmlane.lanes")

WANTED_FOR_MS = 60_000
"""A request keeps its model wanted for at least this long, and up to a quarter more: the demand that wakes it."""

DAY_MS = 86_400_000
READER_LEASE_MS = 10_000
JOB_LEASE_MS = 10_000


@dataclass(frozen=True)
class Submitted:
    """What became of a submit: the job's id and lane, whether it is an earlier job that its Idempotency-Key led to."""

    job_id: str
    lane: str
    attached: bool = False


async def submit(
    store: Store,
    active: Active,
    fleet: Fleet,
    job: JobRecord,
    lane: Lane,
    body: bytes,
    *,
    asked: Lane | None = None,
    reader: str = "",
    idempotency_key: str = "",
    retried: bool = False,
    refused_by: Iterable[str] = (),
    max_waiting: int = 0,
    tokens_per_day: int = 0,
    wanted: bool = True,
    promote_within_ms: int | None = None,
    give_up_within_ms: int | None = None,
    said: bytes = b"",
) -> Submitted:
    """Puts a job into a lane if its queue budget allows; raises LaneFull, StalePolicy, IdempotencyMismatch, and
    CallerShare, CallerLimit, QuotaUsed where its caller has what it may have (`max_waiting` jobs over all lanes,
    `tokens_per_day`; 0 = no limit), ScheduleFull where the job starts later and as many of its caller's do.

    `asked` is the lane that the request asked for, where this one is its fallback; raises DowngradesCapped where too
    many of those who asked for its model are served by another one. `reader` is `api/reader-id` of the client's
    connection, attached in the same script, so that the job never lives without the one who waits for it. `retried`:
    its SDK may try again, and its retry may then `rejoin` it. `refused_by`: lanes that had no place for it just now.
    `said`: what a repeat of the Idempotency-Key must repeat, where that is more than the body. With `job.retry_of` the
    answer is the job that tries the other's request again already, if there is one; raises NotRetryable, NoSuchJob.
    With `job.batch` raises AlreadyEnded where its line is not being worked off any more.
    """
    if lane.retiring:
        raise errors.ModelUnavailable(f"lane {lane.name} is being removed")
    keys = store.keys
    idem = keys.idem(job.caller, idempotency_key) if idempotency_key else ""
    record = job.to_hash() | {"lane": lane.name, "model": lane.model}
    record["priority"] = job.priority if job.priority == "batch" else lane.priority  # a caller's bound holds in a spill
    asked = asked or lane
    record["asked_model"] = asked.model
    if idem:
        record["idem"] = idem
    fingerprint = hash_of(job.endpoint, body, job.consent, job.asked) if retried and not idem else ""
    index = keys.retries(job.caller, job.session or fingerprint or "-")
    if fingerprint:
        record["retries"] = f"{index} {fingerprint}"
    if reader and job.stream and job.mode == "sync":
        record["seen"] = 1
    fields = [x for name, value in record.items() if name not in _SET_BY_SCRIPT for x in (name, value)]
    hosts, siblings = fleet.host_keys(lane.model), [keys.lane(x) for x in active.lanes_of(lane.model)]
    promote_after = promote_after_ms(lane)
    if promote_after and promote_within_ms is not None:
        promote_after = max(1, min(promote_after, promote_within_ms))
    body_hash = hash_of(job.endpoint, said or body, job.consent) if idem else "-"
    reply = await store.run(
        "submit",
        [
            keys.lane(lane.name),
            keys.job(job.id),
            keys.request(job.id),
            keys.due,
            keys.readers(job.id),
            idem or keys.no_idem,
            keys.policy,
            keys.model(lane.model),
            keys.downgrades(asked.model),
            keys.sticky(asked.model),
            index,
            *hosts,
            *siblings,
        ],
        [
            store.now_arg(),
            job.id,
            GROUP,
            active.version,
            lane.max_queue,
            promote_after,
            lane.max_wait_ms if give_up_within_ms is None else give_up_within_ms,
            job.not_before,
            body,
            body_hash,
            int(bool(idem)),
            reader,
            READER_LEASE_MS,
            len(hosts),
            _wanted_for_ms(active, fleet, lane, record["priority"]) if wanted else 0,
            first_token_within_ms(asked, promote_within_ms),
            *downgrades.rules(active, asked.model, lane),
            fingerprint,
            max_waiting,
            tokens_per_day,
            " ".join(refused_by),
            *fields,
        ],
    )
    word, value = reply[0].decode(), reply[1].decode()
    if word == "attached":
        log.info("event=attach job=%s caller=%s", value, job.caller)
        return Submitted(value, lane.name, attached=True)
    entered = value if word == "known" else lane.name
    log.info(
        "event=submit job=%s state=%s lane=%s asked=%s caller=%s priority=%s tokens=%d%s",
        job.id, word, entered, job.asked, job.caller, record["priority"], job.tokens,
        f" spilled={job.spilled}" if job.spilled else "",
    )  # fmt: skip
    return Submitted(job.id, entered)


async def find_by_key(
    store: Store, *, caller: str, key: str, endpoint: str, body: bytes, consent: str = "local"
) -> str | None:
    """Finds the job that a caller's Idempotency-Key leads to; raises IdempotencyMismatch for another body or consent.

    Only a look: what `submit` finds in its script decides.
    """
    held = await store.command("GET", store.keys.idem(caller, key))
    if held is None:
        return None
    job_id, _, body_hash = held.decode().partition(" ")
    if not await store.command("EXISTS", store.keys.job(job_id)):
        return None
    if body_hash != hash_of(endpoint, body, consent):
        raise errors.IdempotencyMismatch(f"job {job_id}")
    return str(job_id)


async def rejoin(store: Store, job: JobRecord, body: bytes, *, reader: str) -> Submitted | None:
    """Finds the job that an SDK's first try left behind, and makes `reader` its reader; None where there is none.

    Only a job that has no reader, of the same caller, session, endpoint, lane and body, that lives or ended unheard a
    moment ago. Two retries at once never get the same one.
    """
    keys = store.keys
    fingerprint = hash_of(job.endpoint, body, job.consent, job.asked)
    found = await store.run(
        "rejoin",
        [keys.retries(job.caller, job.session or fingerprint), keys.due],
        [
            store.now_arg(),
            fingerprint,
            reader,
            READER_LEASE_MS,
            keys.job(""),
            keys.readers(""),
        ],
    )
    if not found:
        return None
    log.info("event=attach job=%s caller=%s", found[0].decode(), job.caller)
    return Submitted(found[0].decode(), found[1].decode(), attached=True)


def hash_of(endpoint: str, body: bytes, consent: str = "local", asked: str = "") -> str:
    """What makes two requests the same: one that may not leave joins none that may. An SDK's retry also asks for the
    same lane; an Idempotency-Key says enough without."""
    return hashlib.sha256(f"{endpoint}\n{consent}\n{asked}\n".encode() + body).hexdigest()[:32]


async def claim(
    store: Store,
    active: Active,
    waiting: Waiting,
    *,
    host: str,
    boot: str,
    lease_ms: int = JOB_LEASE_MS,
    runtime: Model | None = None,
    woke_at: int = 0,
) -> Claimed:
    """Takes exactly this job; raises Moved, AlreadyEnded, NoSuchJob or BadTransition when the race was lost.

    `runtime` is the definition of the runtime that would serve it now: until a worker has taken a changed one over,
    that may lead further than the lane does under the active policy. Raises TrustZoneRefused by the wider one, and
    Unjudged where it leads out and the job's content was judged by other rules. `woke_at`: when its last wake was over,
    which the job's record keeps.
    """
    lane = active.lane(waiting.lane)
    if lane is None:
        raise errors.StalePolicy(f"lane {waiting.lane} is not in the policy")
    keys = store.keys
    trust, rules, provider = door.asked_at_claim(active, lane, runtime)
    attempt, at_ms, body, *told = await store.run(
        "claim",
        [keys.lane(waiting.lane), keys.job(waiting.job), keys.due, keys.policy, keys.request(waiting.job), keys.audit],
        [
            store.now_arg(),
            waiting.job,
            GROUP,
            waiting.lane,
            waiting.entry,
            active.version,
            host,
            boot,
            lease_ms,
            trust,
            lane.model,
            rules,
            provider,
            active.policy.audit_days * DAY_MS,
            woke_at,
        ],
    )
    record = JobRecord.from_values(
        _TOLD_BY_CLAIM,
        told,
        id=waiting.job,
        lane=waiting.lane,
        entry=waiting.entry,
        state=State.CLAIMED,
        attempt=int(attempt),
        submitted_at=waiting.submitted,
        model=lane.model,
        owner=host,
        boot=boot,
        woke_at=woke_at,
        claimed_at=int(at_ms),
        lease_until=int(at_ms) + lease_ms,
    )
    _tell_claimed(record)
    return Claimed(record.attempt, record, body)


async def claimed(store: Store, waiting: Waiting, *, host: str, boot: str) -> Claimed | None:
    """Gives the hold on a job that this worker has claimed by this entry and not begun; None if it has not."""
    raw = await store.hash(store.keys.job(waiting.job))
    body = await store.command("GET", store.keys.request(waiting.job))
    if not raw or body is None:
        return None
    job = JobRecord.from_hash(raw)
    ours = job.state is State.CLAIMED and (job.lane, job.entry) == (waiting.lane, waiting.entry)
    if not ours or (job.owner, job.boot) != (host, boot):
        return None
    _tell_claimed(job)
    return Claimed(job.attempt, job, body)


def _tell_claimed(job: JobRecord) -> None:
    waited_ms = max(0, job.claimed_at - job.submitted_at)
    told = job.id, job.attempt, job.lane, job.model, job.owner, waited_ms
    log.info("event=claim job=%s attempt=%d lane=%s model=%s host=%s waited_ms=%d", *told)


async def promote(store: Store, active: Active, fleet: Fleet, job: JobRecord, to: Lane, *, late_ms: int = 0) -> None:
    """Moves a job without a first token into a fallback lane; LaneFull, TrustZoneRefused, DowngradesCapped, Moved,
    StaleAttempt tell why not. `late_ms`: how long ago its deadline was."""
    keys = store.keys
    hosts, siblings = fleet.host_keys(to.model), [keys.lane(x) for x in active.lanes_of(to.model)]
    await store.run(
        "promote",
        [
            keys.lane(job.lane),
            keys.lane(to.name),
            keys.job(job.id),
            keys.due,
            keys.policy,
            keys.model(to.model),
            keys.downgrades(job.asked_model),
            keys.sticky(job.asked_model),
            *hosts,
            *siblings,
        ],
        [
            store.now_arg(),
            job.id,
            GROUP,
            active.version,
            job.lane,
            job.entry,
            job.attempt,
            to.name,
            to.model,
            to.max_queue,
            promote_after_ms(to),
            to.trust,
            len(hosts),
            _wanted_for_ms(active, fleet, to, job.priority),
            keys.control_channel(""),
            keys.usage_prefix(),
            *downgrades.rules(active, job.asked_model, to),
        ],
    )
    log.info(
        "event=promote job=%s attempt=%d lane=%s to=%s late_ms=%d", job.id, job.attempt, job.lane, to.name, late_ms
    )
    if job.state is State.QUEUED:
        traces.waited(job, until_ms=fleet.now_ms(), outcome="promoted")


async def release_due(store: Store, active: Active, fleet: Fleet, job: JobRecord, lane: Lane) -> None:
    """Moves a scheduled job whose start has come into its lane; raises LaneFull, CallerShare,
    CallerLimit, NotDue."""
    keys = store.keys
    hosts, siblings = fleet.host_keys(lane.model), [keys.lane(x) for x in active.lanes_of(lane.model)]
    await store.run(
        "release_due",
        [keys.lane(lane.name), keys.job(job.id), keys.due, keys.policy, keys.model(lane.model), *hosts, *siblings],
        [
            store.now_arg(),
            job.id,
            GROUP,
            active.version,
            lane.name,
            lane.max_queue,
            promote_after_ms(lane),
            len(hosts),
            _wanted_for_ms(active, fleet, lane, job.priority),
        ],
    )
    log.info("event=release_due job=%s lane=%s", job.id, lane.name)
    traces.waited(job, until_ms=fleet.now_ms(), outcome="started")


async def postpone(store: Store, job: JobRecord, *, after_ms: int) -> None:
    """Says when to try again to promote or start a job that could not move."""
    await store.run(
        "postpone", [store.keys.job(job.id), store.keys.due], [store.now_arg(), job.id, job.entry, after_ms]
    )


async def expire(
    store: Store, job: JobRecord, error: errors.JobEnded | errors.ModelUnavailable, *, early: bool = False
) -> None:
    """Ends a job that still waits at its give-up instant, or `early`, where nothing can come of it until then; raises
    NotDue."""
    args = [store.now_arg(), job.id, GROUP, *prefixes(store), job.lane, job.entry, error.code, str(error), int(early)]
    await store.run("expire", closing_keys(store, job.id, job.lane), args)
    log.warning("event=expire job=%s lane=%s code=%s reason=%s", job.id, job.lane, error.code, error)
    await tell_end(store, job)


async def recover(
    store: Store, job: JobRecord, *, max_losses: int, host: str = "", boot: str = "", go_on: GoOn | None = None
) -> bool:
    """Puts a job back whose worker is lost, or ends it `worker_lost`; True if it waits again. Raises NotDue, and Moved
    when frames came since `go_on` was judged.

    A worker that has its name for itself passes `host` and `boot`: jobs of its earlier lives need no lease to end.
    """
    message = f"the worker on {job.owner or 'its host'} went away while it served this request"
    args = [store.now_arg(), job.id, GROUP, *prefixes(store), job.attempt, max_losses, message, host, boot]
    args += GoOn.args(go_on)
    reply = await store.run("recover", closing_keys(store, job.id, job.lane), args)
    again = bool(reply[0] == b"queued")
    log.warning(
        "event=recover job=%s attempt=%d lane=%s owner=%s outcome=%s",
        job.id, job.attempt, job.lane, job.owner, "queued" if again else "failed",
    )  # fmt: skip
    await tell_lost(store, job, again=again)
    return again


async def held_by(store: Store, lane: str, host: str, *, limit: int = 1000) -> list[str]:
    """Lists the jobs of a lane that a host's consumer holds."""
    found = []
    for entry in await held_entries(store, lane, host=host, limit=limit):
        for entry_id, values in await store.command("XRANGE", store.keys.lane(lane), entry, entry):
            found.append(Waiting.from_entry(lane, entry_id, values).job)
    return found


async def held_entries(store: Store, lane: str, *, host: str = "", limit: int) -> list[str]:
    """Lists the oldest held entries of a lane, of one host or of all, as the pending list shows them."""
    consumer = [host] if host else []
    try:
        rows = await store.command("XPENDING", store.keys.lane(lane), GROUP, "-", "+", limit, *consumer)
    except errors.BrokerUnavailable as e:
        if "NOGROUP" in str(e):
            return []
        raise
    ids = (row["message_id"] if isinstance(row, dict) else row[0] for row in rows)
    return [entry.decode() if isinstance(entry, bytes) else str(entry) for entry in ids]


async def sweep(store: Store, lane: str, *, page: int = 200) -> tuple[int, int]:
    """Repairs a lane, page by page; gives the entries removed and the instants restored."""
    removed = restored = 0
    at = "-"
    while True:
        args = [GROUP, lane, store.keys.job(""), at, page]
        reply = await store.run("sweep", [store.keys.lane(lane), store.keys.due], args)
        removed, restored = removed + int(reply[1]), restored + int(reply[2])
        at = reply[0].decode()
        if not at:
            return removed, restored


async def retire(store: Store, lane: str) -> bool:
    """Lets a retiring lane go if nothing waits or runs in it any more."""
    return bool(await store.run("retire", [store.keys.lane(lane), store.keys.policy], [lane]))


async def waiting_entries(store: Store, lane: str, *, limit: int, after: str = "") -> AsyncIterator[Waiting]:
    """Lists the oldest entries of a lane, or of those behind an entry, waiting and held alike; the claim decides which
    is which."""
    first = f"({after}" if after else "-"
    for entry, values in await store.command("XRANGE", store.keys.lane(lane), first, "+", "COUNT", limit) or []:
        yield Waiting.from_entry(lane, entry, values)


def _wanted_for_ms(active: Active, fleet: Fleet, lane: Lane, priority: object) -> int:
    """For how long a job that enters a lane keeps its model wanted; 0 = it is batch work that does not wake it now."""
    wakes = active.wakes(lane.model, priority=str(priority), now_ms=fleet.now_ms())
    return WANTED_FOR_MS if wakes else 0


def promote_after_ms(lane: Lane) -> int:
    """How long a job waits in this lane before its fallback is tried; 0 = there is none."""
    return max(1, lane.cold_start_budget_ms) if lane.fallback else 0


def first_token_within_ms(asked: Lane, promote_within_ms: int | None) -> int:
    """How soon the first token must come to be in time: the cold-start budget of the lane asked for, or what the client
    said if that is sooner; 0 = batch work, which nobody judges."""
    if asked.priority == "batch":
        return 0
    budget_ms = asked.cold_start_budget_ms if promote_within_ms is None else promote_within_ms
    return max(1, min(asked.cold_start_budget_ms, budget_ms))


_TOLD_BY_CLAIM = (
    "zone",
    "endpoint",
    "stream",
    "include_usage",
    "choices",
    "mode",
    "priority",
    "session",
    "tokens",
    "put_backs",
    "continues",
    "last_seq",
    "leaves",
    "trace",
)

_SET_BY_SCRIPT = frozenset(
    {
        "state",
        "submitted_at",
        "promote_at",
        "give_up_at",
        "policy_version",
        "not_before",
        "queued_at",
        "first_token_by",
        "asked_number",
    }
)
