from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import pytest
from pydantic import SecretStr

from jobs.memory_store import MemorySchedule, MemoryStore
from jobs.redis_connection import connect, connect_async
from jobs.redis_registry import RedisModelAnnouncer, RedisModelDirectory
from jobs.redis_store import RedisAttemptStore, RedisSubmissionStore
from jobs.registry import ModelAnnouncer, ModelDirectory
from jobs.schedule import AsyncSchedule, RedisAsyncSchedule
from jobs.settings import JobsSettings
from jobs.store import AttemptStore, SubmissionStore
from tests.support.valkey import valkey_server


@dataclass
class Stores:
    """One store seen from both sides."""

    api: SubmissionStore
    worker: AttemptStore
    directory: ModelDirectory
    announcer: ModelAnnouncer
    schedule: AsyncSchedule
    num_with_items: Callable[[], int]
    """Jobs of which the store holds items apart."""


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with valkey_server() as url:
        yield url


@pytest.fixture(params=["memory", "valkey"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    if request.param == "memory":
        store = MemoryStore(result_ttl_seconds=3600)
        yield Stores(store, store, store, store, MemorySchedule(store), lambda: len(store._items))
        return
    settings = JobsSettings(
        redis_url=SecretStr(request.getfixturevalue("redis_url")), result_ttl_seconds=3600
    )
    client, async_client = connect(settings), connect_async(settings)
    client.flushdb()
    yield Stores(
        RedisSubmissionStore(async_client, settings),
        RedisAttemptStore(client, settings),
        RedisModelDirectory(async_client, settings),
        RedisModelAnnouncer(client, settings),
        RedisAsyncSchedule(async_client, settings),
        lambda: sum(1 for _ in client.scan_iter(match=f"{settings.key_prefix}items:*")),
    )
    await async_client.aclose()
    client.close()
