"""A port of its own for Prometheus, in a process that serves no HTTP otherwise."""

from __future__ import annotations

import logging
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from telemetry.meter import CONTENT_TYPE, Metrics

_logger = logging.getLogger(__name__)


class MetricsPort:
    """`GET /metrics` on a port, until closed.

    Raises:
        OSError: the port cannot be had.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        self._server = _Server((host, port), _handler(metrics))
        threading.Thread(target=self._server.serve_forever, name="metrics-port", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def open_port(metrics: Metrics, host: str, port: int) -> MetricsPort | None:
    """None, and one warning, where the port cannot be had: a worker works without being watched."""
    try:
        return MetricsPort(metrics, host, port)
    except (OSError, OverflowError) as error:
        _logger.warning("no metrics on %s:%d: %s", host, port, error)
        return None


class _Server(ThreadingTCPServer):
    """Not http.server's own, which asks the resolver for this machine's name before it listens."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False


def _handler(metrics: Metrics) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0
        """Seconds; a client that says nothing must not keep a thread."""

        def do_GET(self) -> None:  # http.server's name
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            body = metrics.render()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A scrape every few seconds is not worth a line."""

    return Handler
