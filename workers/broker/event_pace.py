"""Task events for Flower, sent a few times a second instead of with every turn of the event loop."""

from __future__ import annotations

from typing import Any

from celery import bootsteps

from jobs.sent_events import FLUSH_SECONDS

MAX_BUFFERED = 500
"""Beyond it they are sent at once."""


class EventPace(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """A message about many tasks costs hardly more than one about one: a quarter of a busy worker's time."""

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        self.stop(consumer)
        dispatcher = consumer.event_dispatcher
        if dispatcher is None or not consumer.hub:
            return
        dispatcher.on_send_buffered = None
        dispatcher.buffer_limit = MAX_BUFFERED
        self._timer = consumer.timer.call_repeatedly(FLUSH_SECONDS, dispatcher.flush)

    def stop(self, consumer: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
