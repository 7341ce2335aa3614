from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from telemetry import metrics, names
from telemetry.export import CountedSpanProcessor, SpanLedger
from telemetry.settings import Target, TelemetrySettings
from telemetry.setup import Telemetry, build
from tests.support.processes import wait_until
from tests.support.valkey import free_port


class GatedExporter(SpanExporter):
    """Answers with `result`, or raises it, once the gate is open."""

    def __init__(self, result: SpanExportResult | Exception) -> None:
        self.gate = threading.Event()
        self.num_exported = 0
        self._result = result

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        assert self.gate.wait(10)
        self.num_exported += len(spans)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def provider_over(exporter: SpanExporter, ledger: SpanLedger, *, max_queue_spans: int = 4) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    processor = CountedSpanProcessor(
        exporter, ledger, max_queue_spans=max_queue_spans, max_batch_spans=2, schedule_delay_seconds=0.01
    )
    provider.add_span_processor(processor)
    return provider


def make_spans(provider: TracerProvider, count: int) -> None:
    for _ in range(count):
        provider.get_tracer("test").start_span("span").end()


def test_spans_are_dropped_and_counted_when_the_queue_is_full(caplog: pytest.LogCaptureFixture) -> None:
    exporter, ledger = GatedExporter(SpanExportResult.SUCCESS), SpanLedger("test", 4)
    provider = provider_over(exporter, ledger)
    make_spans(provider, 2)
    wait_until(lambda: ledger.counts().num_taken == 2, timeout_seconds=5, what="a batch is in the exporter")

    with caplog.at_level(logging.WARNING):
        make_spans(provider, 10)

    counts = ledger.counts()
    assert (counts.num_dropped, counts.num_admitted, counts.num_waiting) == (6, 6, 6)
    assert [record.name for record in caplog.records] == ["telemetry.export"]
    exporter.gate.set()
    provider.shutdown()
    assert exporter.num_exported == ledger.counts().num_accepted == 6


@pytest.mark.parametrize("result", [SpanExportResult.FAILURE, ConnectionError("gone")])
def test_spans_are_counted_as_failed_when_the_exporter_gives_up(
    result: SpanExportResult | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    exporter, ledger = GatedExporter(result), SpanLedger("test", 4)
    exporter.gate.set()
    provider = provider_over(exporter, ledger)
    make_spans(provider, 3)
    provider.shutdown()

    counts = ledger.counts()
    assert (counts.num_failed, counts.num_accepted, counts.num_waiting) == (3, 0, 0)


def test_unsampled_spans_are_not_counted() -> None:
    exporter, ledger = GatedExporter(SpanExportResult.SUCCESS), SpanLedger("test", 4)
    exporter.gate.set()
    provider = provider_over(exporter, ledger)
    provider.sampler = ALWAYS_OFF
    make_spans(provider, 10)
    provider.shutdown()

    assert ledger.counts().num_admitted == ledger.counts().num_dropped == 0


def test_no_span_is_miscounted_when_many_threads_end_them() -> None:
    exporter, ledger = GatedExporter(SpanExportResult.SUCCESS), SpanLedger("test", 50)
    exporter.gate.set()
    provider = provider_over(exporter, ledger, max_queue_spans=50)
    threads = [threading.Thread(target=make_spans, args=(provider, 200)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    provider.shutdown()

    counts = ledger.counts()
    assert counts.num_accepted + counts.num_dropped == 1600
    assert counts.num_accepted == exporter.num_exported


def lost_telemetry() -> Telemetry:
    target = Target(url=f"http://127.0.0.1:{free_port()}/v1/traces", protocol="http/protobuf")
    return build("test", TelemetrySettings(target=target, export_timeout_seconds=0.2))


def test_losses_are_metrics_when_the_collector_is_gone() -> None:
    reader = InMemoryMetricReader()
    telemetry = lost_telemetry()
    telemetry.show_losses(MeterProvider([reader], shutdown_on_exit=False).get_meter("test"))
    make_spans(telemetry.provider, 3)
    telemetry.shutdown()

    assert readings(reader, metrics.SPANS_EXPORTED) == {None: 0, "export_failed": 3}
    assert readings(reader, metrics.SPANS_PROCESSED) == {None: 3, "queue_full": 0}


def test_losses_are_not_shown_when_nothing_is_exported() -> None:
    reader = InMemoryMetricReader()
    telemetry = build("test", TelemetrySettings())
    telemetry.show_losses(MeterProvider([reader], shutdown_on_exit=False).get_meter("test"))

    assert reader.get_metrics_data() is None
    telemetry.shutdown()


def readings(reader: InMemoryMetricReader, name: str) -> dict[object, float]:
    """Values by error type."""
    collected = reader.get_metrics_data()
    assert collected is not None
    return {
        (point.attributes or {}).get(names.ERROR_TYPE): point.value  # type: ignore[union-attr]  # a sum's
        for metric in collected.resource_metrics[0].scope_metrics[0].metrics
        for point in metric.data.data_points
        if metric.name == name
    }
