"""Waits until the API says that it and a worker are ready."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request

POLL_SECONDS = 0.25


async def wait_until_ready(url: str) -> None:
    """Return once `/health/ready` answers 200; runs until then, so bound or cancel it."""
    while not (await asyncio.to_thread(readiness, url))[0]:
        await asyncio.sleep(POLL_SECONDS)


def readiness(url: str, *, timeout_seconds: float = 5.0) -> tuple[bool, str]:
    """Return whether the API is ready, and what it, or the attempt to reach it, says about that."""
    try:
        with _OPENER.open(f"{url}/health/ready", timeout=timeout_seconds) as answer:
            return answer.status == 200, "ready"
    except urllib.error.HTTPError as error:
        return False, _reason(error)
    except urllib.error.URLError as error:
        return False, f"no answer: {getattr(error.reason, 'strerror', None) or error.reason}"
    except OSError as error:
        return False, f"no answer: {error}"


def _reason(error: urllib.error.HTTPError) -> str:
    with error:
        body = error.read(64 * 1024)
    try:
        return f"not ready: {', '.join(json.loads(body)['reasons'])}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"


# Our own API on this machine: a proxy named in the environment is not asked.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
