from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from jobs.clock import SystemClock
from jobs.errors import StoreUnavailable
from jobs.message import MessageMaker, QueueMessage
from jobs.model import new_job_id
from jobs.queue import create_celery
from jobs.settings import JobsSettings
from telemetry import names
from telemetry.celery import _CorrectedInstrumentor, sending
from telemetry.spans import extract

QUEUE = "model.batch"


@pytest.fixture
def told() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = _CorrectedInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    yield exporter
    instrumentor.uninstrument()


@pytest.fixture
def maker() -> MessageMaker:
    """Of a broker that is not there: making a message asks nobody."""
    settings = JobsSettings(redis_url="redis://127.0.0.1:1/0", socket_timeout_seconds=0.01)
    return MessageMaker(create_celery(settings), SystemClock())


def only_span(told: InMemorySpanExporter) -> ReadableSpan:
    (span,) = told.get_finished_spans()
    return span


def carried_span_id(message: QueueMessage) -> int:
    headers = json.loads(message.payload)["headers"]
    return trace.get_current_span(extract(headers)).get_span_context().span_id


def test_send_span_ends_with_the_block_that_sends_the_message(
    told: InMemorySpanExporter, maker: MessageMaker
) -> None:
    with sending():
        message = maker.make(new_job_id(), QUEUE)
        assert not trace.get_current_span().get_span_context().is_valid
        assert told.get_finished_spans() == ()

    span = only_span(told)
    assert (span.name, span.kind, span.status.status_code) == (
        f"send {QUEUE}",
        SpanKind.PRODUCER,
        StatusCode.UNSET,
    )
    assert span.context is not None
    assert carried_span_id(message) == span.context.span_id


def test_nobody_hears_of_a_message_that_was_withdrawn(
    told: InMemorySpanExporter, maker: MessageMaker
) -> None:
    with sending() as sent:
        maker.make(new_job_id(), QUEUE)
        sent.withdraw()

    assert told.get_finished_spans() == ()


def test_send_span_tells_the_error_when_the_message_was_not_taken(
    told: InMemorySpanExporter, maker: MessageMaker
) -> None:
    def make_and_fail() -> None:
        with sending():
            maker.make(new_job_id(), QUEUE)
            raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        make_and_fail()

    span = only_span(told)
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})[names.ERROR_TYPE] == "store_unavailable"


def test_send_span_ends_at_once_when_no_block_sends_the_message(
    told: InMemorySpanExporter, maker: MessageMaker
) -> None:
    maker.make(new_job_id(), QUEUE)

    assert only_span(told).name == f"send {QUEUE}"
