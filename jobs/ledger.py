"""The ledger of open jobs against what the broker holds.

Celery on Redis can lose a message between its pop and its entry among the unacknowledged ones, and a
delivery that met a foreign lease is dropped. The ledger knows every open job: whoever compares the two
finds what must be published again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import redis

from jobs.keys import Keys
from jobs.model import JobId, WorkerId
from jobs.redis_connection import store_errors
from jobs.settings import JobsSettings

TURN_SECONDS = 5


@dataclass(frozen=True, slots=True)
class LostJob:
    """Open, but neither in the broker nor under a lease."""

    id: JobId
    queue: str
    traceparent: str | None


class Ledger:
    """Blocking; every method raises `StoreUnavailable`."""

    def __init__(self, client: redis.Redis, settings: JobsSettings) -> None:
        self._client: Any = client  # redis-py types one signature for both colours
        self._keys = Keys(settings.key_prefix)

    def take_turn(self, worker: WorkerId) -> bool:
        """True for one worker at a time; a turn not taken again ends by itself."""
        with store_errors():
            if self._client.get(self._keys.reconciler) == worker:
                self._client.expire(self._keys.reconciler, TURN_SECONDS)
                return True
            return bool(self._client.set(self._keys.reconciler, worker, nx=True, ex=TURN_SECONDS))

    def is_short(self) -> bool:
        """More jobs are open than messages exist and wait for their time. Cheap: counts only.

        Short for a moment is normal: a worker pops a message before it enters it as held.
        """
        with store_errors():
            queues = self._queues()
            pipeline = self._client.pipeline(transaction=False)
            for queue in queues:
                pipeline.zcard(self._keys.open(queue))
            for key in self._lists(queues):
                pipeline.llen(key)
            pipeline.hlen(self._keys.broker_unacked)
            pipeline.zcard(self._keys.due)
            counts = pipeline.execute()
        return bool(sum(counts[: len(queues)]) > sum(counts[len(queues) :]))

    def lost_jobs(self, *, now: float) -> list[LostJob]:
        """Reads every message and every open job: only when the counts say so."""
        with store_errors():
            queues = self._queues()
            known = {*self._ids_in_broker(queues), *self._client.zrange(self._keys.due, 0, -1)}
            return [
                LostJob(JobId(id), queue, traceparent)
                for queue in queues
                for id in self._client.zrange(self._keys.open(queue), 0, -1)
                if id not in known
                for lease_expires_at, traceparent in [self._lease(JobId(id))]
                if lease_expires_at <= now
            ]

    def keep_messages(self, tags: list[str], *, now: float) -> None:
        """Score messages that a live worker holds anew, so that the broker does not redeliver them."""
        if tags:
            with store_errors():
                self._client.zadd(self._keys.broker_unacked_index, dict.fromkeys(tags, now), xx=True)

    def _queues(self) -> list[str]:
        return sorted(self._client.smembers(self._keys.queues))

    def _lists(self, queues: list[str]) -> Iterator[str]:
        for queue in queues:
            yield from self._keys.broker_queue(queue)

    def _ids_in_broker(self, queues: list[str]) -> Iterator[str]:
        for key in self._lists(queues):
            yield from _task_ids(map(json.loads, self._client.lrange(key, 0, -1)))
        unacked = self._client.hvals(self._keys.broker_unacked)
        yield from _task_ids(json.loads(entry)[0] for entry in unacked)

    def _lease(self, id: JobId) -> tuple[float, str | None]:
        names = ["lease_expires_at", "traceparent"]
        lease_expires_at, traceparent = self._client.hmget(self._keys.job(id), names)
        return float(lease_expires_at or 0.0), traceparent


def _task_ids(messages: Iterable[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        yield message["headers"]["id"]
