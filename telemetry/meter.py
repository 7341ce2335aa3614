"""One meter provider a process: read by Prometheus, pushed over OTLP where an endpoint is set.

The provider is ours alone and never OpenTelemetry's global one: the launcher may have put its own there, and
instrumentations would add series whose attributes nobody bounds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from telemetry.errors import SettingsError
from telemetry.metrics import METER
from telemetry.settings import TelemetrySettings
from telemetry.setup import Telemetry, process_resource

_logger = logging.getLogger(__name__)

SPANS_SECONDS = 2.0
METRICS_SECONDS = 0.9
"""What a stop may spend on sending what is left: under 3 s together."""

ENDPOINT = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_IS_PLAINTEXT = {"grpc": True, "http": True, "grpcs": False, "https": False}
_HTTP_PORT = 4318
_HTTP_PATH = "/v1/metrics"


class Metrics:
    """The process's metrics; safe from any thread."""

    def __init__(self, provider: MeterProvider, registry: CollectorRegistry) -> None:
        self._provider = provider
        self._registry = registry
        self._rendering = threading.Lock()
        self._closing = threading.Lock()
        self._is_closed = False

    @property
    def meter(self) -> Meter:
        return self._provider.get_meter(METER)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        with self._rendering:  # the reader mixes up two scrapes at once
            return generate_latest(self._registry)

    def shutdown(self, timeout_seconds: float = 3.0) -> None:
        """What was counted is pushed, or given up when the time is over; safe to repeat."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        closer = threading.Thread(target=self._provider.shutdown, name="metrics-shutdown", daemon=True)
        closer.start()
        closer.join(timeout_seconds)
        if closer.is_alive():
            _logger.warning("Gave up on exporting the last metrics after %.1f s", timeout_seconds)


def build_metrics(
    default_service_name: str, settings: TelemetrySettings, environ: Mapping[str, str]
) -> Metrics:
    """Raises: SettingsError for an OTLP endpoint or protocol that cannot be."""
    registry = CollectorRegistry()
    readers: list[MetricReader] = [PrometheusMetricReader(scope_info_enabled=False, registry=registry)]
    exporter = None if settings.is_disabled else _otlp_exporter(environ)
    if exporter is not None:
        # Interval and timeout are the SDK's own variables: OTEL_METRIC_EXPORT_INTERVAL, ..._TIMEOUT.
        readers.append(PeriodicExportingMetricReader(exporter))
    provider = MeterProvider(
        readers,
        resource=process_resource(default_service_name, settings),
        # Only what is pushed carries exemplars, and each costs a recording that is traced 2 µs.
        exemplar_filter=AlwaysOffExemplarFilter() if exporter is None else None,
        shutdown_on_exit=False,  # the SDK's own exit handler may wait for 30 s
    )
    return Metrics(provider, registry)


def shut_down(telemetry: Telemetry, metrics: Metrics) -> None:
    """The last spans and then the last metrics, which count those spans, are sent or given up within 3 s."""
    telemetry.shutdown(SPANS_SECONDS)
    metrics.shutdown(METRICS_SECONDS)


def _otlp_exporter(environ: Mapping[str, str]) -> MetricExporter | None:
    """By the metrics' own endpoint alone: the general one often names a collector of traces only."""
    endpoint = environ.get(ENDPOINT, "").strip()
    if not endpoint or environ.get("OTEL_METRICS_EXPORTER", "").strip() == "none":
        return None
    address = endpoint if "://" in endpoint else f"http://{endpoint}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise _refused(endpoint, "must be scheme://host:port") from error
    if parts.scheme not in _IS_PLAINTEXT or parts.hostname is None:
        raise _refused(endpoint, "must begin with grpc://, grpcs://, http:// or https:// and name a host")
    scheme = "http" if _IS_PLAINTEXT[parts.scheme] else "https"
    if _protocol(environ, is_http_port=port == _HTTP_PORT) == "grpc":
        netloc = parts.netloc.rpartition("@")[2]
        return GrpcMetricExporter(f"{scheme}://{netloc}", insecure=scheme == "http")
    path = parts.path if parts.path.strip("/") else _HTTP_PATH
    return HttpMetricExporter(f"{scheme}://{parts.netloc}{path}")


def _protocol(environ: Mapping[str, str], *, is_http_port: bool) -> str:
    for variable in ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        value = environ.get(variable, "").strip()
        if value:
            if value not in ("grpc", "http/protobuf"):
                raise SettingsError(variable, value, "must be grpc or http/protobuf")
            return value
    return "http/protobuf" if is_http_port else "grpc"


def _refused(endpoint: str, rule: str) -> SettingsError:
    """An address may carry a password before its `@`, which no message repeats."""
    return SettingsError(ENDPOINT, endpoint.rpartition("@")[2], rule)
