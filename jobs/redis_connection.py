"""Redis clients with the time limits and the error of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from jobs.errors import StoreUnavailable
from jobs.settings import JobsSettings


@contextmanager
def store_errors() -> Iterator[None]:
    """Translate whatever the client raises; a full or read-only Redis counts as unavailable."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable(f"the job store did not answer: {type(error).__name__}") from error


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
    """An asyncio client for the API: one quick retry, then the caller answers 503."""
    from redis.asyncio.retry import Retry as AsyncRetry

    return redis.asyncio.Redis.from_url(
        settings.redis_url.get_secret_value(),
        decode_responses=True,
        socket_timeout=settings.socket_timeout_seconds,
        socket_connect_timeout=min(3.0, settings.socket_timeout_seconds),
        retry=AsyncRetry(ExponentialBackoff(cap=0.2, base=0.05), retries=1),
        health_check_interval=25,
    )
