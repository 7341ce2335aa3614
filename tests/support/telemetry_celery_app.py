"""A Celery application with a task for each thing that can happen to a message; no engine, no job store.

Run by `celery -A tests.support.telemetry_celery_app worker`, imported by the process that publishes.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from celery import Celery, Task, signals
from celery.exceptions import Reject
from opentelemetry import baggage, trace

from telemetry.celery import instrument_celery
from telemetry.setup import configure

QUEUE = "models.tiny"
SECRET = "San Francisco is a"

app = Celery("telemetry-test", broker=os.environ["TEST_BROKER_URL"], backend=None)
app.conf.update(
    task_default_queue=QUEUE,
    task_ignore_result=True,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    # A publish to a closed port gives up at its second try.
    broker_transport_options={"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0},
)
both_here = threading.Barrier(2, timeout=30)


@signals.worker_init.connect(weak=False)
def _start(**_: Any) -> None:
    telemetry = configure("test-worker")
    instrument_celery(uses_links_only=telemetry.settings.uses_links_only)


@signals.worker_shutdown.connect(weak=False)
def _stop(**_: Any) -> None:
    configure("test-worker").shutdown()


@app.task(name="test.body")
def body() -> None:
    with trace.get_tracer("test").start_as_current_span("body") as span:
        span.set_attribute("tenant", str(baggage.get_baggage("tenant")))


@app.task(name="test.flaky", bind=True, max_retries=2)
def flaky(self: Task) -> None:
    if self.request.retries < 2:
        raise self.retry(countdown=0, exc=ConnectionError(SECRET))


@app.task(name="test.fail")
def fail() -> None:
    raise ValueError(SECRET)


@app.task(name="test.refuse", bind=True, acks_late=True)
def refuse(self: Task) -> None:
    """Given back to the broker once, as a worker does whose engine was lost."""
    if not self.request.delivery_info["redelivered"]:
        raise Reject("not now", requeue=True)


@app.task(name="test.meet")
def meet(name: str) -> None:
    """Two of these, of one message id, are inside at the same time."""
    both_here.wait()
    with trace.get_tracer("test").start_as_current_span(f"meet {name}"):
        both_here.wait()
