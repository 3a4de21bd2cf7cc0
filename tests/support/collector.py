"""Who collects spans: one in this process for tests of the parts, and an OTLP receiver on a real socket."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from broker import traces
from broker.traces import Context, Span


class Spans(list[Span]):
    """The spans of one or more jobs, as they were told."""

    def of(self, job_id: str) -> "Spans":
        return Spans(span for span in self if span.attributes.get("warmlane.job") == job_id)

    def named(self, name: str) -> "Spans":
        return Spans(span for span in self if span.name == name)

    @property
    def names(self) -> list[str]:
        """In the order in which they began; of those at the same moment the longest first."""
        return [span.name for span in sorted(self, key=lambda span: (span.start_ms, -span.end_ms))]

    @property
    def outcomes(self) -> list[tuple[str, object]]:
        """Name and outcome of those that have one, in the order in which they ended."""
        told = [span for span in sorted(self, key=lambda span: span.end_ms) if "warmlane.outcome" in span.attributes]
        return [(span.name, span.attributes["warmlane.outcome"]) for span in told]

    def root(self) -> Span:
        """The whole of the job; fails unless the others make up one tree below it, within its time."""
        (root,) = (span for span in self if span.served)
        ids = [span.span_id for span in self]
        assert len(set(ids)) == len(ids), f"told twice: {self.names}"
        by_id = {span.span_id: span for span in self}
        for span in self:
            assert span.trace_id == root.trace_id
            assert span.start_ms <= span.end_ms
            if span is not root:
                parent = by_id[span.parent_id]
                assert parent.start_ms <= span.start_ms and span.end_ms <= parent.end_ms, (span, parent)
        return root


@dataclass
class Collector(Spans):
    """Takes what this process tells; `wants` = whether traces that begin here are sampled."""

    wants: bool = True
    asked: list[Context] = field(default_factory=list)

    def samples(self, context: Context) -> bool:
        self.asked.append(context)
        return self.wants if context.parent == traces.NO_PARENT else context.sampled

    def tell(self, span: Span) -> None:
        self.append(span)


@contextmanager
def collecting(*, wants: bool = True) -> Iterator[Collector]:
    """Has this process tell a collector for the length of the block."""
    collector = Collector(wants=wants)
    traces.begin(collector)
    try:
        yield collector
    finally:
        traces.begin(None)


class Receiver:
    """An OTLP collector; what it got is read back as spans of ours. `resources`: what each batch said of its sender."""

    def __init__(self) -> None:
        self.spans = Spans()
        self.resources: list[dict[str, str]] = []
        self.paths: set[str] = set()
        self.raw: list[bytes] = []
        self.url = ""

    def take(self, path: str, encoding: str, body: bytes) -> None:
        """Reads one request."""
        self.paths.add(path)
        self.raw.append(gzip.decompress(body) if encoding == "gzip" else body)
        request = ExportTraceServiceRequest.FromString(self.raw[-1])
        for group in request.resource_spans:
            self.resources.append({a.key: a.value.string_value for a in group.resource.attributes})
            for scope in group.scope_spans:
                self.spans.extend(_read(span) for span in scope.spans)


@contextmanager
def receiver() -> Iterator[Receiver]:
    """Listens on a free port of this machine for the length of the block."""
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.take(self.path, self.headers.get("content-encoding", ""), body)
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="receiver", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _read(span: Any) -> Span:
    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ms=span.start_time_unix_nano // 1_000_000,
        end_ms=span.end_time_unix_nano // 1_000_000,
        served=span.kind == span.SPAN_KIND_SERVER,
        error=str(values.get("error.type", "")),
        attributes=values,
    )
