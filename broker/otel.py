"""OpenTelemetry: makes its spans of ours and sends them to whoever collects them. The only file that imports it; the
extra `otel` brings it.

Export runs in a thread of its own with a bounded queue: a collector that is slow or away costs spans, never a job's
time.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.context import Context as Around
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from broker.traces import NO_PARENT, Context, Span

log = logging.getLogger("warmlane.traces")

LAST_SPANS_S = 0.5
"""How long a process that ends waits for its last spans to be taken: it has other things to end in its time."""

BATCH_MS = 1_000
"""How long spans wait for others: a process that is killed takes them along. OTEL_BSP_SCHEDULE_DELAY says otherwise."""

WAITING_MAX = 2_048
"""Spans that may wait, unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise."""

TELL_LOST_S = 60.0
"""While a collector is away, a line says so this often."""

REASON_MAX = 160

_THEIRS = logging.getLogger("opentelemetry")


class Exporter:
    """Makes OpenTelemetry's spans of ours. Only one thread may tell it. Raises what OpenTelemetry makes of variables
    that it cannot use."""

    def __init__(self, *, part: str, version: str) -> None:
        self._ids = _Ids()
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler  # the environment's
        resource = Resource.create({"service.version": version, "warmlane.part": part})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # the environment gives it no name
            resource = resource.merge(Resource({"service.name": "warmlane"}))
        # what comes here has been sampled, once for all its steps
        self._provider = TracerProvider(
            resource=resource, sampler=ALWAYS_ON, id_generator=self._ids, shutdown_on_exit=False
        )
        self._sent = _Counted(OTLPSpanExporter())
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._sent, schedule_delay_millis=None if os.environ.get("OTEL_BSP_SCHEDULE_DELAY") else BATCH_MS
            )
        )
        self._tracer = self._provider.get_tracer("warmlane", version)

    def samples(self, context: Context) -> bool:
        """Asks the sampler of the environment, `parentbased_always_on` by default."""
        asked = self._sampler.should_sample(_around(context), int(context.trace_id, 16), "job")
        return asked.decision is Decision.RECORD_AND_SAMPLE

    def tell(self, span: Span) -> None:
        """Puts a span into the queue; with a full one it is lost, and counted."""
        if not self._sent.has_room():
            return
        self._ids.trace_id, self._ids.span_id = int(span.trace_id, 16), int(span.span_id, 16)
        made = self._tracer.start_span(
            span.name,
            context=_around(Context(span.trace_id, span.parent_id or NO_PARENT, True)),
            kind=SpanKind.SERVER if span.served else SpanKind.INTERNAL,
            attributes=span.attributes,
            start_time=span.start_ms * 1_000_000,
        )
        if span.error:
            made.set_attribute("error.type", span.error)
            made.set_status(Status(StatusCode.ERROR, span.error))
        made.end(span.end_ms * 1_000_000)

    def close(self) -> None:
        """Sends what is left, for LAST_SPANS_S at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces close", daemon=True)
        closing.start()
        closing.join(LAST_SPANS_S)
        self._sent.end()


class _Counted(SpanExporter):
    """Knows how many spans wait, and says how many nobody took: the first time at once, then once in TELL_LOST_S, for
    each try of the exporter's would have a line or two of its own."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        told = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "")
        self._waiting_max = int(told) if told.isdecimal() else WAITING_MAX
        self._waiting = self._lost = 0
        self._told_at = -TELL_LOST_S
        self._lock = threading.Lock()
        self._why = _LastWords()
        _THEIRS.addHandler(self._why)
        _THEIRS.propagate = False

    def has_room(self) -> bool:
        """Takes a place for one more span; False where there is none."""
        with self._lock:
            full = self._waiting >= self._waiting_max
            self._waiting += not full
            self._lost += full
        return not full

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends them, in the thread of the queue."""
        self._why.words = ""
        try:
            result = self._exporter.export(spans)
        finally:
            with self._lock:
                self._waiting -= len(spans)
        if result is not SpanExportResult.SUCCESS:
            with self._lock:
                self._lost += len(spans)
        self.tell_lost()
        return result

    def shutdown(self) -> None:
        """Ends what is under way."""
        self._exporter.shutdown()

    def end(self) -> None:
        """Tells of the last that were lost, and hears no more."""
        self.tell_lost(at_once=True)
        _THEIRS.removeHandler(self._why)

    def tell_lost(self, *, at_once: bool = False) -> None:
        """Writes the line, where something was lost since the last one."""
        with self._lock:
            lost, now = self._lost, time.monotonic()
            if not lost or (not at_once and now - self._told_at < TELL_LOST_S):
                return
            self._lost, self._told_at = 0, now
        log.warning("event=traces_lost spans=%d reason=%s", lost, self._why.words or "the collector is too slow")


class _LastWords(logging.Handler):
    """Keeps what OpenTelemetry said last, without addresses: there may be a key in them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Notes it."""
        said = re.sub(r"\S*://\S*", "…", record.getMessage()).split("\n")[0]
        self.words = self.words or said[:REASON_MAX]


class _Ids(IdGenerator):
    """Says what it was told last: the ids follow from the job's."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


def _around(context: Context) -> Around:
    """What a span stands in: nothing, or a span that is told elsewhere."""
    if context.parent == NO_PARENT:
        return Around()
    flags = TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT)
    parent = SpanContext(int(context.trace_id, 16), int(context.parent, 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(NonRecordingSpan(parent), Around())
