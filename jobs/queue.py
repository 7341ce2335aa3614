"""The Celery application, as both sides set it up, and the one task that crosses it.

The message carries the job's id and trace headers, nothing else: prompts and results stay in the job
store. There is no result backend; the store's settle script decides and tells the waiters.
"""

from __future__ import annotations

from typing import Any, Protocol

from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError

from jobs import broker_channel, redis_url
from jobs.errors import StoreUnavailable
from jobs.model import JobId
from jobs.sent_events import SentEvents
from jobs.settings import JobsSettings

GENERATE = "throughline.generate"
"""Name of the task; its only argument is the job id."""

ENQUEUED_AT_HEADER = "throughline_enqueued_at_ns"
"""Message header: Unix nanoseconds at publishing, so that the worker can draw the queue wait."""

RESTORE_SWEEP_SECONDS = 2
"""How often live workers look for messages whose holder went silent."""


def create_celery(settings: JobsSettings) -> Celery:
    """An app that can publish and, given queues and a task body, consume.

    Every process on one Redis must use the same visibility timeout (the shortest wins), hence one function.
    """
    url = settings.redis_url.get_secret_value()
    app = Celery("throughline", broker=redis_url.broker_url(url), backend=None)
    app.conf.update(
        broker_use_ssl=redis_url.broker_tls(url) or False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=transport_options(settings),
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_send_sent_event=True,
        task_create_missing_queues=True,
        worker_hijack_root_logger=False,
    )
    return app


def transport_options(settings: JobsSettings) -> dict[str, Any]:
    return {
        "visibility_timeout": settings.visibility_timeout_seconds,
        "unacked_restore_interval": RESTORE_SWEEP_SECONDS,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 5,
        "socket_timeout": settings.socket_timeout_seconds,
        "socket_connect_timeout": min(3.0, settings.socket_timeout_seconds),
        "socket_keepalive": True,
        # kombu retries inside the transport too; a publisher that must answer its client cannot wait for that
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0.1,
        "interval_max": 0.2,
        "global_keyprefix": f"{settings.key_prefix}celery:",
        **redis_url.broker_options(settings.redis_url.get_secret_value()),
    }


def declare_queue(name: str) -> Queue:
    return Queue(name, routing_key=name)  # type: ignore[no-untyped-call]  # kombu's


class Publisher(Protocol):
    """Puts the message of a stored job into the broker again; blocking, to be called from a thread."""

    def publish(self, id: JobId, queue: str, *, enqueued_at_ns: int) -> None:
        """Returns once the broker holds the message.

        Raises:
            StoreUnavailable: it may or may not have arrived; the ledger knows the job either way.
        """
        ...


class CeleryPublisher:
    """Publishes through a declared task, so that the instrumentation's producer span has its real length.

    In a worker the app has the task already; elsewhere it is declared, and its body never run.
    """

    def __init__(self, app: Celery) -> None:
        broker_channel.share_clients()
        self._task = declare_generate(app)
        self._events = SentEvents(app)

    def publish(self, id: JobId, queue: str, *, enqueued_at_ns: int) -> None:
        try:
            self._task.apply_async(
                **message_options(id, queue, enqueued_at_ns=enqueued_at_ns),
                event_dispatcher=self._events,
                retry=True,
                retry_policy={"max_retries": 1, "interval_start": 0.1, "interval_max": 0.2},
            )
        except (OperationalError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"the broker did not take the message: {type(error).__name__}") from error


def message_options(id: JobId, queue: str, *, enqueued_at_ns: int) -> dict[str, Any]:
    """What a job's message consists of, as keyword arguments of `apply_async`."""
    return {
        "args": (id,),
        "task_id": id,
        "queue": queue,
        "headers": {ENQUEUED_AT_HEADER: enqueued_at_ns},
        "argsrepr": f"('{id}',)",  # celery would find out by itself, for any type and at a price
        "kwargsrepr": "{}",
    }


def declare_generate(app: Celery) -> Any:
    """The task as its publisher sees it, a name and a signature, unless the app has it: a worker's has."""
    if GENERATE in app.tasks:
        return app.tasks[GENERATE]

    @app.task(name=GENERATE, ignore_result=True)  # type: ignore[untyped-decorator]  # celery's
    def generate(job_id: str) -> None:
        raise NotImplementedError(f"{GENERATE} runs in workers; this process only publishes it")

    return generate
