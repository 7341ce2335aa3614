"""A series adds what its instrument adds, by a shorter way."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.metrics import NoOpMeter
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from telemetry.series import Labelled, Series

LABELS = {"model": "m", "priority": "batch"}
VALUES = (0.0, 0.5, 3.0, 100.0)

Record = Callable[[float, dict[str, str]], None]


def points(reader: InMemoryMetricReader) -> list[tuple[str, Any]]:
    """All that is told, without the stamps."""
    data = reader.get_metrics_data()
    assert data is not None
    return [
        (metric.name, strip(point))
        for scope in data.resource_metrics[0].scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    ]


def strip(point: Any) -> dict[str, Any]:
    told = {name: getattr(point, name) for name in point.__dataclass_fields__ if "time" not in name}
    told["exemplars"] = [(e.filtered_attributes, e.value, e.span_id, e.trace_id) for e in point.exemplars]
    return told


def add_all(record: Record, more: Record) -> None:
    """In spans that are sampled, not sampled and none, with labels of two kinds."""
    for number, value in enumerate(VALUES):
        own = SpanContext(7, number + 1, False, TraceFlags(number % 2))
        token = context_api.attach(trace.set_span_in_context(NonRecordingSpan(own)))
        record(value, LABELS)
        context_api.detach(token)
        more(value, LABELS | {"reason": "engine_crashed"})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exemplar_filter": AlwaysOffExemplarFilter()},
        {"views": [View(instrument_name="*", attribute_keys={"model"})]},
        {"views": [View(instrument_type=Histogram, aggregation=ExponentialBucketHistogramAggregation())]},
    ],
    ids=["plain", "no exemplars", "fewer attributes", "exponential"],
)
@pytest.mark.parametrize("temporality", [AggregationTemporality.CUMULATIVE, AggregationTemporality.DELTA])
def test_series_tells_what_its_instrument_tells(
    options: dict[str, Any], temporality: AggregationTemporality
) -> None:
    told = []
    for is_short in (False, True):
        random.seed(1)  # the SDK draws lots which values are exemplars
        readers = [
            InMemoryMetricReader(preferred_temporality={Counter: temporality, Histogram: temporality}),
            InMemoryMetricReader(),
        ]
        meter = MeterProvider(readers, shutdown_on_exit=False, **options).get_meter("test")
        counter, histogram = meter.create_counter("c"), meter.create_histogram("h")
        for instrument, record in ((counter, counter.add), (histogram, histogram.record)):
            series = Labelled(instrument, dict)
            short: Record = lambda value, labels, series=series: series[tuple(labels.items())].add(value)  # noqa: E731
            for _ in range(3):
                add_all(*(short, short) if is_short else (record, record))
        first = [points(reader) for reader in readers]
        histogram.record(1.0, LABELS)
        told.append((first, [points(reader) for reader in readers]))

    assert told[0] == told[1]


def test_short_way_is_taken_after_the_first_value() -> None:
    meter = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False).get_meter("test")
    series = [Series(meter.create_counter("c"), LABELS), Series(meter.create_histogram("h"), LABELS)]

    before = [one.is_found for one in series]
    for one in series:
        one.add(1)

    assert (before, [one.is_found for one in series]) == ([False, False], [True, True])


def test_reader_that_comes_later_gets_what_is_added_later() -> None:
    provider = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    series = Series(provider.get_meter("test").create_counter("c"), LABELS)
    series.add(1)
    late = InMemoryMetricReader()

    provider.add_metric_reader(late)
    series.add(2)

    ((_, point),) = points(late)
    assert point["value"] == 2


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_value_is_left_to_the_instrument_which_ignores_it(value: float) -> None:
    reader = InMemoryMetricReader()
    series = Series(MeterProvider([reader], shutdown_on_exit=False).get_meter("t").create_counter("c"), {})
    series.add(1)

    series.add(value)

    ((_, point),) = points(reader)
    assert point["value"] == 1


def test_series_of_a_meter_that_is_not_the_sdks_asks_it() -> None:
    series = Series(NoOpMeter("none").create_counter("c"), {})

    for _ in range(5):
        series.add(1)

    assert not series.is_found
