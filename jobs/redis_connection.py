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
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from jobs.errors import StoreUnavailable
from jobs.multiplexed import MultiplexedClient
from jobs.redis_url import SentinelService, sentinel_service
from jobs.settings import JobsSettings

STORE_ERRORS = (RedisError, OSError, TimeoutError)
"""Whatever a client raises."""


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
    return connect_to(
        settings.redis_url.get_secret_value(),
        socket_timeout=settings.socket_timeout_seconds,
        socket_connect_timeout=min(3.0, settings.socket_timeout_seconds),
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), retries=3),
        health_check_interval=25,
    )


def connect_to(url: str, **options: Any) -> redis.Redis:
    """A blocking client of the Redis that the URL names, with options of redis-py's connections.

    Behind Sentinels each new connection asks them for the primary of that moment.
    """
    service = sentinel_service(url)
    if service is None:
        return redis.Redis.from_url(url, decode_responses=True, **options)
    sentinel: Any = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]  # redis-py's
        service.sentinels, sentinel_kwargs=_sentinel_options(service, options, Retry(NoBackoff(), 0))
    )
    client: redis.Redis = sentinel.master_for(
        service.name, decode_responses=True, **service.primary_options, **options
    )
    return client


def connect_async(settings: JobsSettings) -> MultiplexedClient:
    """For the API's requests, which share one connection; one quick retry."""
    return MultiplexedClient(
        _async_connections(settings), silence_seconds=settings.socket_timeout_seconds, num_retries=1
    )


def connect_reader(settings: JobsSettings, *, block_seconds: float) -> MultiplexedClient:
    """For one reader that blocks up to `block_seconds`.

    It repeats nothing by itself: after a cut the reader has to know, for what was said meanwhile may be lost.
    """
    return MultiplexedClient(
        _async_connections(settings),
        silence_seconds=block_seconds + settings.socket_timeout_seconds,
        num_retries=0,
    )


class _SentinelPool(redis.asyncio.sentinel.SentinelConnectionPool):
    """Closes its connections to the Sentinels too."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:  # at the end; else the primary has moved, and they are asked on
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.aclose()


def _async_connections(settings: JobsSettings) -> redis.asyncio.ConnectionPool:
    """Makes connections; none of them is repeated here, nor looked after by redis-py once it is made."""
    url = settings.redis_url.get_secret_value()
    options = _async_options(settings) | {"protocol": 2, "retry": AsyncRetry(NoBackoff(), 0)}
    service = sentinel_service(url)
    if service is None:
        return redis.asyncio.ConnectionPool.from_url(url, **options)
    sentinel: Any = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]  # redis-py's
        service.sentinels, sentinel_kwargs=_sentinel_options(service, options, options["retry"])
    )
    pool: redis.asyncio.ConnectionPool = _SentinelPool(  # type: ignore[no-untyped-call]  # redis-py's
        service.name, sentinel, **service.primary_options, **options
    )
    return pool


def _sentinel_options(
    service: SentinelService, options: dict[str, Any], retry: Retry | AsyncRetry
) -> dict[str, Any]:
    """Of a connection to a Sentinel: the time limits of those to the primary, its own login and TLS.

    One try each, for the next Sentinel may answer, and callers repeat; redis-py would try ten times.
    """
    limits = {name: value for name, value in options.items() if name.startswith("socket_")}
    return {**limits, "retry": retry, **service.sentinel_options}


def _async_options(settings: JobsSettings) -> dict[str, Any]:
    return {
        "decode_responses": True,
        "socket_timeout": settings.socket_timeout_seconds,
        "socket_connect_timeout": min(3.0, settings.socket_timeout_seconds),
    }
