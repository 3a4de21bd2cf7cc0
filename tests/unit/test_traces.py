"""W3C's trace context, and which trace a job belongs to."""

import logging
import os
import sys
import threading
from dataclasses import replace

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import SpanExportResult

from broker import errors, traces, tracing
from broker.lifecycle import State
from broker.records import JobRecord
from broker.traces import NO_PARENT, SPANS, Context, Span
from tests.support.collector import Collector, collecting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
THEIRS = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (THEIRS, True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-03", True),  # flags that we do not know say nothing of this one
        (f"00-{TRACE}-{PARENT}-fe", False),
        (f"cc-{TRACE}-{PARENT}-01-what.the.future.will-be", True),  # a later version may say more
        (f"cc-{TRACE}-{PARENT}-01", True),
    ],
)
def test_a_traceparent_is_read(text: str, sampled: bool) -> None:
    assert Context.read(text) == Context(TRACE, PARENT, sampled)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01-",
        f"cc-{TRACE}-{PARENT}-01.what",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT[:-1]}-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-0x",
        f" {THEIRS}",
        f"{THEIRS}\r\nhost: elsewhere",
        f"{THEIRS}\n",
    ],
)
def test_what_is_none_is_as_if_it_had_not_come(text: str) -> None:
    assert Context.read(text) is None
    assert traces.accepted(text) == ""


def test_a_clients_trace_is_kept_and_handed_on_where_nobody_is_told() -> None:
    assert traces.accepted(THEIRS) == THEIRS and traces.accepted("") == ""
    job = JobRecord(id="one", trace=THEIRS, attempt=1)
    assert not traces.told(job) and traces.onward(job) == THEIRS
    assert traces.accepted(f"00-{TRACE}-{NO_PARENT}-01") == "", "a parent of zeros is none"


def test_the_runtime_gets_the_attempt_as_its_parent() -> None:
    with collecting() as collector:
        kept = traces.accepted(THEIRS)
        assert collector.asked == [Context(TRACE, PARENT, True)]
        job = JobRecord(id="one", trace=kept, attempt=2)
        assert traces.onward(job) == f"00-{TRACE}-{traces.span_id('one', 'attempt 2')}-01"
        assert traces.onward(replace(job, attempt=3)) != traces.onward(job)
        assert traces.onward(replace(job, trace="")) == ""


def test_a_trace_of_our_own_begins_where_the_client_named_none() -> None:
    with collecting():
        ours = Context.read(traces.accepted(""))
        other = Context.read(traces.accepted("no trace"))
    assert ours is not None and ours.sampled and ours.parent == NO_PARENT
    assert other is not None and other.trace_id != ours.trace_id
    job = JobRecord(id="one", trace=str(ours), attempt=1)
    assert traces.onward(job) == "", "a runtime is not told of a parent that is nobody's, by a part that tells nothing"


def test_what_is_not_sampled_is_not_told_and_its_client_still_has_it_handed_on() -> None:
    with collecting(wants=False) as collector:
        assert traces.accepted("") == ""
        unsampled = f"00-{TRACE}-{PARENT}-00"
        job = JobRecord(id="one", trace=traces.accepted(unsampled), attempt=1, entry="5-0")
        assert not traces.told(job) and traces.onward(job) == unsampled
        traces.waited(job, until_ms=9, outcome="claimed")
        traces.ended(replace(job, state=State.DONE, ended_at=9))
        assert not collector


def test_a_refusal_is_the_whole_of_a_job_that_never_was() -> None:
    with collecting() as collector:
        job = JobRecord(id="one", asked="coder", caller="anna", trace=traces.accepted(THEIRS))
        clock = iter([100, 130])
        with pytest.raises(errors.LaneFull), traces.admission(job, lambda: next(clock)):
            raise errors.LaneFull("coder")
    (span,) = collector
    assert (span.served, span.parent_id, span.start_ms, span.end_ms) == (True, PARENT, 100, 130)
    assert (span.error, span.attributes["warmlane.outcome"]) == ("lane_full", "refused")
    assert span.name == "chat", "what a client asked for in vain may be anything: it names no span"


def test_lines_of_a_batch_that_find_no_place_yet_are_not_told() -> None:
    with collecting() as collector:
        job = JobRecord(id="batch_1-7", batch="batch_1", trace=traces.accepted(""))
        with pytest.raises(errors.LaneFull), traces.admission(job, lambda: 1):
            raise errors.LaneFull("coder")
    assert not collector


def test_a_repeat_names_the_job_that_it_was_led_to() -> None:
    with collecting() as collector:
        job = JobRecord(id="two", asked="coder", trace=traces.accepted(""))
        with traces.admission(job, lambda: 7) as search:
            search.led_to = "one"
    (span,) = collector
    assert (span.attributes["warmlane.attached_to"], span.attributes["warmlane.outcome"]) == ("one", "attached")


def test_every_step_that_is_told_is_in_the_table() -> None:
    """A job that goes through everything."""
    with collecting() as collector:
        job = JobRecord(id="one", asked="coder", asked_model="coder", trace=traces.accepted(""), submitted_at=5)
        traces.waited(job, until_ms=10, outcome="started")
        job = replace(job, entry="10-0", state=State.CLAIMED, woke_at=45, claimed_at=50, attempt=1)
        traces.claimed(job, waking_at=8)
        traces.attempted(job, "done", first_token_ms=5, total_ms=9)
        traces.ended(replace(job, state=State.DONE, ended_at=59))
        names = {"job" if span.served else span.name for span in collector}
        assert names == SPANS.keys()
        assert collector.root().name == "chat coder"
        (wake,) = collector.named("wake")
        assert (wake.start_ms, wake.end_ms) == (10, 45), "as much of it as the job waited for"


@pytest.mark.parametrize(("waking_at", "woke_at"), [(0, 0), (2, 9), (20, 20)])
def test_a_wake_that_was_over_before_or_that_never_was_is_none(waking_at: int, woke_at: int) -> None:
    with collecting() as collector:
        job = JobRecord(
            id="one", trace=traces.accepted(""), entry="10-0", woke_at=woke_at, claimed_at=50, attempt=1
        )  # fmt: skip
        traces.claimed(job, waking_at=waking_at)
    assert collector.names == ["wait"]


NAMED = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:secret@127.0.0.1:1"}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, ""),
        (NAMED | {"OTEL_SDK_DISABLED": "true"}, ""),
        (NAMED | {"OTEL_TRACES_EXPORTER": "none"}, ""),
        (NAMED | {"OTEL_TRACES_EXPORTER": "zipkin"}, "not zipkin"),
        (NAMED | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "not grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "user:secret@127.0.0.1:4318"}, "must be an address"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://secret[::1"}, "must be an address"),
        (NAMED | {"OTEL_BSP_MAX_QUEUE_SIZE": "100"}, "does not begin: max_export_batch_size"),
        (NAMED | {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "abc"}, "does not begin"),
    ],
)
def test_nobody_is_told_unless_the_environment_names_somebody(
    environ: dict[str, str], words: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What of it cannot be used is a line in the log, and the part begins all the same."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with tracing.exporting(environ, part="api"):
        assert traces.accepted("") == ""
    assert words in caplog.text and "secret" not in caplog.text


def test_without_the_extra_a_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "broker.otel", None)
    with tracing.exporting(NAMED, part="api"):
        assert traces.accepted("") == ""
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "pip install 'warmlane[otel]'" in record.getMessage()


class Broken(Collector):
    """Somebody's sampler, or a library with a fault."""

    def __init__(self, breaks: str) -> None:
        super().__init__()
        self._breaks = breaks

    def samples(self, context: Context) -> bool:
        if self._breaks == "samples":
            raise RuntimeError("no sampler")
        return True

    def tell(self, span: Span) -> None:
        raise RuntimeError("no collector")


@pytest.mark.parametrize("breaks", ["samples", "tell"])
def test_whatever_breaks_over_a_trace_breaks_no_job(breaks: str, caplog: pytest.LogCaptureFixture) -> None:
    """And breaks once: after that nobody is told."""
    traces.begin(Broken(breaks))
    try:
        job = JobRecord(id="one", trace=traces.accepted(THEIRS), entry="5-0")
        assert job.trace == THEIRS
        for _ in range(2):
            traces.waited(job, until_ms=9, outcome="claimed")
        assert not traces.told(job)
    finally:
        traces.begin(None)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "event=traces_off" in record.getMessage()


def test_what_finds_no_place_in_the_queue_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A collector that takes its time must not have our memory; the line comes at the latest with the end."""
    going, free = threading.Event(), threading.Event()

    def slow(_self: OTLPSpanExporter, _spans: object) -> SpanExportResult:
        going.set()
        free.wait(10)
        return SpanExportResult.SUCCESS

    monkeypatch.setattr(OTLPSpanExporter, "export", slow)
    for name, value in NAMED.items() | {("OTEL_BSP_MAX_QUEUE_SIZE", "600"), ("OTEL_BSP_SCHEDULE_DELAY", "10")}:
        monkeypatch.setenv(name, value)
    with tracing.exporting(os.environ, part="api"):
        job = JobRecord(id="one", trace=traces.accepted(""), entry="5-0")
        for number in range(700):
            traces.waited(job, until_ms=9, outcome=f"{number}")
        assert going.wait(10)
        free.set()
    (line,) = (record.getMessage() for record in caplog.records if "event=traces_lost" in record.getMessage())
    assert line == "event=traces_lost spans=100 reason=the collector is too slow"
