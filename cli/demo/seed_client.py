"""Runs the client of vLLM's tracing example as it stands, as a user would: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping

from cli.errors import DemoError
from cli.settings import PROJECT_FOLDER

PATH = PROJECT_FOLDER / "examples" / "dummy_client.py"
# What it posts to; the demo takes this port if it can.
URL = "http://localhost:8000"
PORT = 8000
SERVICE = "client-service"
SPAN = "client-span"


def source(url: str) -> str:
    """Return the client's text, posting to `url` instead of where it says.

    Raises:
        DemoError: The text is not there, or does not post where it is known to.
    """
    try:
        text = PATH.read_text(encoding="utf-8")
    except OSError as error:
        raise DemoError(f"{PATH}: cannot be read: {error.strerror}; run the demo from a checkout") from error
    if URL not in text:
        raise DemoError(f"{PATH}: does not post to {URL}; was it changed?")
    return text.replace(URL, url)


def environment(endpoint: str, base: Mapping[str, str]) -> dict[str, str]:
    """Return what the example's page exports before it starts the client."""
    return {
        **base,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
        "OTEL_SERVICE_NAME": SERVICE,
    }


def run(port: int, *, endpoint: str, environ: Mapping[str, str], deadline: float) -> None:
    """Return once the client has posted its request, got its answer and sent its span.

    Args:
        port: Where the API listens; the file is run untouched when it is the client's own.
        endpoint: Where its spans go, as `grpc://host:port`.
        environ: The environment to add to.
        deadline: When to give up, of `time.monotonic`.

    Raises:
        DemoError: It failed, or did not end in time.
    """
    script = [str(PATH)] if port == PORT else ["-c", source(f"http://127.0.0.1:{port}")]
    try:
        ended = subprocess.run(
            [sys.executable, *script],
            env=environment(endpoint, environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(0.1, deadline - time.monotonic()),
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError("the seed client did not end in time") from error
    if ended.returncode != 0:
        last_line = ended.stderr.strip().rpartition("\n")[2]
        raise DemoError(f"the seed client ended with exit code {ended.returncode}: {last_line}")
