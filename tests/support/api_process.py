"""The API as a process of its own: `python -m cli api`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from cli.settings import PROJECT_FOLDER
from tests.support.processes import wait_until
from tests.support.valkey import free_port

START_SECONDS = 60


def start_api(environment: Mapping[str, str], log_path: Path, *, port: int) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "cli", "api", "--port", str(port), "--drain-seconds", "2"]
    with log_path.open("wb") as log:
        return subprocess.Popen(
            argv,
            cwd=PROJECT_FOLDER,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@contextmanager
def running_api(environment: Mapping[str, str], log_path: Path) -> Iterator[httpx.Client]:
    """A client of an API that answers."""
    port = free_port()
    process = start_api(environment, log_path, port=port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until(
                lambda: is_live(client),
                timeout_seconds=START_SECONDS,
                what=f"the API answers; see {log_path}",
            )
            yield client
    finally:
        process.kill()
        process.wait(10)


def is_live(client: httpx.Client) -> bool:
    try:
        return client.get("/health/live").is_success
    except httpx.TransportError:
        return False
