"""A collector of metrics over OTLP, gRPC and HTTP: the newest points of each metric, and all exemplars.

The product's own receiver takes spans only; nothing of the product needs to receive metrics.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import grpc  # type: ignore[import-untyped]  # ships no types
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)


@dataclass(frozen=True, slots=True)
class Point:
    """One series of a metric, as pushed last; `value` is its sum."""

    service: str
    attributes: dict[str, str]
    value: float


class MetricCollector:
    """Listens inside a `with` block on two free ports."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._points: dict[tuple[str, str], list[Point]] = {}
        self._trace_ids: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self.protocols: set[str] = set()
        self._grpc = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        add_MetricsServiceServicer_to_server(_Service(self), self._grpc)  # type: ignore[no-untyped-call]
        self._grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    def __enter__(self) -> MetricCollector:
        self._grpc.start()
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grpc.stop(0.2).wait()
        self._http.shutdown()
        self._http.server_close()

    def endpoint(self, protocol: str) -> str:
        if protocol == "grpc":
            return f"grpc://127.0.0.1:{self._grpc_port}"
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1/metrics"

    def points(self, name: str) -> list[Point]:
        """Of all services."""
        with self._lock:
            return [point for (_, metric), kept in self._points.items() if metric == name for point in kept]

    def trace_ids(self, service: str, name: str) -> set[str]:
        """Of all exemplars that ever came: each is pushed once, with the next collection after it."""
        with self._lock:
            return set(self._trace_ids[service, name])

    def names(self) -> set[str]:
        with self._lock:
            return {name for _, name in self._points}

    def take(self, protocol: str, request: ExportMetricsServiceRequest) -> None:
        with self._lock:
            self.protocols.add(protocol)
            for resource in request.resource_metrics:
                service = _strings(resource.resource.attributes).get("service.name", "")
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        points = getattr(metric, metric.WhichOneof("data")).data_points
                        self._points[service, metric.name] = [_point(service, point) for point in points]
                        self._trace_ids[service, metric.name].update(
                            exemplar.trace_id.hex() for point in points for exemplar in point.exemplars
                        )


def _point(service: str, point: Any) -> Point:
    value = point.sum if hasattr(point, "sum") else point.as_double or point.as_int
    return Point(service, _strings(point.attributes), value)


def _strings(attributes: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in attributes}


class _Service(MetricsServiceServicer):
    def __init__(self, collector: MetricCollector) -> None:
        self._collector = collector

    def Export(  # the name is the protocol's
        self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        self._collector.take("grpc", request)
        return ExportMetricsServiceResponse()


def _handler(collector: MetricCollector) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name is the base class's
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.take("http/protobuf", ExportMetricsServiceRequest.FromString(body))
            reply = ExportMetricsServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: what came is asked for."""

    return Handler
