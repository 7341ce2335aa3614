"""Whether the API's port can be had, asked before anything is started."""

from __future__ import annotations

import errno
import socket

from cli.errors import PortInUseError


def check_free(host: str, port: int) -> None:
    """Return when the port could be listened on a moment ago.

    Raises:
        PortInUseError: It could not; the message says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the API's own socket: a port whose last connections still linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PortInUseError(_explain(host, port, error)) from error


def choose_free(host: str) -> int:
    """Return a port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _explain(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: {host}:{port} is in use by another process; choose another, or stop that one"
    if error.errno == errno.EACCES:
        return f"--port {port}: ports below 1024 need more rights; choose a higher one"
    return f"--host {host}: cannot listen there: {error.strerror or error}"
