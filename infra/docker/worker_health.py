"""Exits with 0 when the worker of this container has been heard from lately: the container's health check.

It asks the registry that the API asks, so a worker whose engine hangs, and which therefore stays silent, is
unhealthy.
"""

from __future__ import annotations

import socket
import sys
import time

from jobs.keys import Keys
from jobs.redis_connection import connect_to
from jobs.registry import ALIVE_SECONDS
from jobs.settings import JobsSettings, read_settings

SOCKET_TIMEOUT_SECONDS = 3.0


def is_heard_from() -> bool:
    settings = read_settings(JobsSettings)
    keys = Keys(settings.key_prefix)
    since = time.time() - ALIVE_SECONDS
    url = settings.redis_url.get_secret_value()
    with connect_to(url, socket_timeout=SOCKET_TIMEOUT_SECONDS) as client:
        return any(
            str(worker).startswith(f"{socket.gethostname()}:")
            for model in client.hkeys(keys.models)
            for worker in client.zrangebyscore(keys.beats(model), since, "+inf")
        )


if __name__ == "__main__":
    sys.exit(not is_heard_from())
