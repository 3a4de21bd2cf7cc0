"""Whether, and to whom, a process tells the steps of jobs: OpenTelemetry's own environment variables say so.

Off unless they name an endpoint. What they ask for and cannot be had is a line in the log: nobody's job waits for want
of a trace.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from broker import traces
from broker.version import version

if TYPE_CHECKING:
    from broker.otel import Exporter

log = logging.getLogger("warmlane.traces")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTERS = ("OTEL_TRACES_EXPORTER",)
PROTOCOL = "http/protobuf"


@contextmanager
def exporting(environ: Mapping[str, str], *, part: str) -> Iterator[None]:
    """Has the steps that this process ends sent off, as long as it lasts, where the environment asks for it."""
    exporter = _exporter(environ, part)
    traces.begin(exporter)
    try:
        yield
    finally:
        traces.begin(None)
        if exporter is not None:
            exporter.close()


def _exporter(environ: Mapping[str, str], part: str) -> "Exporter | None":
    """Who is told, None = nobody; why what was asked for cannot be had is in the log."""
    endpoint = _first(environ, ENDPOINTS)
    if not endpoint or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if _first(environ, EXPORTERS, "otlp") == "none":
        return None
    why = _why_not(environ, endpoint)
    if why:
        log.warning("event=traces_off reason=%s", why)
        return None
    try:
        from broker.otel import Exporter

        exporter = Exporter(part=part, version=version())
    except ModuleNotFoundError:
        log.warning("event=traces_off reason=OpenTelemetry is not installed: pip install 'warmlane[otel]'")
        return None
    except Exception as e:  # noqa: BLE001  # of what the environment says of queues and limits some is refused
        log.warning("event=traces_off reason=OpenTelemetry does not begin: %s", e)
        return None
    log.info("event=traces_on collector=%s", urlsplit(endpoint).hostname)
    return exporter


def _why_not(environ: Mapping[str, str], endpoint: str) -> str:
    exporter, protocol = _first(environ, EXPORTERS, "otlp"), _first(environ, PROTOCOLS, PROTOCOL)
    if exporter != "otlp":
        return f"spans are exported by otlp only, not {exporter}"
    if protocol != PROTOCOL:
        return f"OTLP is spoken over {PROTOCOL} only, not {protocol}"
    try:  # there may be a key in it: no word of it is repeated
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    return "" if usable else "the endpoint must be an address like http://127.0.0.1:4318"


def _first(environ: Mapping[str, str], names: Sequence[str], default: str = "") -> str:
    return next(filter(None, (environ.get(name, "").strip() for name in names)), default)
