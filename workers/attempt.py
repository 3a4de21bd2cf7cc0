"""One attempt at one job, as straight-line code: ask the runtime, pass its bytes on, end the job.

Every write carries the attempt. A write that is refused as stale means that somebody else decides about the job now:
the attempt closes its connection and says nothing more.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from broker import continuing, errors, jobs
from broker.dialects.openai_stream import read_complaint
from broker.jobs import Holding
from broker.records import Claimed
from broker.store import Store
from workers.asking import Asking
from workers.runtimes.base import KEY_REFUSED, Endpoint, refusal_words, without_key
from workers.stream_client import Exchange, StreamClient, UpstreamLost

log = logging.getLogger("warmlane.attempt")

BUFFER_BYTES = 1 << 20
"""Bytes that may wait for Redis before the runtime is made to wait."""

ERROR_BODY_BYTES = 1 << 16
LOOK_EVERY_S = 0.5
BUSY = (429, 503)
NO_SUCH_PAGE = (404, 405)
PAUSE_S = 1.0
PAUSE_MAX_S = 60.0
"""How long a busy runtime is left alone: this long where it does not say, and at most so long where it does."""

LAST_BYTES_S = 1.0
"""How long the connection may stay open after the last finish reason before the answer counts as whole."""


@dataclass(frozen=True)
class Limits:
    """What one attempt may take."""

    first_token_timeout_ms: int
    stall_timeout_ms: int
    max_losses: int
    go_on_within_ms: int | None = None  # how long a half-told answer may wait for another attempt; None = it ends


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, for the slot and for what is learned of the model. Times in ms."""

    outcome: str  # done | failed | released | stopped
    clean: bool  # the runtime closed the answer itself: its slot is free
    suspect: bool = False  # the runtime itself may be gone
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    usage: dict[str, int] | None = None
    timings: dict[str, Any] | None = None  # the runtime's own, where it tells them
    code: str = ""  # of the error that ended it
    whole: bool = True  # else it went on with an earlier attempt's answer, and its times teach nothing


@dataclass(frozen=True)
class Refusal:
    """The runtime wants none of our requests: for some seconds, or, with `reason`, until somebody mends it."""

    pause_s: float = 0.0
    reason: str = ""


class Attempt:
    """Runs one claimed job against one endpoint."""

    def __init__(
        self,
        store: Store,
        client: StreamClient,
        claimed: Claimed,
        endpoint: Endpoint,
        limits: Limits,
        *,
        served_by: str,
        traceparent: str = "",
        slot: int | None = None,
        on_refusal: Callable[[Refusal], None] = lambda _refusal: None,
    ) -> None:
        self.job = claimed.record
        self.held = Holding(self.job.id, self.job.lane, claimed.attempt, self.job.boot)
        self._store = store
        self._client = client
        self._endpoint = endpoint
        self._limits = limits
        self._served_by = served_by
        self._headers = endpoint.headers | ({"traceparent": traceparent} if traceparent else {})
        self._slot = slot if slot is not None and slot < endpoint.slots else None
        self._on_refusal = on_refusal  # before the job is anybody's again, or the next slot would take it
        self._body = claimed.body
        self._asking = Asking(self.job, claimed.body, endpoint)
        self._reader = self._asking.reader()
        self._exchange: Exchange | None = None
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._started = self._last_byte = self._loop.time()
        self._timer: asyncio.TimerHandle
        self._first_token_s = 0.0
        self._code = ""
        self._complaint = bytearray()
        self._gone = False  # the runtime says that it does not have the model
        self._stop: errors.BrokerError | None = None
        self._seq = self._stands = self.job.last_seq if self.job.continues else 0  # frames of earlier attempts
        self._buffered = 0

    @property
    def delivered(self) -> bool:
        """Whether this attempt's first token is in the log."""
        return self._seq > self._stands

    def stop(self, why: errors.BrokerError | None = None) -> None:
        """Ends the attempt from outside: quietly when the job is not ours any more, else with `why`."""
        self._stop = why or errors.StaleAttempt("told to stop")
        if self._exchange is not None:
            self._exchange.abort()
        self._news.set()

    async def run(self) -> Ended:
        """Runs to the end, and never raises."""
        self._timer = self._loop.call_later(LOOK_EVERY_S, self._look)
        try:
            outcome, blameless = await self._to_its_end()
        except Exception as e:  # what one request holds must not end the host that serves everybody's
            log.error("event=unexpected job=%s attempt=%d", self.job.id, self.held.attempt, exc_info=e)
            broke = errors.RuntimeFailed("something of the worker broke over this request", retryable=False)
            outcome, blameless = await self._fail(broke, final=True), True
        finally:
            self._timer.cancel()
            if self._exchange is not None and not self._exchange.done:
                self._exchange.abort()
        return Ended(
            outcome,
            clean=self._exchange is None or self._exchange.done,
            suspect=outcome in ("failed", "released") and not blameless and self._runtime_is_suspect(),
            first_token_ms=self._first_token_s * 1000,
            total_ms=(self._loop.time() - self._started) * 1000,
            usage=self._reader.usage,
            timings=self._reader.timings,
            code=self._code,
            whole=not self.job.continues,
        )

    async def _to_its_end(self) -> tuple[str, bool]:
        """Gives the outcome, and whether the runtime is to blame for none of it."""
        try:
            await self._stream()
        except errors.FrameGap as e:
            # Redis came back without the last frames: what the client has cannot be gone on from
            log.error("event=frames_lost job=%s attempt=%d reason=%s", self.job.id, self.held.attempt, e)
            seen = self.job.stream and self.job.mode == "sync"  # even if Redis has lost that it was
            return await self._fail(errors.WorkerLost("Redis lost a part of this answer"), final=seen), True
        except (errors.Lost, errors.NoSuchJob) as e:
            log.info("event=stop job=%s attempt=%d reason=%s", self.job.id, self.held.attempt, e.code)
            return "stopped", False
        except errors.BrokerUnavailable as e:
            # the lease will tell: whoever finds Redis again first recovers the job
            log.error("event=lost_redis job=%s attempt=%d reason=%s", self.job.id, self.held.attempt, e)
            return "stopped", False
        except errors.BrokerError as e:
            # what is refused cannot be done: the runtime was not asked, or it has read the request and said so
            return await self._fail(e), isinstance(e, errors.Refused | errors.RuntimeRefused)
        return "done", False

    async def _stream(self) -> None:
        if self._stop is not None:
            raise self._stop
        if self.job.continues:
            await self._go_on()
        self._exchange = await self._ask(fresh=False)
        reader = self._reader
        while True:
            await self._news.wait()
            self._news.clear()
            if self._exchange.lost is not None and self._exchange.lost.reused and not self._stop:
                self._exchange = await self._ask(fresh=True)
                continue
            if self._lacks_the_dialect():
                reader = self._reader = self._asking.reader()
                self._complaint.clear()
                self._exchange = await self._ask(fresh=False)
                continue
            data = reader.take()
            if self._stop is not None:
                if self.delivered:  # what nobody has seen may start again elsewhere
                    await self._flush(data)
                raise self._stop
            over = self._over()
            if over and reader.succeeded:
                reader.end()  # what was held back until the answer is whole: an empty one, a last event cut short
                return await self._finish(data + reader.take())
            await self._flush(data)
            if over:
                raise self._failure()

    async def _go_on(self) -> None:
        """Makes this attempt one at the rest of the answer. What was judged when it was lost is looked at once more:
        the log may be another after an outage of Redis."""
        partial, last_seq = await continuing.so_far(self._store, self.job)
        fits = last_seq == self._stands and continuing.may_go_on(self.job.endpoint, self._body)
        if partial is None or not fits:
            raise errors.WorkerLost("the answer broke off where it cannot be gone on from")
        log.info("event=go_on job=%s attempt=%d told=%d", self.job.id, self.held.attempt, len(partial.text))
        self._asking.go_on(partial)
        self._reader = self._asking.reader()

    def _lacks_the_dialect(self) -> bool:
        """Whether the runtime, asked in the client's dialect, knows no such page: an older version, asked once more."""
        exchange = self._exchange
        if exchange is None or not exchange.done or exchange.status not in NO_SUCH_PAGE or self._stop is not None:
            return False
        return not read_complaint(bytes(self._complaint)).model_gone and self._asking.translate_instead()

    async def _ask(self, *, fresh: bool) -> Exchange:
        try:
            return await self._client.post(
                self._endpoint.base_url,
                self._asking.path,
                self._asking.request(self._slot),
                headers=self._headers,
                on_data=self._on_data,
                on_news=self._news.set,
                fresh=fresh,
            )
        except UpstreamLost as e:
            raise errors.RuntimeFailed(str(e)) from None

    def _on_data(self, data: bytes) -> None:
        exchange = self._exchange
        self._last_byte = self._loop.time()
        if exchange is None or exchange.status == 200:
            self._reader.feed(data)
            self._buffered += len(data)
            if self._buffered > BUFFER_BYTES and exchange is not None:
                exchange.pause()
        elif len(self._complaint) < ERROR_BODY_BYTES:
            self._complaint += data

    async def _flush(self, data: bytes) -> None:
        """Writes what is ready: one call, whatever gathered while the last one was in flight."""
        if data:
            if not self.delivered:
                self._first_token_s = self._loop.time() - self._started
                await jobs.first_token(self._store, self.held, data, seq=self._seq + 1)
            else:
                await jobs.emit(self._store, self.held, self._seq + 1, data)
            self._seq += 1
        # also when nothing was ready: half of a very large event waits for its other half
        if self._buffered > BUFFER_BYTES and self._exchange is not None:
            self._exchange.resume()
        self._buffered = 0

    async def _finish(self, data: bytes) -> None:
        """Writes what is left and ends the job. An answer that came whole has its first token here."""
        usage = self._reader.usage or {}
        while more := self._reader.take():  # an answer of vectors comes in pieces
            await self._flush(data)
            data = more
        if not self.delivered:
            self._first_token_s = self._loop.time() - self._started
        seq = self._seq + bool(data)
        await jobs.end(self._store, self.held, "finish", seq=seq, data=data, served_by=self._served_by, usage=usage)
        self._seq += 1

    def _runtime_is_suspect(self) -> bool:
        exchange = self._exchange
        return exchange is None or not exchange.done or exchange.status >= 500 or self._gone

    def _refusal(self) -> Refusal | None:
        """What the status says of requests to come: its key is refused, or it is busy and says for how long."""
        exchange, endpoint = self._exchange, self._endpoint
        if exchange is None:
            return None
        if exchange.status in KEY_REFUSED and endpoint.key_env:
            return Refusal(reason=refusal_words(endpoint, exchange.status, ""))
        if exchange.status not in BUSY:
            return None
        asked = exchange.retry_after[:6]
        asked_s = float(asked) if asked.isascii() and asked.isdigit() else PAUSE_S
        return Refusal(pause_s=min(PAUSE_MAX_S, max(PAUSE_S, asked_s)))

    def _over(self) -> bool:
        """Whether no more bytes are to be waited for."""
        exchange = self._exchange
        assert exchange is not None
        if exchange.done or exchange.lost is not None:
            if exchange.status == 200:
                self._reader.end()
            return True
        if self._reader.complaint is not None:
            return True
        silent = self._loop.time() - self._last_byte
        return self._reader.succeeded and silent > LAST_BYTES_S

    def _look(self) -> None:
        """Enforces the timeouts, twice a second."""
        now, limits = self._loop.time(), self._limits
        if self._stop is None:
            if not self._reader.has_content:
                if (now - self._started) * 1000 > limits.first_token_timeout_ms:
                    self.stop(
                        errors.RuntimeFailed(
                            f"no first token within {limits.first_token_timeout_ms / 1000:g} s{self._how_far()}",
                            status=504,
                            retryable=False,
                        )
                    )
            elif (now - self._last_byte) * 1000 > limits.stall_timeout_ms:
                self.stop(
                    errors.RuntimeFailed(
                        f"the runtime was silent for {limits.stall_timeout_ms / 1000:g} s", status=504, retryable=False
                    )
                )
            elif self._reader.succeeded:
                self._news.set()
        self._timer = self._loop.call_later(LOOK_EVERY_S, self._look)

    def _how_far(self) -> str:
        """Tells a long prompt from a runtime that does nothing, where the runtime says how much of it has been read."""
        read = self._reader.prompt_read
        return f"; the runtime has read {read[0]:,} of {read[1]:,} prompt tokens" if read is not None else ""

    def _failure(self) -> errors.BrokerError:
        """Words for an answer that is over and was not a success."""
        exchange = self._exchange
        assert exchange is not None
        refusal = self._refusal()
        if refusal is not None and refusal.reason:  # no fault of the request: it may start again elsewhere
            return errors.RuntimeFailed(refusal.reason)
        if exchange.status not in (0, 200):
            return self._status_words(exchange.status, exchange.retry_after)
        if exchange.lost is not None:
            return errors.RuntimeFailed(str(exchange.lost))
        complaint_found = self._reader.complaint
        words = "the runtime ended the answer without a finish reason"
        if self._reader.error:
            words = f"the runtime says: {without_key(self._endpoint, self._reader.error)}"
        if complaint_found is not None and complaint_found.context_overflow:
            return errors.ContextTooLong(words)
        return errors.RuntimeFailed(words)

    def _status_words(self, status: int, retry_after: str) -> errors.BrokerError:
        """Words for an answer whose status says that it is none."""
        complaint = read_complaint(bytes(self._complaint))
        words = without_key(self._endpoint, complaint.message)
        if complaint.context_overflow:
            return errors.ContextTooLong(words)
        if status in (400, 404) and complaint.model_gone:
            self._gone = True
            return errors.RuntimeFailed(f"the runtime does not have the model now: {words}")
        if status in errors.RuntimeRefused.STATUSES:
            return errors.RuntimeRefused(words, status=status)
        if status == 500 and complaint.of_the_request:
            return errors.RuntimeRefused(words)
        when = f" (try again in {retry_after[:40]} s)" if retry_after.isdigit() else ""
        retryable = status in (408, 425, 500, 502, 504, *BUSY)
        return errors.RuntimeFailed(f"the runtime answered {status}: {words}{when}", retryable=retryable)

    async def _fail(self, error: errors.BrokerError, *, final: bool = False) -> str:
        """Ends the attempt badly: back into the lane where another try is honest, else the client is told."""
        self._code = error.code
        if refusal := self._refusal():
            self._on_refusal(refusal)
        try:
            if not final and _may_start_again(error):
                outcome = await self._give_back(error)
                if outcome is not None:
                    return outcome
            await jobs.end(self._store, self.held, "fail", error=error, served_by=self._served_by)
        except (errors.Lost, errors.NoSuchJob, errors.BrokerUnavailable) as e:
            log.info("event=stop job=%s attempt=%d reason=%s", self.job.id, self.held.attempt, e)
            return "stopped"
        return "failed"

    async def _give_back(self, error: errors.BrokerError) -> str | None:
        """Puts the job back into its lane; None when its client has seen a part of the answer that no other attempt can
        go on from."""
        go_on = None
        if self._seq:  # else there is nothing to go on from
            go_on = await continuing.judge(
                self._store, self.job, within_ms=self._limits.go_on_within_ms, body=self._body
            )
        loss = not isinstance(error, errors.WorkerLost)  # a drain is nobody's failure
        try:
            where = await jobs.release(
                self._store, self.held, loss=loss, max_losses=self._limits.max_losses, error=error, go_on=go_on
            )
        except errors.BadTransition:
            return None
        return "released" if where == "queued" else "failed"


def _may_start_again(error: errors.BrokerError) -> bool:
    return isinstance(error, errors.WorkerLost) or (isinstance(error, errors.RuntimeFailed) and error.retryable)
