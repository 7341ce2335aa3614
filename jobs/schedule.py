"""What happens to jobs because of the time alone: a wait that is over, a deadline that has passed.

    release, create ──▶ due ────────advance──▶ the broker's queue
    create ───────────▶ deadlines ──advance──▶ expired, where no live worker holds the job

The waits are kept in Redis, by the scripts that make them; no process remembers one. Every process that
lives, API or worker, advances the schedule about once a second: what one has done is not there for another.
See docs/decisions/0006-waits-in-redis.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import redis

from jobs import scripts
from jobs.keys import Keys
from jobs.multiplexed import MultiplexedClient
from jobs.redis_connection import store_errors
from jobs.settings import JobsSettings

TICK_SECONDS = 1.0
"""How often each process advances the schedule."""

MAX_AT_ONCE = 500
"""Of each kind, in one script: it holds up everybody else for some ten milliseconds."""


@dataclass(frozen=True, slots=True)
class Advance:
    num_ended: int
    """Jobs that met their deadline."""
    num_published: int
    """Jobs whose wait was over."""

    @property
    def is_complete(self) -> bool:
        """False when there was more to do than one call may."""
        return max(self.num_ended, self.num_published) < MAX_AT_ONCE


class Schedule(Protocol):
    """Blocking, for workers. Raises `StoreUnavailable`."""

    def advance(self, *, now: float) -> Advance:
        """Do what is due, each thing once, whoever else calls; a part of it where there is much."""
        ...


class AsyncSchedule(Protocol):
    """For the API; as `Schedule`."""

    async def advance(self, *, now: float) -> Advance: ...


class RedisSchedule:
    def __init__(self, client: redis.Redis, settings: JobsSettings) -> None:
        self._call = _Call(settings)
        self._advance = client.register_script(scripts.source("advance"))

    def advance(self, *, now: float) -> Advance:
        with store_errors():
            reply: Any = self._advance(keys=self._call.keys, args=self._call.args(now))
        return Advance(*reply)


class RedisAsyncSchedule:
    def __init__(self, client: MultiplexedClient, settings: JobsSettings) -> None:
        self._call = _Call(settings)
        self._advance = client.script("advance")

    async def advance(self, *, now: float) -> Advance:
        with store_errors():
            reply: Any = await self._advance(keys=self._call.keys, args=self._call.args(now))
        return Advance(*reply)


class _Call:
    """What `lua/advance.lua` is given."""

    def __init__(self, settings: JobsSettings) -> None:
        self._keys = Keys(settings.key_prefix)
        self._ttl = settings.result_ttl_seconds
        self.keys = [self._keys.deadlines, self._keys.due]

    def args(self, now: float) -> list[Any]:
        return [self._keys.prefix, repr(now), self._ttl, MAX_AT_ONCE]
