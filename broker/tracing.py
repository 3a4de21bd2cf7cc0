"""Whether, and to whom, a process tells the steps of jobs: OpenTelemetry's own environment variables say so.

Off unless they name an endpoint. What they ask for and cannot be had is a line in the log: nobody's job waits for want
of a trace.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from broker import traces
from broker.version import version

log = logging.getLogger("warmlane.traces")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"


@contextmanager
def exporting(environ: Mapping[str, str], *, part: str) -> Iterator[None]:
    """Has the steps that this process ends sent off, as long as it lasts, where the environment asks for it."""
    endpoint = next(filter(None, (environ.get(name) for name in ENDPOINTS)), "")
    if not endpoint or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        yield
        return
    protocol = next(filter(None, (environ.get(name) for name in PROTOCOLS)), PROTOCOL)
    if protocol != PROTOCOL:
        log.warning("event=traces_off reason=OTLP is spoken over %s only, not %s", PROTOCOL, protocol)
        yield
        return
    try:
        from broker.otel import Exporter
    except ImportError:
        log.warning("event=traces_off reason=OpenTelemetry is not installed: pip install 'warmlane[otel]'")
        yield
        return
    exporter = Exporter(part=part, version=version())
    log.info("event=traces_on collector=%s", _host_of(endpoint))
    traces.begin(exporter)
    try:
        yield
    finally:
        traces.begin(None)
        exporter.close()


def _host_of(endpoint: str) -> str:
    """What of an address may be told: there may be a key in the rest of it."""
    try:
        return urlsplit(endpoint).hostname or "-"
    except ValueError:
        return "-"
