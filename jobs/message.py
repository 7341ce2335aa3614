"""The message of a job as Celery and kombu make it, for a store that keeps it with the job in one act.

    once a queue     create_task_message ──▶ kombu ──▶ a channel that keeps what it should send ──▶ a form
    once a message   the form ──▶ before_task_publish (the send span, whose context goes into the headers)
                         └──▶ QueueMessage ──▶ create.lua

Messages of one queue differ in the job's id, their stamps and what the signals' receivers put into them. To
make each by the whole of Celery and kombu took a sixth of the API's time for a completion. The reference is
`jobs.queue.CeleryPublisher`, and a test holds the two equal. No part of this waits for anything, so an event
loop can call it.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.signals import after_task_publish, before_task_publish
from kombu.connection import Connection
from kombu.transport import virtual
from kombu.utils.json import dumps

from jobs import broker_channel
from jobs.clock import Clock
from jobs.model import JobId
from jobs.queue import ENQUEUED_AT_HEADER, GENERATE, message_options
from jobs.sent_events import SentEvents

_Channel: Any = virtual.Channel  # kombu is untyped
_Transport: Any = virtual.Transport
_Connection: Any = Connection
_dumps: Any = dumps

_ANY_ID = JobId("job_of_the_form")


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
        self._app: Any = app  # celery is untyped
        self._clock = clock
        self._events = SentEvents(app)
        self._forms: dict[str, _Form] = {}

    def make(self, id: JobId, queue: str) -> QueueMessage:
        """The message, whose queue wait begins now. Whoever has stored it calls `tell_sent`."""
        form = self._forms.get(queue)
        if form is None:
            form = self._forms[queue] = _Form(self._app, queue)
        return form.message(id, enqueued_at_ns=int(self._clock.now() * 1e9))

    def tell_sent(self, message: QueueMessage) -> None:
        """Those who watch Celery's events hear of the message."""
        self._events.publish(*message.sent_event, None)


class _Form:
    """What the messages of one queue have in common, and where the job's id stands in them."""

    def __init__(self, app: Any, queue: str) -> None:
        options = message_options(_ANY_ID, queue, enqueued_at_ns=0)
        shown = {name: options[name] for name in ("argsrepr", "kwargsrepr")}
        headers, properties, body, event = app.amqp.create_task_message(
            _ANY_ID,
            GENERATE,
            options["args"],
            {},
            **shown,
            reply_to=app.thread_oid,
            create_sent_event=True,
            ignore_result=True,
        )
        properties |= shown  # Celery passes on what it was called with
        self._queue = queue
        self._headers = _Fields({**headers, **options["headers"]})
        self._properties = _Fields(properties)
        self._event = _Fields({**event, "queue": queue, "exchange": "", "routing_key": queue})
        self._embedded = body[2]
        self._retry_policy = dict(app.conf.task_publish_retry_policy)
        self._message = self._published(app, body, properties)
        self._body = b64decode(self._message["body"]).decode().split(_ANY_ID)

    def message(self, id: JobId, *, enqueued_at_ns: int) -> QueueMessage:
        headers, properties = self._headers.of(id), self._properties.of(id)
        headers[ENQUEUED_AT_HEADER] = enqueued_at_ns
        about: dict[str, Any] = {"sender": GENERATE, "body": ((id,), {}, self._embedded), "headers": headers}
        where = {"exchange": "", "routing_key": self._queue}
        before_task_publish.send(
            **about, **where, declare=[], properties=properties, retry_policy=self._retry_policy
        )
        payload = self._message | {
            "body": b64encode(id.join(self._body).encode()).decode(),
            "headers": headers,
            "properties": self._message["properties"] | properties | {"delivery_tag": str(uuid4())},
        }
        after_task_publish.send(**about, **where)
        return QueueMessage(_dumps(payload), ("task-sent", self._event.of(id)))

    def _published(self, app: Any, body: object, properties: Mapping[str, Any]) -> dict[str, Any]:
        """The whole message as kombu's channel would push it, its headers left out."""
        channel = _Connection(transport=_KeepingTransport).channel()
        app.amqp.Producer(channel).publish(
            body,
            exchange="",
            routing_key=self._queue,
            serializer=app.conf.task_serializer,
            compression=app.conf.task_compression,
            delivery_mode=app.conf.task_default_delivery_mode,
            retry=False,
            headers={},
            **properties,
        )
        kept: dict[str, Any] = json.loads(channel.kept.pop())
        return kept


class _Fields:
    """Some of whose texts hold the job's id."""

    def __init__(self, form: Mapping[str, Any]) -> None:
        self._fields = form
        self._around_id = {
            name: value.split(_ANY_ID)
            for name, value in form.items()
            if isinstance(value, str) and _ANY_ID in value
        }

    def of(self, id: JobId) -> dict[str, Any]:
        fields = dict(self._fields)
        for name, parts in self._around_id.items():
            fields[name] = id.join(parts)
        return fields


class _KeepingChannel(_Channel):  # type: ignore[misc]  # as above
    """kombu's own layout of a message, which is that of its Redis channel too; sends nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[str] = []

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        self.kept.append(_dumps(message))


class _KeepingTransport(_Transport):  # type: ignore[misc]  # as above
    Channel = _KeepingChannel
