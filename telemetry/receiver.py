"""A small OTLP receiver: gRPC and HTTP on loopback, spans kept in memory up to a number.

It serves the demo, `throughline trace` and the tests, which see through it exactly what any collector would
be sent. Only traces, only protobuf. Not for the open network: it has no authentication.

    exporter ──gRPC──▶ _TraceService ─┐
    exporter ──HTTP──▶ _TraceHandler ─┴▶ decode ──▶ _SpanStore ──▶ spans, trace, of_job, wait_for
                                                                └─▶ GET /traces/{id}, /jobs/{id}/trace,
                                                                    /trace/{id} for a browser
"""

from __future__ import annotations

import json
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import grpc  # type: ignore[import-untyped]  # ships no types
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from telemetry import names
from telemetry.errors import ReceiverError
from telemetry.record import SpanRecord, decode, size_bytes
from telemetry.record_json import to_json

__all__ = ["Receiver", "SpanRecord"]

_MAX_REQUEST_BYTES = 64 * 1024 * 1024  # what the Python HTTP exporter sends at most
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Receiver:
    """Listens from `start` to `stop`; a port given as 0 is chosen and can then be read.

    A `with` block starts and stops it. All methods may be called from any thread.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
        *,
        max_spans: int = 100_000,
        max_bytes: int = 256 * 1024 * 1024,
    ) -> None:
        """Of more than `max_spans`, or of about `max_bytes` in memory, the oldest are forgotten."""
        self.host = host
        self.grpc_port = grpc_port
        self.http_port = http_port
        self._store = _SpanStore(max_spans, max_bytes)
        self._grpc_server: grpc.Server | None = None
        self._http_server: ThreadingHTTPServer | None = None

    @property
    def grpc_endpoint(self) -> str:
        return f"grpc://{self.host}:{self.grpc_port}"

    @property
    def http_endpoint(self) -> str:
        return f"http://{self.host}:{self.http_port}/v1/traces"

    @property
    def read_url(self) -> str:
        """Where spans are read: `/traces/{trace_id}` and `/jobs/{job_id}/trace` stand below it.

        So does `/trace/{trace_id}`, a page for a browser on this machine.
        """
        return f"http://{self.host}:{self.http_port}"

    def start(self) -> None:
        """Both ports are listened on.

        Raises:
            ReceiverError: one of them is taken, or the host is not this machine's.
        """
        self._grpc_server = self._start_grpc()
        try:
            self._http_server = self._start_http()
        except ReceiverError:
            self.stop()
            raise

    def stop(self) -> None:
        """Nothing is listened on; the spans stay readable."""
        if self._grpc_server is not None:
            self._grpc_server.stop(grace=0.5).wait()
            self._grpc_server = None
        if self._http_server is not None:
            self._http_server.shutdown()
            self._http_server.server_close()
            self._http_server = None

    def __enter__(self) -> Receiver:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def spans(self) -> list[SpanRecord]:
        """All that are kept, in the order of arrival."""
        return self._store.spans()

    def trace(self, trace_id: str) -> list[SpanRecord]:
        return [span for span in self.spans() if span.trace_id == trace_id]

    def of_job(self, job_id: str) -> list[SpanRecord]:
        """Return the traces in which the job was sent or run, whole; more than one in link-only mode."""
        return _of_job(self.spans(), job_id)

    def trace_ids(self) -> list[str]:
        """In the order of arrival, each once."""
        return list(dict.fromkeys(span.trace_id for span in self.spans()))

    def wait_for(self, predicate: Callable[[list[SpanRecord]], bool], timeout_seconds: float = 10.0) -> bool:
        """Whether `predicate` came true for the spans received, looked at on every arrival."""
        return self._store.wait_for(predicate, timeout_seconds)

    @property
    def num_evicted(self) -> int:
        """Spans forgotten for newer ones, because more came than may be held."""
        return self._store.num_evicted

    def clear(self) -> None:
        self._store.clear()

    def _start_grpc(self) -> grpc.Server:
        server = grpc.server(
            ThreadPoolExecutor(max_workers=4, thread_name_prefix="otlp-grpc"),
            # Without the second option two receivers would share a port and halve each other's spans.
            options=[("grpc.max_receive_message_length", _MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)],
        )
        add_TraceServiceServicer_to_server(_TraceService(self._store), server)  # type: ignore[no-untyped-call]
        try:
            self.grpc_port = server.add_insecure_port(f"{self.host}:{self.grpc_port}")
        except RuntimeError as error:
            raise ReceiverError(f"cannot listen for gRPC on {self.host}:{self.grpc_port}") from error
        server.start()
        return server

    def _start_http(self) -> ThreadingHTTPServer:
        try:
            server = _HttpServer((self.host, self.http_port), self._store)
        except OSError as error:
            raise ReceiverError(
                f"cannot listen for HTTP on {self.host}:{self.http_port}: {error.strerror}"
            ) from error
        self.http_port = server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server


def _of_job(spans: list[SpanRecord], job_id: str) -> list[SpanRecord]:
    trace_ids = {
        span.trace_id for span in spans if _is_of_story(span) and span.attributes.get(names.JOB_ID) == job_id
    }
    return [span for span in spans if span.trace_id in trace_ids]


def _is_of_story(span: SpanRecord) -> bool:
    """Requests that poll a job name it too, but are no part of its story; its messages and attempts are."""
    return span.kind in ("PRODUCER", "CONSUMER") or names.JOB_ATTEMPT in span.attributes


def _of_page(spans: list[SpanRecord], trace_id: str) -> list[SpanRecord]:
    """The trace, with the other traces of the jobs that were sent or run in it."""
    own = [span for span in spans if span.trace_id == trace_id]
    job_ids = {str(span.attributes.get(names.JOB_ID)) for span in own if _is_of_story(span)}
    trace_ids = {trace_id} | {span.trace_id for id in job_ids for span in _of_job(spans, id)}
    return [span for span in spans if span.trace_id in trace_ids]


class _SpanStore:
    """A bounded list of spans that can be waited on.

    Invariant: `_num_bytes` is the sum of the sizes of what is held.
    """

    def __init__(self, max_spans: int, max_bytes: int) -> None:
        self._spans: deque[SpanRecord] = deque()
        self._max_spans = max_spans
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._changed = threading.Condition()
        self.num_evicted = 0

    def add(self, spans: Iterable[SpanRecord]) -> None:
        with self._changed:
            for span in spans:
                self._spans.append(span)
                self._num_bytes += size_bytes(span)
                while len(self._spans) > self._max_spans or self._num_bytes > self._max_bytes:
                    self._num_bytes -= size_bytes(self._spans.popleft())
                    self.num_evicted += 1
            self._changed.notify_all()

    def spans(self) -> list[SpanRecord]:
        with self._changed:
            return list(self._spans)

    def clear(self) -> None:
        with self._changed:
            self._spans.clear()
            self._num_bytes = 0

    def wait_for(self, predicate: Callable[[list[SpanRecord]], bool], timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while not predicate(list(self._spans)):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._changed.wait(remaining)
            return True


class _TraceService(TraceServiceServicer):
    def __init__(self, store: _SpanStore) -> None:
        self._store = store

    def Export(  # the name is the protocol's
        self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        self._store.add(decode(request))
        return ExportTraceServiceResponse()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], store: _SpanStore) -> None:
        self.store = store
        self._open: set[socket.socket] = set()
        super().__init__(address, _TraceHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Kept connections end too: a sender on one would go on handing in spans to nobody."""
        super().server_close()
        for connection in list(self._open):
            with suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A sender that hangs up is its own business; nothing is printed."""


class _BadRequest(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _TraceHandler(BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"
    timeout = 30  # of an idle connection, in seconds

    def do_POST(self) -> None:  # the name is the base class's
        try:
            body = self._body()
            if self.path.partition("?")[0] != "/v1/traces":
                raise _BadRequest(404, "only /v1/traces is served")
            if self.headers.get_content_type() != "application/x-protobuf":
                raise _BadRequest(415, "only application/x-protobuf is understood")
            self.server.store.add(decode(ExportTraceServiceRequest.FromString(body)))
        except DecodeError:
            self._answer(400, b"not an ExportTraceServiceRequest", "text/plain")
        except _BadRequest as refusal:
            self._answer(refusal.status, str(refusal).encode(), "text/plain")
        else:
            self._answer(200, ExportTraceServiceResponse().SerializeToString(), "application/x-protobuf")

    def do_GET(self) -> None:  # the name is the base class's
        try:
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in _LOOPBACK:
                # A page in somebody's browser may have its own name resolve to this machine.
                raise _BadRequest(403, "the Host must be this machine's loopback")
            body, content_type = self._found(urlsplit(self.path).path)
        except _BadRequest as refusal:
            self._answer(refusal.status, str(refusal).encode(), "text/plain")
        except ValueError:
            self._answer(400, b"no valid Host or path", "text/plain")
        else:
            self._answer(200, body, content_type)

    def _found(self, path: str) -> tuple[bytes, str]:
        """Return what the path asks for; as JSON no spans where none came, which may still change."""
        spans = self.server.store.spans()
        match [unquote(part) for part in path.split("/")[1:]]:
            case ["traces", trace_id]:
                return self._as_json([span for span in spans if span.trace_id == trace_id.lower()])
            case ["jobs", job_id, "trace"]:
                return self._as_json(_of_job(spans, job_id))
            case ["trace", trace_id]:
                return _page(_of_page(spans, trace_id.lower()), trace_id.lower())
        raise _BadRequest(404, "only /traces/{trace_id}, /jobs/{job_id}/trace and /trace/{trace_id} are read")

    def _as_json(self, spans: list[SpanRecord]) -> tuple[bytes, str]:
        content = {"spans": [to_json(span) for span in spans], "num_evicted": self.server.store.num_evicted}
        return json.dumps(content).encode(), "application/json"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the receiver speaks through its spans."""

    def _body(self) -> bytes:
        """The whole body, unpacked; a connection with a body left unread is not used again."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MAX_REQUEST_BYTES:
            self.close_connection = True
            raise _BadRequest(413 if length.isdigit() else 411, "the length must be given, and below 64 MiB")
        return _unpack(self.rfile.read(int(length)), self.headers.get("Content-Encoding", "identity"))

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _page(spans: list[SpanRecord], trace_id: str) -> tuple[bytes, str]:
    from telemetry.html import render_html  # not needed to receive spans

    if not spans:
        raise _BadRequest(404, "no span of this trace has come, or they made room for newer ones")
    return render_html(spans, title=f"Trace {trace_id}").encode(), "text/html; charset=utf-8"


def _unpack(body: bytes, encoding: str) -> bytes:
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise _BadRequest(415, "the encoding must be gzip, deflate or identity")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip and zlib headers are told apart
    try:
        unpacked = unpacker.decompress(body, _MAX_REQUEST_BYTES)
    except zlib.error as error:
        raise _BadRequest(400, f"the body is no {encoding}") from error
    if unpacker.unconsumed_tail:
        raise _BadRequest(413, f"unpacked, at most {_MAX_REQUEST_BYTES} bytes")
    return unpacked
