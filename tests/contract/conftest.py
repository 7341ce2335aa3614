from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr

from jobs.clock import SystemClock
from jobs.keys import Keys
from jobs.memory_store import MemorySchedule, MemoryStore
from jobs.message import MessageMaker
from jobs.model import JobId
from jobs.queue import create_celery
from jobs.redis_connection import connect, connect_async, connect_reader
from jobs.redis_registry import RedisModelAnnouncer, RedisModelDirectory
from jobs.redis_store import RedisAttemptStore, RedisReplyStream, RedisSubmissionStore
from jobs.registry import ModelAnnouncer, ModelDirectory
from jobs.schedule import AsyncSchedule, RedisAsyncSchedule
from jobs.settings import JobsSettings
from jobs.store import AttemptStore, ReplyStream, SubmissionStore
from tests.support.valkey import valkey_server


@dataclass
class Stores:
    """One store seen from both sides."""

    api: SubmissionStore
    replies: ReplyStream
    worker: AttemptStore
    directory: ModelDirectory
    announcer: ModelAnnouncer
    schedule: AsyncSchedule
    num_with_items: Callable[[], int]
    """Jobs of which the store holds items apart."""
    open: Callable[[str], set[JobId]]
    """The ledger of a queue."""
    messages: Callable[[str], list[JobId]]
    """The jobs whose messages are in a queue, oldest first."""


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with valkey_server() as url:
        yield url


@pytest.fixture(params=["memory", "valkey"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    if request.param == "memory":
        store = MemoryStore(result_ttl_seconds=3600)
        yield Stores(
            store,
            store,
            store,
            store,
            store,
            MemorySchedule(store),
            num_with_items=lambda: len(store._items),
            open=lambda queue: set(store._open.get(queue, {})),
            messages=lambda queue: [id for id, where in store.published if where == queue],
        )
        return
    settings = JobsSettings(
        redis_url=SecretStr(request.getfixturevalue("redis_url")), result_ttl_seconds=3600
    )
    keys = Keys(settings.key_prefix)
    client: Any = connect(settings)
    async_client, reading = connect_async(settings), connect_reader(settings, block_seconds=10)
    client.flushdb()
    yield Stores(
        RedisSubmissionStore(async_client, settings, MessageMaker(create_celery(settings), SystemClock())),
        RedisReplyStream(reading, settings),
        RedisAttemptStore(client, settings),
        RedisModelDirectory(async_client, settings),
        RedisModelAnnouncer(client, settings),
        RedisAsyncSchedule(async_client, settings),
        num_with_items=lambda: sum(1 for _ in client.scan_iter(match=f"{settings.key_prefix}items:*")),
        open=lambda queue: set(client.zrange(keys.open(queue), 0, -1)),
        messages=lambda queue: [
            json.loads(message)["headers"]["id"]
            for message in reversed(client.lrange(keys.broker_queue(queue)[0], 0, -1))
        ],
    )
    await reading.aclose()
    await async_client.aclose()
    client.close()
