from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from celery.signals import after_task_publish, before_task_publish
from kombu.connection import Connection
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from jobs.clock import SystemClock
from jobs.errors import StoreUnavailable
from jobs.message import MessageMaker, QueueMessage, _KeepingTransport
from jobs.model import JobId, new_job_id
from jobs.queue import GENERATE, create_celery, declare_generate, message_options
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


def test_what_receivers_of_celerys_signals_put_into_one_message_stays_in_that_one(
    maker: MessageMaker,
) -> None:
    heard: list[dict[str, object]] = []

    def mark(headers: dict[str, object], properties: dict[str, object], **about: object) -> None:
        headers["tenant"] = "a"
        properties["priority"] = 5
        heard.append(about)

    before_task_publish.connect(mark)
    try:
        marked = json.loads(maker.make(JobId("job_1"), QUEUE).payload)
    finally:
        before_task_publish.disconnect(mark)
    plain = json.loads(maker.make(JobId("job_2"), QUEUE).payload)

    assert (marked["headers"]["tenant"], marked["properties"]["priority"]) == ("a", 5)
    assert ("tenant" in plain["headers"], plain["properties"]["priority"]) == (False, 0)
    assert heard[0]["sender"] == GENERATE
    assert heard[0]["routing_key"] == QUEUE


def test_messages_of_one_queue_have_nothing_of_one_another(maker: MessageMaker) -> None:
    first, second = (maker.make(JobId(id), QUEUE) for id in ("job_first", "job_second"))

    for message, own, other in ((first, "job_first", "job_second"), (second, "job_second", "job_first")):
        document = json.loads(message.payload)
        text = message.payload + b64decode(document["body"]).decode() + json.dumps(message.sent_event)
        assert own in text
        assert other not in text
        assert "model.batch" in text
    tags = [json.loads(message.payload)["properties"]["delivery_tag"] for message in (first, second)]
    assert len(set(tags)) == 2


class Heard:
    """What a way of making messages tells: signals to receivers, events to a dispatcher."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def signal(self, signal: object, **fields: Any) -> None:
        known = {name: value for name, value in fields.get("properties", {}).items() if value is not None}
        self.told.append(json.loads(json.dumps({**fields, "properties": known})))

    def publish(self, kind: str, fields: dict[str, object], producer: object, **options: object) -> None:
        self.told.append([kind, fields])


def test_signals_and_event_are_those_of_a_message_that_celery_makes(maker: MessageMaker) -> None:
    theirs, ours = Heard(), Heard()
    app = maker._app
    clock_ns, id = 5, JobId("job_1")
    maker._clock = Mock(now=lambda: clock_ns / 1e9)
    for heard in (theirs, ours):
        for signal in (before_task_publish, after_task_publish):
            signal.connect(heard.signal)
        if heard is theirs:
            declare_generate(app).apply_async(
                **message_options(id, QUEUE, enqueued_at_ns=clock_ns),
                producer=app.amqp.Producer(Connection(transport=_KeepingTransport).channel()),
                declare=[],
                event_dispatcher=heard,
            )
        else:
            ours.told.append([*maker.make(id, QUEUE).sent_event])
        for signal in (before_task_publish, after_task_publish):
            signal.disconnect(heard.signal)

    assert len(theirs.told) == 3
    assert ours.told == theirs.told
