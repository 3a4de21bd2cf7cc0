"""One client's wait for one job: how it is let in, what it may ask for, and how it leaves."""

import asyncio
import logging
import math
import re
from dataclasses import dataclass, replace
from typing import Protocol

from ulid import ULID

from api.exchange import Exchange
from api.gateway import Gateway
from api.letting_in import JOIN_TRIES, let_in
from api.voices import CountedVoice, voice_of
from broker import admission, dispatch, errors, jobs, lanes, requests
from broker.callers import Rights
from broker.frames import FrameReader
from broker.lifecycle import ENDED, State
from broker.metrics import OTHER
from broker.records import JobRecord
from broker.store import OUTAGE_LIMIT_S

log = logging.getLogger("warmlane.api")

QUICK_S = 0.05
"""An answer that began within this is not worth a look into the job's record for its headers."""
RECORD_S_MAX = 0.25

PATIENCE_SHARE = 0.8
"""The part of an SDK's read timeout after which a fallback is tried: it has to answer within the rest. It is also the
longest silence that the client has to bear, for its timeout counts anew with each byte."""
PATIENCE_S_MIN = 0.5

WITHIN_MS_MAX = 86_400_000

_MS = re.compile(r"[0-9]{1,8}")
_SECONDS = re.compile(r"\d{1,6}(\.\d{1,9})?")
KEY = re.compile(r"[\x21-\x7e]{1,255}")
SESSION = re.compile(r"[\x21-\x7e]{1,128}")
_model_in = re.compile(rb'"model"\s*:\s*"([^"\\]{1,128})"').search


def tries_again(retry_count: str) -> bool:
    """Whether an SDK says so, by the number of its tries before this one."""
    return retry_count.strip("0").isdecimal()


def leave_of(text: str) -> bool | None:
    """Reads X-Gateway-Allow-Remote, None = it was not sent; raises BadRequest."""
    told = text.lower()
    if told not in ("", "true", "false"):
        raise errors.BadRequest("X-Gateway-Allow-Remote must be true or false", "X-Gateway-Allow-Remote")
    return None if told == "" else told == "true"


def idempotency_key_of(text: str) -> str:
    """Reads Idempotency-Key, "" = it was not sent; raises BadRequest."""
    if text and not KEY.fullmatch(text):
        raise errors.BadRequest("Idempotency-Key must be 1 to 255 visible characters", "Idempotency-Key")
    return text


class Asking(Protocol):
    """Whoever has the headers of a request."""

    headers: dict[bytes, bytes]

    def header(self, name: bytes) -> str:
        """Gives a header's text, "" if it was not sent."""


@dataclass(frozen=True)
class Wishes:
    """What the headers of a request ask of the gateway."""

    lane: str = ""
    session: str = ""
    leave: bool | None = None
    promote_within_ms: int | None = None
    patience_s: float = math.inf  # how long the client is to hear nothing
    idempotency_key: str = ""
    traceparent: str = ""
    keep: bool = False
    may_retry: bool = False
    is_retry: bool = False

    @classmethod
    def of(cls, exchange: Asking) -> "Wishes":
        """Reads the headers; raises BadRequest."""
        header = exchange.header
        on_disconnect = header(b"x-gateway-on-disconnect").lower()
        if on_disconnect not in ("", "keep", "cancel"):
            raise errors.BadRequest("X-Gateway-On-Disconnect must be keep or cancel", "X-Gateway-On-Disconnect")
        key = idempotency_key_of(header(b"idempotency-key"))
        session = header(b"x-session-affinity")
        if session and not SESSION.fullmatch(session):
            raise errors.BadRequest("X-Session-Affinity must be 1 to 128 visible characters", "X-Session-Affinity")
        within = header(b"x-slo-ttft-ms")
        if within and not (_MS.fullmatch(within) and 0 < int(within) <= WITHIN_MS_MAX):
            raise errors.BadRequest("X-SLO-TTFT-Ms must be a whole number of milliseconds above 0", "X-SLO-TTFT-Ms")
        return cls(
            lane=header(b"x-gateway-lane"),
            session=session,
            leave=leave_of(header(b"x-gateway-allow-remote")),
            promote_within_ms=_soonest_ms(within, header(b"x-stainless-read-timeout")),
            patience_s=_patience_s(header(b"x-stainless-read-timeout"), header(b"x-stainless-timeout")),
            idempotency_key=key,
            traceparent=header(b"traceparent"),
            keep=on_disconnect == "keep",
            may_retry=on_disconnect != "cancel" and (bool(key) or _is_sdk(exchange)),
            is_retry=not key and tries_again(header(b"x-stainless-retry-count")),
        )

    def grace_ms(self, disconnect_grace_ms: int) -> int:
        """How long the job outlives its last reader, in the words of the job record."""
        if self.keep:
            return -1
        return disconnect_grace_ms if self.may_retry else 0


class Visit:
    """A client at a job."""

    def __init__(
        self,
        gateway: Gateway,
        exchange: Exchange,
        job: JobRecord,
        *,
        rights: Rights,
        hold_s: float,
        patience_s: float = math.inf,
    ) -> None:
        self.exchange = exchange
        self.stream = job.stream
        self.background = job.mode == "async"
        self.known = False
        """Whether the client knows by its id which job it can come back to."""
        self.voice = voice_of(job)
        self.hold_s = min(hold_s, patience_s)
        self.patience_s = patience_s
        self.job_id = job.id
        self.lane = ""
        self.delivered = False
        self.reader: FrameReader = gateway.hub.open(job.id)
        self.loop = asyncio.get_running_loop()
        self.entered_at = self.loop.time()
        self._gateway = gateway
        self._job = job
        self._rights = rights
        self._name = gateway.reader_name()
        self._attached = False
        self._anew = False
        self._away_since = 0.0
        self._model = ""

    @property
    def redis_came_back(self) -> bool:
        """Whether the connection to Redis is younger than this visit: it may have lost what was written before."""
        return self._gateway.store.answering_s < self.loop.time() - self.entered_at

    async def enter(self, body: bytes, wishes: Wishes) -> None:
        """Lets the job in, or finds the one that an Idempotency-Key leads to; raises Refused, ClientGone."""
        gateway = self._gateway
        with requests.told_of_lanes(wishes.lane):
            try:
                admitted = await self._let_in(body, wishes)
            except errors.Refused as refusal:
                gateway.metrics.refused(gateway.known_lane(getattr(refusal, "lane", self._job.asked)), refusal.code)
                raise
        self.lane = admitted.lane
        if not self.exchange.started:  # else the client has heard this voice already
            self.voice = voice_of(replace(self._job, id=self.job_id), body)
            if isinstance(self.voice, CountedVoice):
                self.exchange.event_of = self.voice.failed
        elif isinstance(self.voice, CountedVoice):
            self.voice.taken_over(self.job_id)
        gateway.readers.add(self._name, self.job_id, sees=self._sees)
        gateway.metrics.submitted(gateway.known_lane(self.lane), attached=admitted.attached)

    async def enter_anew(self, body: bytes, wishes: Wishes) -> bool:
        """Hands the job in once more when a Redis came back without it; False if that would not be honest.

        Even with an append-only file a killed Redis may lose its last writes while it waits for the disk. The client
        still waits, and nothing of an answer has reached it. It is a new job: a worker that still holds the lost one
        must not be taken for the holder of this.
        """
        gateway = self._gateway
        if self.delivered or self._attached or self._anew or not self.redis_came_back:
            return False
        self._job = replace(self._job, id=str(ULID()))
        log.warning("event=enter_anew job=%s lost=%s reason=Redis came back without it", self._job.id, self.job_id)
        self._anew, self.job_id = True, self._job.id
        gateway.readers.drop(self._name)
        gateway.hub.close(self.reader)
        self.reader = gateway.hub.open(self.job_id)
        await self.enter(body, wishes)
        return True

    async def leave(self) -> None:
        """The client went away: its job ends, unless a retry may still come back to it or it was to be kept."""
        self._gateway.readers.drop(self._name)
        grace_ms = self._job.grace_ms
        nobody_returns = not self._attached and (grace_ms == 0 or (grace_ms > 0 and self.delivered))
        try:
            left = await self._take_off()
            if left == 0 and nobody_returns:  # but a retry may have come since
                await jobs.cancel(self._gateway.store, self.job_id, message="its client hung up", only="unread")
        except (errors.NoSuchJob, errors.AlreadyEnded, errors.NotDue):
            pass
        except errors.BrokerUnavailable as e:  # then the end of the lease does it
            log.debug("event=leave_later job=%s reason=%s", self.job_id, e)

    async def detach(self) -> None:
        """Leaves without a judgement on the job: its client comes back, or this process ends, not its interest."""
        self._gateway.readers.drop(self._name)
        try:
            await self._take_off()
        except errors.BrokerError as e:
            log.debug("event=leave_later job=%s reason=%s", self.job_id, e)

    def close(self) -> None:
        """Forgets the reader."""
        self._gateway.readers.drop(self._name)
        self._gateway.hub.close(self.reader)

    def retry_after_s(self) -> int:
        """In how many seconds the job's lane should have a place, as far as this process can see."""
        if not self._gateway.book.present or not self.lane:
            return 1
        return dispatch.retry_after_s(self._gateway.fleet.view(self.lane))

    async def note(self) -> str:
        """Says how the job does, for a heartbeat; raises BrokerUnavailable once Redis has been away for too long."""
        try:
            async with asyncio.timeout(RECORD_S_MAX):
                words = await _words(self._gateway, await jobs.read(self._gateway.store, self.job_id))
        except (errors.BrokerUnavailable, TimeoutError):
            now = self.loop.time()
            self._away_since = self._away_since or now
            if now - self._away_since > OUTAGE_LIMIT_S:
                raise errors.BrokerUnavailable(f"Redis has been away for {OUTAGE_LIMIT_S:.0f} s") from None
            return "waiting: Redis does not answer at the moment"
        self._away_since = 0.0
        return words

    async def begun(self, first: bytes) -> list[tuple[bytes, bytes]]:
        """Notes that the answer has begun, with these bytes; gives the headers that tell of it, as far as known."""
        waited_s = self.loop.time() - self.entered_at
        found = _model_in(first)
        model = found.group(1).decode() if found else ""
        lane, queue_s, served_by = self.lane, 0.0, self._on_its_host(model)
        first_token_ms = None if self._attached else round(waited_s * 1000)  # the job may be older than this visit
        told = [(b"x-gateway-job", self.job_id.encode())]
        if self._attached or waited_s > QUICK_S or not model:
            record = await self._record()
            if record is not None:
                lane, model = record.lane, record.model
                served_by = record.served_by or (f"{model}@{record.owner}" if record.owner else served_by)
                queue_s = max(0, record.claimed_at - record.submitted_at) / 1000
                told.append((b"x-gateway-queue-ms", str(round(queue_s * 1000)).encode()))
                if self._attached and record.first_token_at:
                    first_token_ms = record.first_token_at - record.submitted_at
        metrics, entered = self._gateway.metrics, self._gateway.known_lane(self.lane)
        metrics.queue_wait(entered, queue_s, job=self.job_id)
        metrics.first_token(entered, self._known_model(model), waited_s, job=self.job_id)
        if lane:
            told.append((b"x-gateway-lane", lane.encode()))
        if first_token_ms is not None:
            told.append((b"x-gateway-first-token-ms", str(first_token_ms).encode()))
        if served_by:
            told.append((b"x-gateway-served-by", served_by.encode("latin-1", "replace")))
        self._model = model
        return told

    def waiting_headers(self) -> list[tuple[bytes, bytes]]:
        """What can be said in headers before the answer has begun."""
        found = [(b"x-gateway-job", self.job_id.encode())]
        return [*found, (b"x-gateway-lane", self.lane.encode())] if self.lane else found

    def finished(self) -> None:
        """Notes that the whole answer came."""
        lane, model = self._gateway.known_lane(self.lane), self._known_model(self._model)
        self._gateway.metrics.generation(lane, model, self.loop.time() - self.entered_at, job=self.job_id)

    @property
    def _sees(self) -> bool:
        """Whether what this client is given of the answer must stand."""
        return self.stream and not self.background

    async def _take_off(self) -> int:
        return await jobs.detach(self._gateway.store, self.job_id, reader=self._name, comes_back=self.known)

    async def _let_in(self, body: bytes, wishes: Wishes) -> admission.Admitted:
        for _ in range(JOIN_TRIES):
            admitted = await self._admit(body, wishes)
            if not admitted.attached or await self._join(admitted.job_id, by_key=bool(wishes.idempotency_key)):
                return admitted
        raise errors.ModelUnavailable("the earlier jobs of this request end as fast as they begin", retry_after_s=1)

    async def _admit(self, body: bytes, wishes: Wishes) -> admission.Admitted:
        g = self._gateway

        async def admit() -> admission.Admitted:
            return await admission.admit(
                g.store,
                g.book,
                g.fleet,
                self._job,
                body,
                reader=self._name,
                idempotency_key=wishes.idempotency_key,
                may_retry=wishes.may_retry,
                is_retry=wishes.is_retry,
                promote_within_ms=wishes.promote_within_ms,
                rights=self._rights,
            )

        return await let_in(g.store, self._job.id, admit, why_not=lambda: self.exchange.why)

    async def _join(self, job_id: str, *, by_key: bool) -> bool:
        """Follows the earlier job from its first frame; False where it is gone, or ended so just now that it frees its
        key: then the request is a new one."""
        g = self._gateway
        try:
            state, _, _ = await jobs.attach(
                g.store, job_id, reader=self._name, lease_ms=lanes.READER_LEASE_MS, sees=self._sees
            )  # fmt: skip
        except errors.NoSuchJob:
            return False
        if by_key and state in ENDED - {State.DONE}:
            return False
        g.hub.close(self.reader)
        self.job_id, self._attached = job_id, True
        self.reader = g.hub.open(job_id)
        self.reader.look()
        return True

    async def _record(self) -> JobRecord | None:
        try:
            async with asyncio.timeout(RECORD_S_MAX):
                return await jobs.read(self._gateway.store, self.job_id)
        except (errors.BrokerError, TimeoutError):
            return None

    def _on_its_host(self, model: str) -> str:
        hosts = self._gateway.fleet.picture.on_host.get(model, {})
        return f"{model}@{next(iter(hosts))}" if len(hosts) == 1 else model

    def _known_model(self, model: str) -> str:
        book = self._gateway.book
        return model if book.present and book.active.model(model) is not None else OTHER


async def _words(gateway: Gateway, job: JobRecord) -> str:
    now = gateway.fleet.picture.at_ms
    if job.owner and job.first_token_at:
        return f"{job.model} on {job.owner} is generating"
    if job.owner:
        return f"{job.model} on {job.owner} reads the prompt, {max(0, now - job.claimed_at) // 1000} s so far"
    wait = await gateway.waits.of(job)
    words = wait.words() if wait is not None else f"the job is {job.state.value}"
    return f"the answer broke off and goes on as soon as it can: {words}" if job.continue_by else words


def _soonest_ms(within_ms: str, read_timeout_s: str) -> int | None:
    """How soon the first token is wanted: as the client says, and before its SDK hangs up. What an SDK says of itself
    may be anything, such as the 600 s that nobody chose or no number at all; then it says nothing."""
    found = [int(within_ms)] if within_ms else []
    if timeout_s := _seconds(read_timeout_s):
        found.append(max(1, round(timeout_s * 1000 * PATIENCE_SHARE)))
    return min(found, default=None)


def _patience_s(*timeouts_s: str) -> float:
    """How long a client is to hear nothing: Python's SDKs hang up after so long without a byte, Node's when no headers
    came within theirs."""
    found = [seconds for text in timeouts_s if (seconds := _seconds(text))]
    return max(PATIENCE_S_MIN, min(found) * PATIENCE_SHARE) if found else math.inf


def _seconds(text: str) -> float:
    return float(text) if _SECONDS.fullmatch(text) else 0.0


def _is_sdk(exchange: Asking) -> bool:
    return any(name.startswith(b"x-stainless-") for name in exchange.headers)
