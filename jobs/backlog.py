"""How much waits, by queue: for those who watch the system, not for those who run it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from jobs.keys import Keys
from jobs.multiplexed import MultiplexedClient
from jobs.redis_connection import store_errors
from jobs.settings import JobsSettings


@dataclass(frozen=True, slots=True)
class QueueBacklog:
    queue: str
    num_waiting: int
    """Messages that no worker has taken yet."""
    num_open: int
    """Jobs of the ledger: waiting or running."""
    oldest_created_at: float | None
    """Of the open ones, in Unix seconds; None when there are none."""


class BacklogReader(Protocol):
    """Raises `StoreUnavailable`."""

    async def read(self) -> list[QueueBacklog]: ...


class RedisBacklog:
    """Two round trips, whatever the number of jobs."""

    def __init__(self, client: MultiplexedClient, settings: JobsSettings) -> None:
        self._client = client
        self._keys = Keys(settings.key_prefix)

    async def read(self) -> list[QueueBacklog]:
        with store_errors():
            queues = sorted(await self._client.call("SMEMBERS", self._keys.queues))
            return await asyncio.gather(*map(self._read, queues))

    async def _read(self, queue: str) -> QueueBacklog:
        call, ledger = self._client.call, self._keys.open(queue)
        num_open, oldest, *lengths = await asyncio.gather(
            call("ZCARD", ledger),
            call("ZRANGE", ledger, 0, 0, "WITHSCORES"),
            *(call("LLEN", key) for key in self._keys.broker_queue(queue)),
        )
        return QueueBacklog(
            queue=queue,
            num_waiting=sum(lengths),
            num_open=num_open,
            oldest_created_at=float(oldest[1]) if oldest else None,
        )
