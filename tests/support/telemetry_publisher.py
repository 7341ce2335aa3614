"""Publishes a message for each thing that can happen to one; prints the trace id of each as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

from kombu.exceptions import OperationalError
from opentelemetry import baggage, context, trace
from opentelemetry.context import Context

from telemetry.celery import instrument_celery, publishing_again
from telemetry.http import current_trace_id, current_traceparent
from telemetry.setup import configure
from telemetry.spans import extract
from tests.support import telemetry_celery_app as tasks


def plain() -> None:
    token = context.attach(baggage.set_baggage("tenant", "acme"))
    tasks.body.apply_async(task_id="plain")
    context.detach(token)


def retry() -> None:
    tasks.flaky.apply_async(task_id="retry")


def failure() -> None:
    tasks.fail.apply_async(task_id="failure")


def rejected() -> None:
    tasks.refuse.apply_async(task_id="rejected")


def by_name() -> None:
    tasks.app.send_task("elsewhere.unknown", task_id="by_name", queue="nobody")


def again() -> None:
    """As a reconciler does it: from a thread without a span, for a job whose record holds a context."""
    tasks.body.apply_async(task_id="again")
    stored = extract({"traceparent": current_traceparent()})
    token = context.attach(Context())
    with publishing_again(stored):
        tasks.body.apply_async(task_id="again-2")
    context.detach(token)


def twice() -> None:
    """One message delivered twice at the same time: two tries of the same id."""
    tasks.meet.apply_async(("first",), task_id="twice")
    tasks.meet.apply_async(("second",), task_id="twice")


def dead_broker() -> None:
    before = current_traceparent()
    try:
        with tasks.app.connection_for_write("redis://127.0.0.1:1/0") as connection:
            tasks.body.apply_async(task_id="dead_broker", connection=connection, retry=False)
    except OperationalError:
        assert current_traceparent() == before, "the span of the failed publish leaked"
        with trace.get_tracer("test").start_as_current_span("afterwards"):
            return
    raise AssertionError("a closed port took the message")


def main() -> None:
    telemetry = configure("test-publisher")
    instrument_celery()
    scenarios: list[Callable[[], None]] = [
        plain,
        retry,
        failure,
        rejected,
        by_name,
        again,
        twice,
        dead_broker,
    ]
    trace_ids = {}
    for scenario in scenarios:
        with trace.get_tracer("test").start_as_current_span(scenario.__name__):
            trace_ids[scenario.__name__] = current_trace_id()
            scenario()
    telemetry.shutdown()
    print(json.dumps(trace_ids))


if __name__ == "__main__":
    main()
