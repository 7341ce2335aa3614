"""A bootstep that keeps the broker from redelivering messages that this worker still holds.

Kombu scores a message with its delivery time and never again, so a short visibility timeout would run
every long job twice. This step scores the held messages anew while the engine is healthy; the
visibility timeout then means "seconds since the worker was last alive" and can be short.

When the connection breaks, kombu puts all held messages back although the jobs still run here. This
step moves them to the new channel instead, to be acknowledged there. It leans on kombu internals
(`message.channel`, `qos.append`, `qos.restore_by_tag`, `unacked_index_key`), hence the pin on 5.7.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery import bootsteps, signals
from celery.worker import state
from kombu.transport.redis import Channel


def message_lease(*, renew_seconds: float, is_healthy: Callable[[], bool]) -> type[Any]:
    """A consumer bootstep class for `app.steps["consumer"]`; one a process."""
    held: dict[str, Any] = {}
    Channel.do_restore = False

    def receive(request: Any = None, **_: Any) -> None:
        held[request.message.delivery_tag] = request

    def give_back_on_shutdown(**_: Any) -> None:
        Channel.do_restore = True

    signals.task_received.connect(receive, weak=False)
    signals.worker_shutting_down.connect(give_back_on_shutdown, weak=False)

    class MessageLease(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            """Runs at the first connection and after each reconnect."""
            channel = consumer.task_consumer.channel
            for tag, request in list(held.items()):
                message = request.message
                if message.acknowledged:
                    held.pop(tag, None)
                    continue
                message.channel = channel
                if request.id in state.requests or request.time_start:
                    channel.qos.append(message, tag)
                else:  # Celery dropped it before it began
                    held.pop(tag, None)
                    channel.qos.restore_by_tag(tag)

        def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
            hub.call_repeatedly(renew_seconds, self.renew, consumer)

        def renew(self, consumer: Any) -> None:
            for tag, request in list(held.items()):
                if request.message.acknowledged:
                    held.pop(tag, None)
            if not held or not is_healthy() or not consumer.task_consumer:
                return
            channel = consumer.task_consumer.channel
            with channel.conn_or_acquire() as client:
                client.zadd(channel.unacked_index_key, dict.fromkeys(held, time.time()), xx=True)

    return MessageLease
