"""Spans on their way out of the process: bounded, sent in batches, and counted.

    span ends ─▶ CountedSpanProcessor ──▶ the SDK's queue ──▶ CountedExporter ──▶ collector
                   │ full: dropped                              │ failed: lost

The SDK has metrics of its own for this (OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED), under the same names. They
add to four instruments for every span, in the thread that ends it, and must find their meter provider before
the first tracer is made. Here a span costs two integers, and a collection reads them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from telemetry.encode import encode

_logger = logging.getLogger(__name__)

WARN_EVERY_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class SpanCounts:
    """What became of the sampled spans that have ended; `num_waiting` of them are still in the process."""

    num_admitted: int = 0
    num_dropped: int = 0
    num_taken: int = 0
    num_accepted: int = 0
    num_failed: int = 0

    @property
    def num_waiting(self) -> int:
        """Queued, or in an export call that has not returned."""
        return self.num_admitted - self.num_accepted - self.num_failed


class SpanLedger:
    """Counts spans from their end to the collector's answer, and says when the queue is full.

    Safe from any thread. Invariant: accepted + failed <= taken <= admitted, and admitted - taken <=
    `max_queue_spans`.
    """

    def __init__(self, component: str, max_queue_spans: int) -> None:
        """`component` is the exporter's `otel.component.type`."""
        self.component = component
        self._max_queue_spans = max_queue_spans
        self._lock = threading.Lock()
        self._num_admitted = self._num_dropped = 0
        self._num_taken = self._num_accepted = self._num_failed = 0
        self._warned_at = float("-inf")

    def counts(self) -> SpanCounts:
        with self._lock:
            return SpanCounts(
                self._num_admitted, self._num_dropped, self._num_taken, self._num_accepted, self._num_failed
            )

    def admit(self) -> bool:
        """Whether there is room for one more span, which then counts as queued; else as dropped."""
        with self._lock:
            if self._num_admitted - self._num_taken < self._max_queue_spans:
                self._num_admitted += 1
                return True
            self._num_dropped += 1
            now = time.monotonic()
            is_silent = now - self._warned_at < WARN_EVERY_SECONDS
            if not is_silent:
                self._warned_at = now
        if not is_silent:
            _logger.warning("The span queue is full: the collector does not keep up, spans are dropped")
        return False

    def took(self, num_spans: int) -> None:
        with self._lock:
            self._num_taken += num_spans

    def answered(self, num_spans: int, *, is_accepted: bool) -> None:
        with self._lock:
            if is_accepted:
                self._num_accepted += num_spans
            else:
                self._num_failed += num_spans


class GrpcExporter(OTLPSpanExporter):
    """The SDK's exporter with our encoder."""

    def _translate_data(self, data: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        return encode(data)


class CountedExporter(SpanExporter):
    """An exporter whose every batch is written into the ledger."""

    def __init__(self, exporter: SpanExporter, ledger: SpanLedger) -> None:
        self._exporter = exporter
        self._ledger = ledger

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._ledger.took(len(spans))
        is_accepted = False
        try:
            result = self._exporter.export(spans)
            is_accepted = result is SpanExportResult.SUCCESS
            return result
        finally:
            self._ledger.answered(len(spans), is_accepted=is_accepted)

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class CountedSpanProcessor(BatchSpanProcessor):
    """The SDK's batches behind the ledger's bound, so that the SDK's own queue is never the one to drop.

    A full queue refuses the newest span, where the SDK would forget the oldest: what is kept of a trace
    stays.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        ledger: SpanLedger,
        *,
        max_queue_spans: int,
        max_batch_spans: int,
        schedule_delay_seconds: float,
    ) -> None:
        super().__init__(
            CountedExporter(exporter, ledger),
            max_queue_size=max_queue_spans,
            max_export_batch_size=max_batch_spans,
            schedule_delay_millis=schedule_delay_seconds * 1000,
        )
        self._ledger = ledger

    def on_end(self, span: ReadableSpan) -> None:
        is_sampled = span.context is not None and span.context.trace_flags.sampled
        if is_sampled and self._ledger.admit():
            super().on_end(span)
