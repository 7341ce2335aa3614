"""Celery's `task-sent` events, gathered: Flower learns of jobs a few times a second, not with each one.

An event of its own is a second message for every job, in the client's way: a third of what publishing costs.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import Celery
from celery.events.event import Event
from celery.utils.time import utcoffset
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

FLUSH_SECONDS = 0.2

_logger = logging.getLogger(__name__)


class SentEvents:
    """Stands where Celery calls its event dispatcher when it sends a task; safe from any thread.

    Events tell watchers what happened and promise nothing: those that the broker does not take are dropped,
    as are those of the last fifth of a second of a process that is killed.
    """

    def __init__(self, app: Celery) -> None:
        self._app: Any = app  # celery is untyped
        self._dispatcher: Any = self._app.events.Dispatcher(enabled=False)
        self._lock = threading.Lock()
        self._waiting: list[Any] = []

    def publish(self, kind: str, fields: dict[str, Any], producer: object, **options: object) -> None:
        """Celery's call; what it would send with `producer` goes with the others soon."""
        dispatcher = self._dispatcher
        event = Event(
            kind,
            hostname=dispatcher.hostname,
            utcoffset=utcoffset(),
            pid=dispatcher.pid,
            clock=dispatcher.clock.forward(),
            **fields,
        )
        with self._lock:
            self._waiting.append(event)
            is_first = len(self._waiting) == 1
        if is_first:
            timer = threading.Timer(FLUSH_SECONDS, self.flush)
            timer.daemon = True
            timer.start()

    def flush(self) -> None:
        """Send what waits, as the list that Celery's own dispatchers send."""
        with self._lock:
            events, self._waiting = self._waiting, []
        if not events:
            return
        exchange = self._dispatcher.exchange
        try:
            with self._app.producer_or_acquire() as producer:
                producer.publish(
                    events,
                    routing_key="task.multi",
                    exchange=exchange.name,
                    declare=[exchange],
                    serializer=self._dispatcher.serializer,
                    headers=self._dispatcher.headers,
                    delivery_mode=self._dispatcher.delivery_mode,
                )
        except (OperationalError, RedisError, OSError, TimeoutError) as error:
            _logger.debug("%d events about sent tasks were dropped: %s", len(events), type(error).__name__)
