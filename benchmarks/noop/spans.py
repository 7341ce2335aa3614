"""Tracing as in production up to the wire: spans are made, batched, and thrown away."""

from __future__ import annotations

import os
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from telemetry.export import CountedSpanProcessor, SpanLedger
from telemetry.settings import TelemetrySettings
from telemetry.setup import configure


class _Discard(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def trace_as_the_product(service: str) -> None:
    """With the product's own provider and processor, as where an OTLP endpoint is set."""
    settings = TelemetrySettings.from_environment(os.environ)
    configure(service, settings).provider.add_span_processor(
        CountedSpanProcessor(
            _Discard(),
            SpanLedger("discarded", settings.max_queue_spans),
            max_queue_spans=settings.max_queue_spans,
            max_batch_spans=settings.max_batch_spans,
            schedule_delay_seconds=settings.schedule_delay_seconds,
        )
    )


def trace_as_the_sdk() -> None:
    """As the SDK's own documentation sets it up."""
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(_Discard()))
    trace.set_tracer_provider(provider)
