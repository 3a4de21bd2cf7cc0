"""OpenTelemetry: makes its spans of ours and sends them to whoever collects them. The only file that imports it; the
extra `otel` brings it.

Export runs in a thread of its own with a bounded queue: a collector that is slow or away costs spans, never a job's
time.
"""

import logging
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
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from broker.traces import NO_PARENT, Context, Span

log = logging.getLogger("warmlane.traces")

LAST_SPANS_S = 2.0
"""How long a process that ends waits for its last spans to be taken."""

TELL_LOST_S = 60.0
"""While a collector is away, a line says so this often."""


class Exporter:
    """Makes OpenTelemetry's spans of ours. Only one thread may tell it."""

    def __init__(self, *, part: str, version: str) -> None:
        self._ids = _Ids()
        resource = Resource.create({"service.version": version, "warmlane.part": part})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # the environment gives it no name
            resource = resource.merge(Resource({"service.name": "warmlane"}))
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Counted(OTLPSpanExporter())))
        # it has a line or two for each try, with what its HTTP library says of it; `_Counted` has one for all
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._tracer = self._provider.get_tracer("warmlane", version)

    def samples(self, context: Context) -> bool:
        """Asks the sampler of the environment, `parentbased_always_on` by default."""
        asked = self._provider.sampler.should_sample(_around(context), int(context.trace_id, 16), "job")
        return asked.decision is Decision.RECORD_AND_SAMPLE

    def tell(self, span: Span) -> None:
        """Puts a span into the queue; with a full one the newest go."""
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


class _Counted(SpanExporter):
    """Says how many spans nobody took, the first time at once."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lost = 0
        self._told_at = -TELL_LOST_S

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends them, in the thread of the queue."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            if time.monotonic() - self._told_at >= TELL_LOST_S:
                log.warning("event=traces_lost spans=%d reason=the collector did not take them", self._lost)
                self._lost, self._told_at = 0, time.monotonic()
        return result

    def shutdown(self) -> None:
        """Ends what is under way."""
        self._exporter.shutdown()


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
