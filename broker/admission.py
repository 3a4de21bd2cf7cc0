"""Which lane a request enters: the one it asked for, else its fallbacks, else an honest refusal."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from broker import dispatch, downgrades, errors, lanes, traces
from broker.callers import EVERYTHING, Rights
from broker.capabilities import cannot_do
from broker.hosts import Fleet
from broker.policies import Active, PolicyBook
from broker.policy import Lane
from broker.records import JobRecord
from broker.store import Store
from broker.trust import door
from broker.trust.content import Content
from broker.trust.secrets import CannotScan

log = logging.getLogger("warmlane.admission")

STALE_TRIES = 5

OLD_PICTURE_S = 0.1
"""Nobody is refused for want of a host on a picture older than this: the host may just have come."""


@dataclass(frozen=True)
class Admitted:
    """A job that was let in: its id, its lane, and whether it is an earlier job that a retry came back to."""

    job_id: str
    lane: str
    attached: bool = False


async def admit(
    store: Store,
    book: PolicyBook,
    fleet: Fleet,
    job: JobRecord,
    body: bytes,
    *,
    reader: str = "",
    idempotency_key: str = "",
    may_retry: bool = False,
    is_retry: bool = False,
    promote_within_ms: int | None = None,
    give_up_within_ms: int | None = None,
    said: bytes = b"",
    vet: Callable[[], Awaitable[None]] | None = None,
    rights: Rights = EVERYTHING,
) -> Admitted:
    """Tries the lanes that may serve the job, in order; raises Refused with the reason that helps most.

    `job.asked` is what the client wrote. `may_retry`: its SDK may send the request again; `is_retry`: it does so now.
    `rights` limit how much its caller may have, and whether its requests may leave at all. A lane that is full, or that
    has given the caller its share, spills to its fallback; a lane that no live host can serve, whose model cannot hold
    the prompt, or that leads out where the job may not leave is passed over. `give_up_within_ms`: instead of its lane's
    `maxWaitMs`; `said`: what a repeat of the Idempotency-Key must repeat, where that is more than the body.
    `vet` raises what else may be said against the job, and is asked only once no earlier job is found for the request.
    """

    async def enter(active: Active) -> Admitted:
        return await _admit(
            store,
            active,
            fleet,
            job,
            body,
            reader=reader,
            key=idempotency_key,
            may_retry=may_retry,
            promote_within_ms=promote_within_ms,
            give_up_within_ms=give_up_within_ms,
            said=said,
            rights=rights,
        )

    with traces.admission(job, fleet.now_ms) as search:
        found = await _earlier(
            store, job, body, key=idempotency_key, said=said or body, reader=reader if is_retry else ""
        )
        if found is None:
            if vet is not None:
                await vet()
            found = await _by_the_newest(book, fleet, enter)
        search.led_to = found.job_id if found.attached else ""
        return found


async def _earlier(store: Store, job: JobRecord, body: bytes, *, key: str, said: bytes, reader: str) -> Admitted | None:
    """The job that an Idempotency-Key leads to, there to be found even when no lane would take it now, or the one that
    an SDK's first try left behind, whose retry this `reader` is, "" = it is none."""
    if key:
        found = await lanes.find_by_key(
            store, caller=job.caller, key=key, endpoint=job.endpoint, body=said, consent=job.consent
        )
        return Admitted(found, "", attached=True) if found is not None else None
    left = await lanes.rejoin(store, job, body, reader=reader) if reader else None
    return Admitted(left.job_id, left.lane, attached=True) if left is not None else None


async def _by_the_newest(book: PolicyBook, fleet: Fleet, enter: Callable[[Active], Awaitable[Admitted]]) -> Admitted:
    """Enters by the policy in force, and where no host seems to be there, by a picture of the hosts that is new."""
    looked = False
    for _ in range(STALE_TRIES):
        try:
            with book.deciding() as active:
                return await enter(active)
        except errors.StalePolicy:
            await book.reload()
        except errors.ModelUnavailable:
            if looked or not await fleet.look_again(older_than_s=OLD_PICTURE_S):
                raise
            looked = True
    raise errors.ModelUnavailable("the policy changes faster than the request could be admitted", retry_after_s=1)


async def _admit(
    store: Store,
    active: Active,
    fleet: Fleet,
    job: JobRecord,
    body: bytes,
    *,
    reader: str,
    key: str,
    may_retry: bool,
    promote_within_ms: int | None,
    give_up_within_ms: int | None,
    said: bytes,
    rights: Rights,
) -> Admitted:
    asked = active.policy.route(
        job.asked,
        caller=job.caller,
        endpoint=job.endpoint,
        prompt_tokens=job.longest or job.tokens,
        priority="batch" if job.priority == "batch" else "interactive",
    )
    refusals: dict[str, errors.Refused] = {}
    full_lanes: list[str] = []
    leaving = Leaving(active, job, body)
    found_lanes = await _in_order(store, active, job, asked)
    surely = not somewhere_at_ease(active, fleet, job, found_lanes, may_leave=rights.remote)
    for lane in found_lanes:
        refusal = refuses(active, fleet, job, lane, may_leave=rights.remote, surely=surely)
        entering = job
        if refusal is None and lane.trust == "remote":
            entering, refusal = await leaving.by(lane)
        if refusal is None:
            if lane is not asked:
                own = refusals.get(asked.name)
                entering = replace(entering, spilled=own.code if own is not None else downgrades.STICKY)
            try:
                found = await lanes.submit(
                    store,
                    active,
                    fleet,
                    entering,
                    lane,
                    body,
                    asked=asked,
                    reader=reader,
                    idempotency_key=key,
                    retried=may_retry,
                    refused_by=full_lanes,
                    max_waiting=rights.max_waiting,
                    tokens_per_day=rights.tokens_per_day,
                    promote_within_ms=promote_within_ms,
                    give_up_within_ms=give_up_within_ms,
                    said=said,
                )
                return Admitted(found.job_id, found.lane, found.attached)
            except errors.LaneFull as full:
                full_lanes.append(lane.name)
                view = fleet.view(lane.name, active)
                refusal = errors.LaneFull(lane.name, retry_after_s=dispatch.retry_after_s(view, before=full.before))
            except errors.CallerShare as share:
                refusal = errors.CallerShare(
                    f"lane {lane.name}: {share}", retry_after_s=dispatch.retry_after_s(fleet.view(lane.name, active))
                )
            except errors.CallerLimit:
                raise errors.CallerLimit(
                    job.caller, retry_after_s=dispatch.retry_after_s(fleet.view(lane.name, active))
                ) from None
            except errors.DowngradesCapped:
                refusal = errors.ModelUnavailable(
                    f"no more of the requests for {asked.model} may be served by another model (maxDowngradeShare)",
                    retry_after_s=dispatch.retry_after_s(fleet.view(asked.name, active)),
                )
        refusals[lane.name] = refusal
        del refusal
    try:
        raise _most_helpful([*refusals.values()])
    finally:
        refusals.clear()  # an error that is reached from its own traceback waits for the collector


async def _in_order(store: Store, active: Active, job: JobRecord, asked: Lane) -> list[Lane]:
    """The lanes to try: the one asked for first, unless the session was promoted lately and stays on the fallback.

    Nobody stays on a remote one: requests leave only while no lane here can take them.
    """
    found = active.policy.candidates(asked)
    if not job.session or not active.policy.models[asked.model].sticky_promotion_ms:
        return found
    fallback = next((lane for lane in found if lane.model != asked.model and lane.trust == "local"), None)
    if fallback is None or not await downgrades.on_fallback(store, asked.model, job.session):
        return found
    return [fallback, *(lane for lane in found if lane is not fallback)]


class Leaving:
    """One request's way out: its content is looked into when the first remote lane comes up, once for all of them."""

    def __init__(self, active: Active, job: JobRecord, body: bytes) -> None:
        self._active = active
        self._job = job
        self._body = body
        self._content: Content | None = None

    async def by(self, lane: Lane) -> tuple[JobRecord, errors.TrustZoneRefused | None]:
        """Gives the job with the verdict on it, or why its content may not leave by this lane."""
        try:
            if self._content is None:
                self._content = await door.look_into(self._job, self._body, self._active.policy.remote)
        except CannotScan as why:
            return self._job, door.refusal(lane, (str(why),))
        verdict = door.verdict(self._content, self._active, lane)
        return verdict.onto(self._job), door.refusal(lane, verdict.against) if verdict.against else None


def somewhere_at_ease(active: Active, fleet: Fleet, job: JobRecord, lanes: list[Lane], *, may_leave: bool) -> bool:
    """Whether some lane can take the job with room for its estimated prompt and its longest answer. Where none can, a
    lane refuses only a prompt that surely is too long: the runtime may well have room for what it counts."""
    return any(refuses(active, fleet, job, lane, may_leave=may_leave) is None for lane in lanes)


def refuses(
    active: Active, fleet: Fleet, job: JobRecord, lane: Lane, *, may_leave: bool = True, surely: bool = False
) -> errors.Refused | None:
    """Says why a lane cannot take the job at all, or None; `surely` as `cannot_do` has it. Room is the script's to
    judge, and what a job holds that would leave is `Leaving`'s."""
    refusal = cannot_do(job, lane.model, active.policy.models[lane.model], surely=surely)
    refusal = refusal or door.no_consent(job, lane, may_leave=may_leave)
    if refusal is not None:
        return refusal
    view = fleet.view(lane.name, active)
    if view.availability == "unavailable":
        return errors.ModelUnavailable(
            f"{lane.model} cannot serve now: {view.reason}", retry_after_s=dispatch.back_in_s(view, fleet.now_ms())
        )
    if view.availability == "degraded" and lane.priority == "interactive":
        return errors.ModelUnavailable(f"{lane.model} is degraded: {view.reason}", retry_after_s=10)
    return None


_HELPFUL_FIRST = (
    errors.LaneFull,
    errors.CallerShare,
    errors.ModelUnavailable,
    errors.ContextTooLong,
    errors.TrustZoneRefused,
    errors.WrongEndpoint,
)


def _most_helpful(refusals: list[errors.Refused]) -> errors.Refused:
    """Full lanes come first (waiting helps), then models that are away, then what no waiting cures."""
    for kind in _HELPFUL_FIRST:
        of_kind = [r for r in refusals if isinstance(r, kind)]
        if of_kind:
            return min(of_kind, key=lambda r: getattr(r, "retry_after_s", 0))
    return refusals[0]
