"""The message of a job as Celery and kombu make it, for a store that keeps it with the job in one act.

    make ──▶ send_task: signals (the send span opens, its context goes into the headers)
                │
                └──▶ kombu ──▶ a channel that keeps what it should send ──▶ QueueMessage ──▶ create.lua

No part of this waits for anything, so an event loop can call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu.connection import Connection
from kombu.transport import virtual
from kombu.utils.json import dumps

from jobs import broker_channel
from jobs.clock import Clock
from jobs.model import JobId
from jobs.queue import declare_generate, message_options
from jobs.sent_events import SentEvents

_Channel: Any = virtual.Channel  # kombu is untyped
_Transport: Any = virtual.Transport
_Connection: Any = Connection
_dumps: Any = dumps


@dataclass(frozen=True, slots=True)
class QueueMessage:
    payload: str
    """As kombu's Redis channel pushes it on the left of the queue's list; workers pop on the right."""
    sent_event: tuple[str, dict[str, Any]]
    """Celery's `task-sent`: kind and fields."""


class MessageMaker:
    """Makes messages in the loop or thread it belongs to; the app's own connections are not used for it."""

    def __init__(self, app: Celery, clock: Clock) -> None:
        broker_channel.share_clients()
        self._clock = clock
        self._task = declare_generate(app)
        self._events = SentEvents(app)
        self._channel = _Connection(transport=_KeepingTransport).channel()
        self._producer = app.amqp.Producer(self._channel)

    def make(self, id: JobId, queue: str) -> QueueMessage:
        """The message, whose queue wait begins now. Whoever has stored it calls `tell_sent`."""
        event = _KeptEvent()
        self._task.apply_async(
            **message_options(id, queue, enqueued_at_ns=int(self._clock.now() * 1e9)),
            producer=self._producer,
            declare=[],  # workers declare the queues that they consume
            event_dispatcher=event,
            retry=False,
        )
        return QueueMessage(self._channel.kept.pop(), event.kept.pop())

    def tell_sent(self, message: QueueMessage) -> None:
        """Those who watch Celery's events hear of the message."""
        self._events.publish(*message.sent_event, self._producer)


class _KeepingChannel(_Channel):  # type: ignore[misc]  # as above
    """kombu's own layout of a message, which is that of its Redis channel too; sends nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[str] = []

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        self.kept.append(_dumps(message))


class _KeepingTransport(_Transport):  # type: ignore[misc]  # as above
    Channel = _KeepingChannel


class _KeptEvent:
    """Stands where Celery calls its event dispatcher: the message is not sent yet."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, dict[str, Any]]] = []

    def publish(self, kind: str, fields: dict[str, Any], producer: object, **options: object) -> None:
        self.kept.append((kind, fields))
