"""One tracer provider a process, whoever made it, and a shutdown that cannot hang."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.metrics import Meter, Observation
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Tracer

from telemetry import metrics, names
from telemetry.drawing import DrawingTracerProvider
from telemetry.export import CountedSpanProcessor, GrpcExporter, SpanCounts, SpanLedger
from telemetry.settings import Target, TelemetrySettings

_logger = logging.getLogger(__name__)

QUEUE_FULL = "queue_full"
EXPORT_FAILED = "export_failed"
_CONSOLE = "console_span_exporter"
_OTLP = {"grpc": "otlp_grpc_span_exporter", "http/protobuf": "otlp_http_span_exporter"}
"""`otel.component.type`, of the conventions."""


class Telemetry:
    """The process's tracing: hands out tracers and takes care of the end.

    Args:
        provider: spans go through it; ours, or the one `opentelemetry-instrument` installed.
        exporters: those we built, to be cut off when a shutdown runs out of time, each with the count of
            its spans.
    """

    def __init__(
        self,
        provider: TracerProvider,
        settings: TelemetrySettings,
        exporters: Mapping[SpanExporter, SpanLedger] | None = None,
    ) -> None:
        self.provider = provider
        self.settings = settings
        self._exporters = dict(exporters or {})
        self._closing = threading.Lock()
        self._is_closed = False

    def tracer(self, name: str = names.TRACER) -> Tracer:
        return self.provider.get_tracer(name)

    def span_counts(self) -> dict[str, SpanCounts]:
        """By the exporter's component type; empty where spans are not exported, or not by us."""
        return {ledger.component: ledger.counts() for ledger in self._exporters.values()}

    def show_losses(self, meter: Meter) -> None:
        """Spans sent, dropped and lost are metrics of `meter`.

        Nothing is shown of the exporters of `opentelemetry-instrument`, which the SDK's own switch covers.
        """
        if self._exporters:
            metrics.watch(meter, metrics.SPANS_PROCESSED, self._processed)
            metrics.watch(meter, metrics.SPANS_EXPORTED, self._exported)

    def _processed(self) -> Iterable[Observation]:
        for component, counts in self.span_counts().items():
            attributes = {metrics.COMPONENT: component}
            yield Observation(counts.num_taken, attributes)
            yield Observation(counts.num_dropped, attributes | {names.ERROR_TYPE: QUEUE_FULL})

    def _exported(self) -> Iterable[Observation]:
        for component, counts in self.span_counts().items():
            attributes = {metrics.COMPONENT: component}
            yield Observation(counts.num_accepted, attributes)
            yield Observation(counts.num_failed, attributes | {names.ERROR_TYPE: EXPORT_FAILED})

    def shutdown(self, timeout_seconds: float = 3.0) -> None:
        """Every ended span is exported, or given up when the time is over; safe to repeat.

        Spans that end later are dropped. The SDK's own shutdown waits up to 30 s for a collector that is
        gone, and its flush knows no timeout at all.
        """
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        atexit.unregister(self.shutdown)
        closer = threading.Thread(target=self.provider.shutdown, name="telemetry-shutdown", daemon=True)
        try:
            closer.start()
        except RuntimeError:
            # Python 3.12 starts no thread once the interpreter is leaving: each batch may then take the
            # exporter's timeout. Only a process that never called this itself comes here.
            self.provider.shutdown()
            return
        closer.join(timeout_seconds)
        if closer.is_alive():
            num_left = sum(counts.num_waiting for counts in self.span_counts().values())
            _logger.warning("Gave up on exporting the last %d spans after %.1f s", num_left, timeout_seconds)
            for exporter in self._exporters:
                exporter.shutdown()


class _OwnTracerProvider(DrawingTracerProvider):
    """Leads from the OpenTelemetry global, the only one we use, back to the `Telemetry` built here."""

    telemetry: Telemetry


def configure(default_service_name: str, settings: TelemetrySettings | None = None) -> Telemetry:
    """The process has a tracer provider, from now on OpenTelemetry's global one.

    Call it before the FastAPI app is built. Where `opentelemetry-instrument` has installed a provider, that
    one is used as it is, with its exporter and no second one. Otherwise ours exports to the endpoint of the
    settings, or only makes ids where there is none. A second call in the same process returns the first
    one's result.

    Args:
        default_service_name: where neither OTEL_SERVICE_NAME nor OTEL_RESOURCE_ATTRIBUTES names the service.
        settings: read from the environment when left out.

    Raises:
        SettingsError: the environment holds a value that its rule refuses.
    """
    prefer_stable_http_attributes()
    provider = trace.get_tracer_provider()
    if isinstance(provider, _OwnTracerProvider):
        return provider.telemetry
    chosen = settings if settings is not None else TelemetrySettings.from_environment(os.environ)
    if isinstance(provider, TracerProvider):
        return _adopt(provider, chosen, is_explicit=settings is not None)
    for warning in chosen.warnings:
        _logger.warning("%s", warning)
    telemetry = build(default_service_name, chosen)
    trace.set_tracer_provider(telemetry.provider)
    atexit.register(telemetry.shutdown)
    return telemetry


def prefer_stable_http_attributes() -> None:
    """The HTTP instrumentation emits today's attribute names, unless the user chose others."""
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")


def _adopt(provider: TracerProvider, settings: TelemetrySettings, *, is_explicit: bool) -> Telemetry:
    if is_explicit and settings.target is not None:
        _logger.warning(
            "Spans go where opentelemetry-instrument sends them, not to the endpoint given to this program"
        )
    return Telemetry(provider, settings)


def build(default_service_name: str, settings: TelemetrySettings) -> Telemetry:
    """A provider with its exporters that is nobody's global; `configure` is what a process calls."""
    provider = _OwnTracerProvider(process_resource(default_service_name, settings))
    exporters = {} if settings.is_disabled else _exporters(settings)
    for exporter, ledger in exporters.items():
        provider.add_span_processor(
            CountedSpanProcessor(
                exporter,
                ledger,
                max_queue_spans=settings.max_queue_spans,
                max_batch_spans=settings.max_batch_spans,
                schedule_delay_seconds=settings.schedule_delay_seconds,
            )
        )
    provider.telemetry = Telemetry(provider, settings, exporters)
    return provider.telemetry


def process_resource(default_service_name: str, settings: TelemetrySettings) -> Resource:
    attributes: dict[str, str] = {SERVICE_VERSION: _version()}
    if settings.service_name is not None:
        attributes[SERVICE_NAME] = settings.service_name
    elif "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes[SERVICE_NAME] = default_service_name
    return Resource.create(attributes)


def _version() -> str:
    try:
        return version("throughline")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that was never installed


def _exporters(settings: TelemetrySettings) -> dict[SpanExporter, SpanLedger]:
    exporters: dict[SpanExporter, SpanLedger] = {}
    if "console" in settings.exporters:
        exporters[ConsoleSpanExporter()] = SpanLedger(_CONSOLE, settings.max_queue_spans)
    if (target := settings.target) is not None:
        exporter = _otlp_exporter(target, settings.export_timeout_seconds)
        exporters[exporter] = SpanLedger(_OTLP[target.protocol], settings.max_queue_spans)
    return exporters


def _otlp_exporter(target: Target, timeout_seconds: float) -> SpanExporter:
    match target.protocol:
        case "grpc":
            return GrpcExporter(target.url, insecure=target.is_plaintext, timeout=timeout_seconds)
        case "http/protobuf":
            return HttpSpanExporter(target.url, timeout=timeout_seconds)
