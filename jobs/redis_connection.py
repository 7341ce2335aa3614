"""Redis clients with the time limits and the error of this package.

The asyncio clients do not check the health of an idle connection: redis-py does so inside connecting too, and
a check that fails connects again, deeper, with all tries at each level; a hung Redis then holds a caller for
minutes. A dead connection shows by the socket's time limit, and the retry makes a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from jobs.errors import StoreUnavailable
from jobs.settings import JobsSettings

STORE_ERRORS = (RedisError, OSError, TimeoutError)
"""Whatever a client raises."""

MAX_ASYNC_CONNECTIONS = 32
"""One process on one event loop gains nothing from more."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Translate whatever the client raises; a full or read-only Redis counts as unavailable."""
    try:
        yield
    except STORE_ERRORS as error:
        raise as_unavailable(error) from error


def as_unavailable(error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"the job store did not answer: {type(error).__name__}")


def connect(settings: JobsSettings) -> redis.Redis:
    """A blocking client, shared by the threads of a worker; rides out short cuts by itself."""
    return redis.Redis.from_url(
        settings.redis_url.get_secret_value(),
        decode_responses=True,
        socket_timeout=settings.socket_timeout_seconds,
        socket_connect_timeout=min(3.0, settings.socket_timeout_seconds),
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), retries=3),
        health_check_interval=25,
    )


def connect_async(settings: JobsSettings) -> redis.asyncio.Redis:
    """For the API's requests: one quick retry, and a caller that finds every connection busy waits for one.

    The library's own pool makes a connection a caller, and from the hundred and first on it fails.
    """
    pool: redis.asyncio.BlockingConnectionPool = redis.asyncio.BlockingConnectionPool.from_url(
        settings.redis_url.get_secret_value(),
        max_connections=MAX_ASYNC_CONNECTIONS,
        timeout=settings.socket_timeout_seconds,
        retry=AsyncRetry(ExponentialBackoff(cap=0.2, base=0.05), retries=1),
        **_async_options(settings),
    )
    return redis.asyncio.Redis.from_pool(pool)


def connect_reader(settings: JobsSettings, *, block_seconds: float) -> redis.asyncio.Redis:
    """For one reader that blocks up to `block_seconds`.

    It repeats nothing by itself: after a cut the reader has to know, for what was said meanwhile may be lost.
    """
    options = _async_options(settings) | {"socket_timeout": block_seconds + settings.socket_timeout_seconds}
    pool: redis.asyncio.ConnectionPool = redis.asyncio.ConnectionPool.from_url(
        settings.redis_url.get_secret_value(), retry=AsyncRetry(NoBackoff(), 0), **options
    )
    return redis.asyncio.Redis.from_pool(pool)


def _async_options(settings: JobsSettings) -> dict[str, Any]:
    return {
        "decode_responses": True,
        "socket_timeout": settings.socket_timeout_seconds,
        "socket_connect_timeout": min(3.0, settings.socket_timeout_seconds),
    }
