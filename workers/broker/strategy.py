"""How the consumer takes a job's message in: Celery's way, but for the acknowledgement.

Celery acknowledges by a call that its event loop makes in its next turn, so that any thread may ask for it.
The pool tells it of ended tasks in that loop's own thread (`workers.pool`), where the next turn may be a
fifth of a second away: there the message is acknowledged at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from celery.worker.strategy import default


def take_in(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """A task's `Strategy`: called in the consumer's thread, as is what it returns, with each message."""
    handle: Callable[..., Any] = default(task, app, consumer)
    own_thread = threading.get_ident()

    def handle_message(message: Any, body: Any, ack: Any, *others: Any) -> Any:
        def acknowledge(logger: Any, errors: Any) -> None:
            # After a reconnect Celery listens for it too: that is how it opens its window again.
            if threading.get_ident() != own_thread or any(ack.listeners) or not _acknowledge(message, errors):
                ack(logger, errors)

        return handle(message, body, acknowledge, *others)

    return handle_message


def _acknowledge(message: Any, errors: tuple[type[Exception], ...]) -> bool:
    """False when the connection is lost: the event loop's own try shows that to Celery, which mends it."""
    try:
        message.ack()
    except errors:
        return False
    return True
