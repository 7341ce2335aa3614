"""How much waits, by queue: for those who watch the system, not for those who run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import redis.asyncio

from jobs.keys import Keys
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

    def __init__(self, client: redis.asyncio.Redis, settings: JobsSettings) -> None:
        self._client: Any = client  # redis-py types one signature for both colours
        self._keys = Keys(settings.key_prefix)

    async def read(self) -> list[QueueBacklog]:
        with store_errors():
            queues = sorted(await self._client.smembers(self._keys.queues))
            pipeline = self._client.pipeline(transaction=False)
            for queue in queues:
                pipeline.zcard(self._keys.open(queue))
                pipeline.zrange(self._keys.open(queue), 0, 0, withscores=True)
                for key in self._keys.broker_queue(queue):
                    pipeline.llen(key)
            answers = await pipeline.execute()
        size = len(answers) // len(queues) if queues else 0
        return [
            _backlog(queue, answers[index * size : (index + 1) * size]) for index, queue in enumerate(queues)
        ]


def _backlog(queue: str, answers: list[Any]) -> QueueBacklog:
    num_open, oldest, *lengths = answers
    return QueueBacklog(
        queue=queue,
        num_waiting=sum(lengths),
        num_open=num_open,
        oldest_created_at=float(oldest[0][1]) if oldest else None,
    )
