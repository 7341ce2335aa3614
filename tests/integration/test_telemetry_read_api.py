from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from telemetry.errors import SpanFormatError
from telemetry.receiver import Receiver
from telemetry.record_json import from_json, to_json

FIRST, SECOND, POLL = bytes([1] * 16), bytes([2] * 16), bytes([3] * 16)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(max_bytes=200_000) as started:
        yield started


def span_of(number: int, trace_id: bytes, kind: Any = Span.SPAN_KIND_INTERNAL, **attributes: str) -> Span:
    pairs = [
        KeyValue(key=key.replace("_", "."), value=AnyValue(string_value=value))
        for key, value in attributes.items()
    ]
    pairs.append(
        KeyValue(key="list", value=AnyValue(array_value=ArrayValue(values=[AnyValue(int_value=2**62)])))
    )
    return Span(
        trace_id=trace_id,
        span_id=number.to_bytes(8, "big"),
        name=f"span {number}",
        kind=kind,
        attributes=pairs,
        events=[Span.Event(name="e", time_unix_nano=6, attributes=pairs)],
        links=[Span.Link(trace_id=SECOND, span_id=b"\x01" * 8, attributes=pairs)],
    )


def send(receiver: Receiver, *spans: Span) -> None:
    request = ExportTraceServiceRequest(resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=spans)])])
    headers = {"Content-Type": "application/x-protobuf"}
    httpx.post(
        receiver.http_endpoint, content=request.SerializeToString(), headers=headers
    ).raise_for_status()


def read(receiver: Receiver, path: str) -> list[str]:
    answer = httpx.get(f"{receiver.read_url}{path}").json()
    return [from_json(span).name for span in answer["spans"]]


def test_read_api_gives_back_the_spans_that_were_received(receiver: Receiver) -> None:
    send(receiver, span_of(1, FIRST), span_of(2, SECOND))

    answer = httpx.get(f"{receiver.read_url}/traces/{FIRST.hex().upper()}").json()

    assert [from_json(span) for span in answer["spans"]] == receiver.trace(FIRST.hex())
    assert answer["num_evicted"] == 0


def test_read_api_finds_all_traces_of_a_job_and_leaves_those_that_only_poll_it(receiver: Receiver) -> None:
    send(
        receiver,
        span_of(1, FIRST, Span.SPAN_KIND_PRODUCER, job_id="job_1"),
        span_of(2, SECOND, Span.SPAN_KIND_CONSUMER, job_id="job_1"),
        span_of(3, SECOND),
        span_of(4, POLL, Span.SPAN_KIND_SERVER, job_id="job_1"),
    )

    assert read(receiver, "/jobs/job_1/trace") == ["span 1", "span 2", "span 3"]
    assert read(receiver, "/jobs/job_2/trace") == []
    assert [span.name for span in receiver.of_job("job_1")] == ["span 1", "span 2", "span 3"]


def test_page_of_a_trace_shows_the_other_traces_of_its_job(receiver: Receiver) -> None:
    send(
        receiver,
        span_of(1, FIRST, Span.SPAN_KIND_PRODUCER, job_id="job_1"),
        span_of(2, SECOND, Span.SPAN_KIND_INTERNAL, job_id="job_1", job_attempt="1"),
        span_of(3, POLL, Span.SPAN_KIND_SERVER, job_id="job_1"),
    )

    page = httpx.get(f"{receiver.read_url}/trace/{FIRST.hex().upper()}")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "span 1" in page.text
    assert "span 2" in page.text
    assert "span 3" not in page.text
    assert httpx.get(f"{receiver.read_url}/trace/{'a' * 32}").status_code == 404


@pytest.mark.parametrize("path", ["/", "/traces", "/traces/a/b", "/jobs/a", "/jobs/a/trace/b", "/v1/traces"])
def test_read_api_answers_404_when_nothing_is_served_there(receiver: Receiver, path: str) -> None:
    assert httpx.get(f"{receiver.read_url}{path}").status_code == 404


@pytest.mark.parametrize(("host", "status"), [("evil.example:80", 403), ("[", 400), ("localhost", 200)])
def test_read_api_is_closed_to_pages_of_other_names(receiver: Receiver, host: str, status: int) -> None:
    answer = httpx.get(f"{receiver.read_url}/traces/{FIRST.hex()}", headers={"Host": host})

    assert answer.status_code == status


def test_receiver_forgets_the_oldest_when_the_spans_are_too_large(receiver: Receiver) -> None:
    send(receiver, *(span_of(number, FIRST, text="x" * 20_000) for number in range(10)))

    kept = [span.name for span in receiver.spans()]
    assert 1 <= len(kept) < 10
    assert kept == [f"span {number}" for number in range(10)][-len(kept) :]
    assert receiver.num_evicted == 10 - len(kept)


def test_span_that_is_none_is_refused_in_words(receiver: Receiver) -> None:
    send(receiver, span_of(1, FIRST))
    good = to_json(receiver.spans()[0])
    lacking = {key: value for key, value in good.items() if key != "start_ns"}

    for bad in (
        [],
        None,
        {},
        lacking,
        {**good, "more": 1},
        {**good, "events": [1]},
        {**good, "attributes": 3},
    ):
        with pytest.raises(SpanFormatError):
            from_json(bad)
