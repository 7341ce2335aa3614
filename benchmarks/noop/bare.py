"""`celery -A benchmarks.noop.bare worker`: Celery alone, with the features that ours has too.

Threads, late acknowledgement, prefetch 1, task events, the OpenTelemetry instrumentation as it is published;
the task does nothing and keeps nothing.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from celery import signals
from opentelemetry.instrumentation.celery import CeleryInstrumentor

from benchmarks.noop.spans import trace_as_the_sdk
from jobs.queue import create_celery
from jobs.settings import JobsSettings

QUEUE = "bare"

trace_as_the_sdk()
app = create_celery(JobsSettings(key_prefix="bare:"))
app.conf.update(
    worker_pool="threads",
    worker_concurrency=int(os.environ.get("BENCH_CONCURRENCY", "80")),
    worker_prefetch_multiplier=1,
    task_acks_late=True,
    task_default_queue=QUEUE,
    worker_send_task_events=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)


@app.task(name="bare.nothing", ignore_result=True)
def nothing(job_id: str) -> None:
    pass


@signals.worker_init.connect(weak=False)
def start(**_: Any) -> None:
    CeleryInstrumentor().instrument()
    for chatty in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
