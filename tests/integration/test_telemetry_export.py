"""The real exporters against our receiver, and against collectors that are gone or never answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from telemetry.receiver import Receiver
from telemetry.settings import TelemetrySettings
from telemetry.setup import Telemetry, build
from tests.support.valkey import free_port

ROOT = Path(__file__).parents[2]


def telemetry_to(endpoint: str, protocol: str = "grpc", **environ: str) -> Telemetry:
    settings = TelemetrySettings.from_environment(
        {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": protocol,
            **environ,
        }
    )
    return build("test", settings)


def make_spans(telemetry: Telemetry, count: int) -> None:
    for number in range(count):
        telemetry.tracer().start_span(f"span {number}").end()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("endpoint", "protocol", "environ"),
    [
        ("grpc://{host}:{grpc_port}", "grpc", {}),
        ("http://{host}:{grpc_port}", "grpc", {}),
        ("{host}:{grpc_port}", "grpc", {"OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}),
        ("grpc://{host}:{grpc_port}/v1/traces", "grpc", {"OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}),
        ("http://{host}:{http_port}/v1/traces", "http/protobuf", {}),
        ("http://{host}:{http_port}", "http/protobuf", {}),
        ("grpc://{host}:{http_port}", "http/protobuf", {}),
        ("{host}:{http_port}/v1/traces", "http/protobuf", {"OTEL_EXPORTER_OTLP_TRACES_INSECURE": "1"}),
    ],
)
def test_spans_arrive_when_the_endpoint_is_written_in_any_of_its_ways(
    endpoint: str, protocol: str, environ: dict[str, str]
) -> None:
    with Receiver() as receiver:
        address = endpoint.format(
            host=receiver.host, grpc_port=receiver.grpc_port, http_port=receiver.http_port
        )
        telemetry = telemetry_to(address, protocol, **environ)
        make_spans(telemetry, 3)
        telemetry.shutdown()

        assert [span.name for span in receiver.spans()] == ["span 0", "span 1", "span 2"]
        assert {span.service for span in receiver.spans()} == {"test"}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_spans_arrive_when_they_are_compressed(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip")
    with Receiver() as receiver:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        telemetry = telemetry_to(endpoint, protocol)
        make_spans(telemetry, 2)
        telemetry.shutdown()

        assert len(receiver.spans()) == 2


def test_no_span_is_lost_when_many_are_made_at_once() -> None:
    with Receiver() as receiver:
        telemetry = telemetry_to(receiver.grpc_endpoint)
        make_spans(telemetry, 10_000)
        telemetry.shutdown(timeout_seconds=30)

        assert len(receiver.spans()) == 10_000


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_shutdown_is_bounded_when_the_collector_is_gone(protocol: str) -> None:
    telemetry = telemetry_to(f"http://127.0.0.1:{free_port()}/v1/traces", protocol)

    assert emit_and_shut_down(telemetry) < 1.5


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_shutdown_is_bounded_when_the_collector_never_answers(protocol: str, black_hole: str) -> None:
    telemetry = telemetry_to(f"http://{black_hole}/v1/traces", protocol)

    assert emit_and_shut_down(telemetry) < 1.5


def emit_and_shut_down(telemetry: Telemetry) -> float:
    """Seconds until 2,000 spans are made and a shutdown with a bound of one second returns."""
    started = time.monotonic()
    make_spans(telemetry, 2_000)
    emitted = time.monotonic() - started
    assert emitted < 2.0, "making spans waited for the network"
    started = time.monotonic()
    telemetry.shutdown(timeout_seconds=1.0)
    return time.monotonic() - started


def test_shutdown_does_nothing_when_it_is_repeated() -> None:
    with Receiver() as receiver:
        telemetry = telemetry_to(receiver.grpc_endpoint)
        make_spans(telemetry, 1)
        threads = [threading.Thread(target=telemetry.shutdown) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        telemetry.shutdown()

        assert len(receiver.spans()) == 1


def test_spans_have_ids_when_nothing_is_exported() -> None:
    telemetry = build("test", TelemetrySettings())
    span = telemetry.tracer().start_span("kept to itself")

    assert span.get_span_context().trace_id != 0
    assert span.get_span_context().trace_flags.sampled
    telemetry.shutdown()


def test_spans_are_not_made_when_the_sdk_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with Receiver() as receiver:
        telemetry = telemetry_to(receiver.grpc_endpoint, OTEL_SDK_DISABLED="true")
        make_spans(telemetry, 1)
        telemetry.shutdown()

        assert receiver.spans() == []


@pytest.mark.parametrize(
    ("environ", "settings_name", "expected"),
    [
        ({}, None, "default"),
        ({}, "set", "set"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=from-resource,a=b"}, None, "from-resource"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=from-resource"}, "set", "set"),
    ],
)
def test_service_name_comes_from_the_most_particular_place(
    environ: dict[str, str], settings_name: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    telemetry = build("default", replace(TelemetrySettings(), service_name=settings_name))

    assert telemetry.provider.resource.attributes["service.name"] == expected
    telemetry.shutdown()


EXITING_PROCESS = """
from telemetry.setup import configure
telemetry = configure("exiting")
assert configure("again") is telemetry
for number in range(600):
    telemetry.tracer().start_span(str(number)).end()
"""


def test_spans_arrive_when_a_process_just_ends() -> None:
    with Receiver() as receiver:
        _run_process(receiver.grpc_endpoint)

        assert len(receiver.spans()) == 600


def test_process_ends_in_time_when_the_collector_never_answers(black_hole: str) -> None:
    assert _run_process(f"grpc://{black_hole}") < 12


def _run_process(endpoint: str) -> float:
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", EXITING_PROCESS],
        env={**os.environ, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint},
        cwd=ROOT,
        timeout=60,
        check=True,
        capture_output=True,
    )
    return time.monotonic() - started
