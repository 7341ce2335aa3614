"""Keeps the broker from redelivering messages that this worker still holds.

Kombu scores a message with its delivery time and never again, so a short visibility timeout would run
every long job twice. Here the held messages are known by their delivery tags, and the worker's keeper thread
scores them anew while the engine is healthy (`jobs.ledger.Ledger.keep_messages`); the visibility timeout
then means "seconds since the worker was last alive" and can be short. Not by the event loop's timer: the loop
stands still while a worker shuts down.

When the connection breaks, kombu puts all held messages back although the jobs still run here. The
bootstep moves them to the new channel instead, to be acknowledged there. It leans on kombu internals
(`message.channel`, `qos.append`, `qos.restore_by_tag`), hence the pin on 5.7.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps, signals
from celery.worker import state
from kombu.transport.redis import Channel

from workers.broker.event_pace import EventPace


class HeldMessages:
    """The messages that Celery received and has not acknowledged. One a process."""

    def __init__(self) -> None:
        self._requests: dict[str, Any] = {}

    def install(self, app: Any) -> None:
        """Listen to Celery's signals and add the carry-over to its consumer."""
        Channel.do_restore = False
        signals.task_received.connect(self._receive, weak=False)
        signals.worker_shutting_down.connect(self._give_back_on_shutdown, weak=False)
        app.steps["consumer"].add(_carry_over_step(self))
        app.steps["consumer"].add(EventPace)

    def tags(self) -> list[str]:
        """What to keep. An acknowledgement that was lost must be made again, after a redelivery: not kept."""
        self._forget_acknowledged()
        return [tag for tag, request in list(self._requests.items()) if not request.acknowledged]

    def carry_over(self, channel: Any) -> None:
        """Runs at the first connection and after each reconnect."""
        self._forget_acknowledged()
        for tag, request in list(self._requests.items()):
            request.message.channel = channel
            if request.acknowledged:  # under way: the event loop stood still with the connection
                self._requests.pop(tag, None)
                channel.qos.append(request.message, tag)
            elif request.id in state.requests or request.time_start:
                channel.qos.append(request.message, tag)
            else:  # Celery dropped it before it began
                self._requests.pop(tag, None)
                channel.qos.restore_by_tag(tag)

    def _forget_acknowledged(self) -> None:
        for tag, request in list(self._requests.items()):
            if request.message.acknowledged:
                self._requests.pop(tag, None)

    def _receive(self, request: Any = None, **_: Any) -> None:
        self._requests[request.message.delivery_tag] = request

    @staticmethod
    def _give_back_on_shutdown(**_: Any) -> None:
        Channel.do_restore = True


def _carry_over_step(held: HeldMessages) -> type[Any]:
    class CarryOver(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            held.carry_over(consumer.task_consumer.channel)

    return CarryOver
