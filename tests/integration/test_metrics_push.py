"""Metrics pushed over OTLP by a real API and a real worker, with exemplars that name the job's trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.trace import format_trace_id

from telemetry import metrics
from telemetry.meter import build_metrics, shut_down
from telemetry.settings import TelemetrySettings
from telemetry.setup import build
from tests.support.metric_collector import MetricCollector
from tests.support.stack import RunningStack

API, WORKER = "throughline-api", "throughline-worker"
TRACED = {
    metrics.REQUEST_DURATION: WORKER,
    metrics.TIME_TO_FIRST_TOKEN: WORKER,
    metrics.TIME_PER_OUTPUT_TOKEN: WORKER,
    metrics.QUEUE_WAIT: WORKER,
    metrics.OUTPUT_TOKENS: WORKER,
    metrics.ATTEMPTS: WORKER,
    metrics.HTTP_DURATION: API,
    metrics.JOBS_SUBMITTED: API,
}


@pytest.fixture
def collector() -> Iterator[MetricCollector]:
    with MetricCollector() as collector:
        yield collector


@pytest.fixture
def stack(tmp_path: Path, collector: MetricCollector) -> Iterator[RunningStack]:
    environ = {
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": collector.endpoint("grpc"),
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        "THROUGHLINE_LOG_FORMAT": "json",
    }
    stack = RunningStack(tmp_path, environ=environ)
    try:
        stack.wait_until_ready()
        yield stack
    finally:
        stack.kill_everything()


def complete(stack: RunningStack) -> str:
    """A completion's trace id."""
    body = {"model": "throughline-tiny", "prompt": [300, 301], "max_tokens": 4, "ignore_eos": True}
    reply = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.headers["x-trace-id"]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_metrics_arrive_with_an_exemplar_when_pushed_over_either_protocol(
    collector: MetricCollector, protocol: str
) -> None:
    telemetry = build("test", TelemetrySettings())
    pushed = build_metrics(
        "test",
        telemetry.settings,
        {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": collector.endpoint(protocol),
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": protocol,
        },
    )
    with telemetry.tracer().start_as_current_span("process") as span:
        metrics.histogram(pushed.meter, metrics.QUEUE_WAIT).record(3000.0, {metrics.MODEL: "m"})
    shut_down(telemetry, pushed)

    (point,) = collector.points(metrics.QUEUE_WAIT)
    assert (point.service, point.attributes, point.value) == ("test", {metrics.MODEL: "m"}, 3000.0)
    trace_id = format_trace_id(span.get_span_context().trace_id)
    assert collector.trace_ids("test", metrics.QUEUE_WAIT) == {trace_id}
    assert collector.protocols == {protocol}


def test_pushed_metrics_name_the_jobs_trace(stack: RunningStack, collector: MetricCollector) -> None:
    trace_id = complete(stack)

    for name, service in TRACED.items():
        stack.wait(
            lambda name=name, service=service: trace_id in collector.trace_ids(service, name),
            f"{name} of {service} has an exemplar of the job's trace",
            10,
        )
    assert collector.names() <= {shape.name for shape in metrics.METRICS}
    assert sum(point.value for point in collector.points(metrics.OUTPUT_TOKENS)) == 4
    lines = [json.loads(line[line.index("{") :]) for line in stack.log().splitlines() if '"trace_id"' in line]
    worker_lines = [line for line in lines if line["service"] == WORKER and line["trace_id"] == trace_id]
    assert worker_lines, stack.log()
    assert all(len(line["span_id"]) == 16 and line["job_id"] for line in worker_lines)

    assert stack.stop() == 0
