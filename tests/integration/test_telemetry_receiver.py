from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from telemetry.errors import ReceiverError
from telemetry.receiver import Receiver

PROTOBUF = {"Content-Type": "application/x-protobuf"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(max_spans=3) as started:
        yield started


def request_of(*spans: Span) -> bytes:
    resource = Resource(attributes=[KeyValue(key="service.name", value=AnyValue(string_value="svc"))])
    scope_spans = ScopeSpans(spans=spans)
    return ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(resource=resource, scope_spans=[scope_spans])]
    ).SerializeToString()


def span_of(number: int) -> Span:
    return Span(trace_id=bytes(16), span_id=number.to_bytes(8, "big"), name=f"span {number}")


def post(
    receiver: Receiver, body: bytes, headers: dict[str, str] = PROTOBUF, path: str = "/v1/traces"
) -> int:
    url = f"http://{receiver.host}:{receiver.http_port}{path}"
    return httpx.post(url, content=body, headers=headers).status_code


def test_receiver_decodes_every_part_of_a_span(receiver: Receiver) -> None:
    values = [
        KeyValue(key="text", value=AnyValue(string_value="x")),
        KeyValue(key="flag", value=AnyValue(bool_value=False)),
        KeyValue(key="whole", value=AnyValue(int_value=-3)),
        KeyValue(key="real", value=AnyValue(double_value=0.5)),
        KeyValue(key="bytes", value=AnyValue(bytes_value=b"\x00")),
        KeyValue(key="empty", value=AnyValue()),
        KeyValue(key="list", value=AnyValue(array_value=ArrayValue(values=[AnyValue(int_value=1)]))),
        KeyValue(
            key="map",
            value=AnyValue(
                kvlist_value=KeyValueList(values=[KeyValue(key="a", value=AnyValue(string_value="b"))])
            ),
        ),
    ]
    span = Span(
        trace_id=bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736"),
        span_id=bytes.fromhex("00f067aa0ba902b7"),
        parent_span_id=bytes.fromhex("00f067aa0ba902b8"),
        name="send q",
        kind=Span.SPAN_KIND_PRODUCER,
        start_time_unix_nano=5,
        end_time_unix_nano=2_000_000_005,
        attributes=values,
        dropped_events_count=2,
        events=[Span.Event(name="e", time_unix_nano=6)],
        links=[Span.Link(trace_id=bytes(16), span_id=b"\x01" * 8, attributes=values[:1])],
        status=Status(code=Status.STATUS_CODE_ERROR, message="bad"),
    )
    assert post(receiver, request_of(span)) == 200

    [record] = receiver.trace("4bf92f3577b34da6a3ce929d0e0e4736")
    assert (record.span_id, record.parent_id) == ("00f067aa0ba902b7", "00f067aa0ba902b8")
    assert (record.name, record.kind, record.service) == ("send q", "PRODUCER", "svc")
    assert record.duration_seconds == 2.0
    assert dict(record.attributes) == {
        "text": "x",
        "flag": False,
        "whole": -3,
        "real": 0.5,
        "bytes": b"\x00",
        "empty": None,
        "list": (1,),
        "map": {"a": "b"},
    }
    assert [(event.name, event.at_ns) for event in record.events] == [("e", 6)]
    assert [(link.span_id, dict(link.attributes)) for link in record.links] == [("01" * 8, {"text": "x"})]
    assert (record.status, record.status_message, record.num_dropped) == ("ERROR", "bad", 2)


def test_receiver_keeps_the_newest_when_more_come_than_it_may_hold(receiver: Receiver) -> None:
    post(receiver, request_of(*(span_of(number) for number in range(1, 6))))

    assert [span.name for span in receiver.spans()] == ["span 3", "span 4", "span 5"]
    assert receiver.num_evicted == 2


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_receiver_unpacks_a_body_when_it_is_compressed(
    receiver: Receiver, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    assert post(receiver, pack(request_of(span_of(1))), PROTOBUF | {"Content-Encoding": encoding}) == 200
    assert len(receiver.spans()) == 1


@pytest.mark.parametrize(
    ("body", "headers", "path", "status"),
    [
        (b"\xff\xff\xff", PROTOBUF, "/v1/traces", 400),
        (b"{}", {"Content-Type": "application/json"}, "/v1/traces", 415),
        (b"", PROTOBUF, "/v1/metrics", 404),
        (b"no gzip", PROTOBUF | {"Content-Encoding": "gzip"}, "/v1/traces", 400),
        (b"", PROTOBUF | {"Content-Encoding": "br"}, "/v1/traces", 415),
        (gzip.compress(bytes(65 * 1024 * 1024)), PROTOBUF | {"Content-Encoding": "gzip"}, "/v1/traces", 413),
    ],
)
def test_receiver_refuses_and_lives_on_when_a_request_is_bad(
    receiver: Receiver, body: bytes, headers: dict[str, str], path: str, status: int
) -> None:
    assert post(receiver, body, headers, path) == status
    assert receiver.spans() == []
    assert post(receiver, request_of(span_of(1))) == 200


def test_receiver_wakes_a_waiter_when_the_span_it_waits_for_comes(receiver: Receiver) -> None:
    assert not receiver.wait_for(lambda spans: bool(spans), timeout_seconds=0.01)
    post(receiver, request_of(span_of(1)))

    assert receiver.wait_for(lambda spans: [span.name for span in spans] == ["span 1"], timeout_seconds=5)
    receiver.clear()
    assert receiver.spans() == []


def test_receiver_names_the_address_when_a_port_is_taken(receiver: Receiver) -> None:
    with pytest.raises(ReceiverError, match=str(receiver.grpc_port)):
        Receiver(grpc_port=receiver.grpc_port).start()
    with pytest.raises(ReceiverError, match=str(receiver.http_port)):
        Receiver(http_port=receiver.http_port).start()


def test_receiver_frees_its_ports_and_keeps_its_spans_when_stopped() -> None:
    receiver = Receiver()
    receiver.start()
    post(receiver, request_of(span_of(1)))
    receiver.stop()
    receiver.stop()

    assert len(receiver.spans()) == 1
    with Receiver(grpc_port=receiver.grpc_port, http_port=receiver.http_port) as second:
        assert second.spans() == []
