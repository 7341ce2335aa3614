from __future__ import annotations

import logging
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

from telemetry import metrics, names
from telemetry.errors import SettingsError
from telemetry.meter import Metrics, build_metrics
from telemetry.metrics_port import open_port
from telemetry.settings import TelemetrySettings

BOUNDS = {shape.name: shape.bounds for shape in metrics.METRICS}


@pytest.fixture
def own() -> Iterator[Metrics]:
    own = build_metrics("test", TelemetrySettings(), {})
    yield own
    own.shutdown()


@pytest.mark.parametrize(
    ("name", "standard"),
    [
        (metrics.REQUEST_DURATION, metrics.STANDARD_DURATION_BOUNDS),
        (metrics.TIME_TO_FIRST_TOKEN, metrics.STANDARD_FIRST_TOKEN_BOUNDS),
        (metrics.TIME_PER_OUTPUT_TOKEN, metrics.STANDARD_OUTPUT_TOKEN_BOUNDS),
        (metrics.HTTP_DURATION, metrics.STANDARD_HTTP_BOUNDS),
    ],
)
def test_bounds_begin_with_the_conventions_and_reach_two_hours(
    name: str, standard: tuple[float, ...]
) -> None:
    bounds = BOUNDS[name]

    assert bounds[: len(standard)] == standard
    assert bounds[-1] == 7680
    assert list(bounds) == sorted(set(bounds))


def test_every_shape_becomes_an_instrument_of_its_kind_and_unit() -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader], shutdown_on_exit=False).get_meter("test")
    for shape in metrics.METRICS:
        match shape.kind:
            case "counter":
                metrics.counter(meter, shape.name).add(1)
            case "histogram":
                metrics.histogram(meter, shape.name).record(1.0)
            case "gauge":
                metrics.watch(meter, shape.name, lambda: [Observation(1)])

    collected = reader.get_metrics_data()

    assert collected is not None
    found = {metric.name: metric for metric in collected.resource_metrics[0].scope_metrics[0].metrics}
    assert {name: metric.unit for name, metric in found.items()} == {
        shape.name: shape.unit for shape in metrics.METRICS
    }
    for name, bounds in BOUNDS.items():
        if bounds:
            assert found[name].data.data_points[0].explicit_bounds == bounds  # type: ignore[union-attr]  # a histogram's


def test_attributes_are_of_the_few_with_bounded_values() -> None:
    allowed = {
        metrics.MODEL,
        metrics.PRIORITY,
        metrics.OUTCOME,
        metrics.MODALITY,
        names.ERROR_TYPE,
        names.GEN_AI_OPERATION_NAME,
        names.GEN_AI_PROVIDER_NAME,
        metrics.COMPONENT,
        metrics.HTTP_METHOD,
        metrics.HTTP_SCHEME,
        metrics.HTTP_ROUTE,
        metrics.HTTP_STATUS,
    }

    assert {key for shape in metrics.METRICS for key in (*shape.required, *shape.optional)} == allowed


def test_names_of_our_own_stay_out_of_foreign_namespaces() -> None:
    conventional = {metrics.HTTP_DURATION, metrics.SPANS_PROCESSED, metrics.SPANS_EXPORTED}
    own = {shape.name for shape in metrics.METRICS} - conventional

    assert all(re.match(r"gen_ai\.|throughline\.", name) for name in own)


def test_rendered_text_parses_and_holds_what_was_recorded(own: Metrics) -> None:
    metrics.counter(own.meter, metrics.ATTEMPTS).add(2, {metrics.MODEL: "house/bytes"})

    families = {family.name: family for family in text_string_to_metric_families(own.render().decode())}

    samples = families["throughline_attempts"].samples
    assert [(sample.name, sample.labels, sample.value) for sample in samples] == [
        ("throughline_attempts_total", {"gen_ai_request_model": "house/bytes"}, 2.0)
    ]


def test_port_answers_metrics_and_nothing_else(own: Metrics) -> None:
    metrics.counter(own.meter, metrics.ATTEMPTS).add(1)
    port = open_port(own, "127.0.0.1", 0)
    assert port is not None
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port.port}/metrics", timeout=5) as reply:
            assert b"throughline_attempts_total 1.0" in reply.read()
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"http://127.0.0.1:{port.port}/", timeout=5)
        assert refusal.value.code == 404
        refusal.value.close()
    finally:
        port.close()


def test_port_in_use_costs_one_warning_and_no_worker(own: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with caplog.at_level(logging.WARNING):
            port = open_port(own, "127.0.0.1", taken.getsockname()[1])

    assert port is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("endpoint", ["ftp://collector:4317", "http://", "http://collector:port"])
def test_otlp_endpoint_is_refused_with_variable_and_rule(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        build_metrics("test", TelemetrySettings(), {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": endpoint})


def test_shutdown_ends_in_its_time_when_the_collector_is_gone() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/metrics"
        environ = {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": address,
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
        }
        pushed = build_metrics("test", TelemetrySettings(), environ)
        metrics.counter(pushed.meter, metrics.ATTEMPTS).add(1)

        before = monotonic()
        pushed.shutdown(0.3)

        assert monotonic() - before < 2


def test_page_lists_the_metrics_that_the_code_names() -> None:
    page = Path(metrics.__file__).with_name("METRICS.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    told = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]

    def keys(listed: tuple[str, ...]) -> str:
        return ", ".join(f"`{key}`" for key in listed) or "-"

    assert told == [
        (
            f"`{shape.name}`",
            shape.kind,
            f"`{shape.unit}`",
            shape.made_by,
            keys(shape.required),
            keys(shape.optional),
            shape.description,
        )
        for shape in metrics.METRICS
    ]
