"""The worker's side of the broker, with fewer round trips than kombu's.

    kombu, one message:      BRPOP ─▶ MULTI ZADD HSET EXEC ─▶ (task) ─▶ MULTI ZREM HDEL EXEC
    here, up to eight:       BRPOP ─▶ take.lua             ─▶ (task) ─▶ part of settle.lua

What is popped together is entered among the held messages in the same script, so such a message cannot be
lost between the two, as the first one still can (`jobs.ledger` finds it). Leans on kombu internals, hence the
pin on 5.7.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import redis
from kombu.transport import redis as kombu_redis
from kombu.transport.virtual import base

from jobs import broker_channel, scripts
from jobs.broker_channel import SharedClientChannel
from jobs.keys import Keys

_QoS: Any = kombu_redis.QoS
_VirtualQoS: Any = base.QoS

MORE_AT_ONCE = 7
"""Beside the first. More would gain little and let one of several workers take what another has room for."""


class MessageTaker:
    """Runs `take.lua`. Errors are redis-py's own, which kombu's consumer knows how to survive."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._keys = keys
        self._take = client.register_script(scripts.source("take"))

    def take(self, tag: str, entry: str, queues: list[str], *, max_more: int) -> list[tuple[str, str]]:
        """The message is entered as held; returned are others that now are too, with their queues."""
        lists = [self._keys.broker_queue(queue) for queue in queues]
        steps = [
            (name, queue)
            for step in zip(*lists, strict=True)
            for name, queue in zip(step, queues, strict=True)
        ]
        reply: Any = self._take(
            keys=[self._keys.broker_unacked, self._keys.broker_unacked_index, *(name for name, _ in steps)],
            args=[repr(time.time()), tag, entry, max_more, *(queue for _, queue in steps)],
        )
        return list(zip(reply[::2], reply[1::2], strict=True))


class WorkerQoS(_QoS):  # type: ignore[misc]  # kombu is untyped
    def append(self, message: Any, delivery_tag: str) -> None:
        self.channel.enter(message, delivery_tag)
        _VirtualQoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        if self.channel.was_settled(delivery_tag):
            _VirtualQoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)


class WorkerChannel(SharedClientChannel):
    """All of a process's channels; set up by `install`."""

    QoS = WorkerQoS
    taker: MessageTaker
    settled_tags: set[str]
    """Of messages that left the broker with their job's settling and are not acknowledged to Celery yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_reading = False
        self._taken: deque[tuple[str, str]] = deque()
        self._entered: set[str] = set()

    def enter(self, message: Any, tag: str) -> None:
        """The message is among the held ones, unless it has been settled since it came."""
        if tag in self._entered:
            self._entered.discard(tag)
        elif tag not in self.settled_tags:
            info = message.delivery_info
            entry = json.dumps([message._raw, info["exchange"], info["routing_key"]])
            queues = list(self._queue_cycle.consume(len(self.active_queues)))
            more = self.taker.take(tag, entry, queues, max_more=self._room() if self._is_reading else 0)
            self._taken.extend(more)

    def was_settled(self, tag: str) -> bool:
        """True once, for a message that left the broker with its job's settling."""
        if tag not in self.settled_tags:
            return False
        self.settled_tags.discard(tag)
        return True

    def _brpop_read(self, **options: Any) -> Any:
        self._is_reading = True
        try:
            read = super()._brpop_read(**options)
        finally:
            self._is_reading = False
            self._deliver_taken()
        return read

    def _deliver_taken(self) -> None:
        while self._taken:
            queue, raw = self._taken.popleft()
            message = json.loads(raw)
            self._entered.add(message["properties"]["delivery_tag"])
            self.connection._deliver(message, queue)

    def _room(self) -> int:
        room = self.qos.can_consume_max_estimate()
        return MORE_AT_ONCE if room is None else max(0, min(MORE_AT_ONCE, room - 1))


def install(client: redis.Redis, keys: Keys) -> Callable[[str], None]:
    """From now on every connection of this process to the broker has such channels.

    Args:
        client: decodes its replies.
        keys: of the installation, under which kombu's own lie.

    Returns:
        To be told, by any thread, the tag of a message that a settle script has removed from the broker.
    """
    WorkerChannel.taker = MessageTaker(client, keys)
    WorkerChannel.settled_tags = set()
    broker_channel.use(WorkerChannel)
    return WorkerChannel.settled_tags.add
