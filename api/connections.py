"""The API's connections to Redis: few, shared by all requests."""

from __future__ import annotations

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from jobs.redis_connection import connect_async
from jobs.settings import JobsSettings

MAX_CONNECTIONS = 32
"""One process on one event loop gains nothing from more."""


def connect_reader(settings: JobsSettings, *, block_seconds: float) -> redis.asyncio.Redis:
    """For one reader that blocks up to `block_seconds`.

    It repeats nothing by itself: after a cut the reader has to know, for what was said meanwhile may be lost.
    """
    plain = connect_async(settings).connection_pool
    arguments = {
        **plain.connection_kwargs,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": block_seconds + settings.socket_timeout_seconds,
    }
    return redis.asyncio.Redis.from_pool(
        redis.asyncio.ConnectionPool(connection_class=plain.connection_class, **arguments)
    )


def connect_shared(settings: JobsSettings) -> redis.asyncio.Redis:
    """As `connect_async`, but a caller that finds every connection busy waits for one.

    The library's own pool makes a connection a caller, and from the hundred and first on it fails.
    """
    plain = connect_async(settings).connection_pool
    pool: redis.asyncio.BlockingConnectionPool = redis.asyncio.BlockingConnectionPool(
        max_connections=MAX_CONNECTIONS,
        timeout=settings.socket_timeout_seconds,
        connection_class=plain.connection_class,
        **plain.connection_kwargs,
    )
    return redis.asyncio.Redis.from_pool(pool)
