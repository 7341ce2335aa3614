"""What a collector may do wrong: no job is lost or late to end, and every span that is lost is counted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from telemetry.export import SpanCounts
from telemetry.receiver import Receiver
from telemetry.settings import TelemetrySettings
from telemetry.setup import Telemetry, build
from tests.support.processes import wait_until
from tests.support.stack import RunningStack
from tests.support.tcp_proxy import TcpProxy
from tests.support.trace_invariants import check_trace_invariants
from tests.support.trace_losses import FAILED, lost_spans
from tests.support.valkey import free_port

COMPLETION_SPANS = 16
SCHEDULING_SECONDS = 5.0
"""What a process may take beyond its own bound on a machine where others work too."""


@contextmanager
def refusing() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}/v1/traces"


@contextmanager
def answering(status: int, after_seconds: float = 0.0) -> Iterator[str]:
    leaving = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name is the base class's
            self.rfile.read(int(self.headers["Content-Length"]))
            leaving.wait(after_seconds)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    finally:
        leaving.set()
        server.shutdown()
        server.server_close()


@contextmanager
def silent() -> Iterator[str]:
    with Receiver() as receiver, TcpProxy(receiver.http_port) as proxy:
        proxy.freeze()
        yield f"http://127.0.0.1:{proxy.port}/v1/traces"


def telemetry_to(endpoint: str, *, timeout_seconds: float = 0.3) -> Telemetry:
    return build(
        "test",
        TelemetrySettings.from_environment(
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint,
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf" if "v1/traces" in endpoint else "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": str(timeout_seconds),
                "OTEL_BSP_MAX_QUEUE_SIZE": "100",
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "20",
                "OTEL_BSP_SCHEDULE_DELAY": "20",
            }
        ),
    )


def make_spans(telemetry: Telemetry, count: int) -> None:
    for _ in range(count):
        telemetry.tracer().start_span("span").end()


def counts(telemetry: Telemetry) -> SpanCounts:
    (only,) = telemetry.span_counts().values()
    return only


@pytest.mark.parametrize(
    "collector",
    [refusing, silent, lambda: answering(503), lambda: answering(400), lambda: answering(200, 30.0)],
    ids=["refuses", "is silent", "is busy", "finds fault", "is slow"],
)
def test_lost_spans_are_counted_and_the_end_is_bounded_when_the_collector(
    collector: Callable[[], AbstractContextManager[str]],
) -> None:
    with collector() as endpoint:
        telemetry = telemetry_to(endpoint)
        make_spans(telemetry, 20)
        wait_until(lambda: counts(telemetry).num_failed == 20, timeout_seconds=10, what="a batch is lost")
        make_spans(telemetry, 500)
        started = time.monotonic()
        telemetry.shutdown(1.0)
        seconds = time.monotonic() - started
        found = counts(telemetry)

    assert found.num_accepted == 0
    assert found.num_dropped > 0, "the queue of 100 took 500 spans"
    assert found.num_failed + found.num_dropped + found.num_waiting == 520
    assert seconds < 1.0 + SCHEDULING_SECONDS


def test_nothing_is_lost_when_the_collector_is_only_slow() -> None:
    with answering(200, 0.1) as endpoint:
        telemetry = telemetry_to(endpoint, timeout_seconds=10)
        make_spans(telemetry, 60)
        telemetry.shutdown(10)

    assert counts(telemetry).num_accepted == 60


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_spans_arrive_again_when_the_collector_was_restarted(protocol: str) -> None:
    with Receiver() as first:
        ports = first.grpc_port, first.http_port
        telemetry = telemetry_to(first.grpc_endpoint if protocol == "grpc" else first.http_endpoint)
        make_spans(telemetry, 5)
        # Answered too: a collector that ends between taking and answering makes the sender send again.
        wait_until(lambda: counts(telemetry).num_accepted == 5, timeout_seconds=10, what="five have come")
        assert len(first.spans()) == 5
    make_spans(telemetry, 5)
    wait_until(lambda: counts(telemetry).num_failed == 5, timeout_seconds=10, what="five are lost")
    with Receiver(grpc_port=ports[0], http_port=ports[1]) as second:

        def arrives() -> bool:
            make_spans(telemetry, 1)
            return bool(second.spans())

        wait_until(arrives, timeout_seconds=30, what="spans arrive again")
        telemetry.shutdown(5)

        found = counts(telemetry)
        assert found.num_accepted == 5 + len(second.spans())


class DrilledStack:
    """A stack whose collector stands behind a proxy that can fall silent."""

    def __init__(self, folder: Path, collector: Receiver, proxy: TcpProxy) -> None:
        self.collector, self.proxy = collector, proxy
        self.worker_port = free_port()
        environ = {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"grpc://127.0.0.1:{proxy.port}",
            "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "0.5",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "THROUGHLINE_METRICS_PORT": str(self.worker_port),
        }
        self.stack = RunningStack(folder, environ=environ)

    def complete(self) -> str:
        """A completion's trace id."""
        body = {"model": "throughline-tiny", "prompt": [300, 301], "max_tokens": 2, "ignore_eos": True}
        reply = httpx.post(f"{self.stack.url}/v1/completions", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return str(reply.headers["x-trace-id"])

    def has_arrived(self, trace_id: str) -> bool:
        """The whole of it, as the rules say; torn traces of the bad time stay as they are."""
        spans = self.collector.trace(trace_id)
        if len(spans) < COMPLETION_SPANS:
            return False
        check_trace_invariants(spans, failed_job_ids=())
        return True

    def num_lost(self) -> list[float]:
        """Spans that API and worker each failed to export."""
        ports = self.stack.port, self.worker_port
        return [lost_spans(f"127.0.0.1:{port}")[FAILED] for port in ports]

    def seconds_to_end(self, program: str) -> float:
        """From SIGTERM to the end of a process; the supervisor starts another one."""
        (pid,) = self.stack.pids_of(program)
        started = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        self.stack.wait(lambda: pid not in self.stack.pids_of(program), f"{program} ended", 30)
        return time.monotonic() - started


@pytest.fixture
def drilled(tmp_path: Path) -> Iterator[DrilledStack]:
    with Receiver() as collector, TcpProxy(collector.grpc_port) as proxy:
        drilled = DrilledStack(tmp_path, collector, proxy)
        try:
            drilled.stack.wait_until_ready()
            yield drilled
        finally:
            drilled.stack.kill_everything()


def test_stack_serves_counts_recovers_and_ends_in_time_when_its_collector_falls_silent(
    drilled: DrilledStack,
) -> None:
    healthy = drilled.complete()
    drilled.stack.wait(lambda: drilled.has_arrived(healthy), "the first trace arrived", 20)
    assert drilled.num_lost() == [0, 0]

    drilled.proxy.freeze()
    for _ in range(3):
        drilled.complete()
    drilled.stack.wait(lambda: min(drilled.num_lost()) > 0, "API and worker count lost spans", 20)

    drilled.proxy.heal()

    def arrives() -> bool:
        trace_id = drilled.complete()
        return drilled.collector.wait_for(lambda _: drilled.has_arrived(trace_id), 2)

    drilled.stack.wait(arrives, "a whole trace arrived again", 60)

    drilled.proxy.freeze()
    drilled.complete()
    for program in ("cli api", "workers.main worker"):
        assert drilled.seconds_to_end(program) < 3.0 + SCHEDULING_SECONDS, drilled.stack.log()
