"""A span as it came over the wire, in plain Python types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

Value = str | bool | int | float | bytes | tuple["Value", ...] | Mapping[str, "Value"] | None


@dataclass(frozen=True, slots=True)
class EventRecord:
    name: str
    at_ns: int
    attributes: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class LinkRecord:
    trace_id: str
    span_id: str
    attributes: Mapping[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRecord:
    """A span as it came over the wire; ids in lower-case hex, times in Unix nanoseconds.

    `kind` is SERVER, CLIENT, PRODUCER, CONSUMER, INTERNAL or UNSPECIFIED, `status` is UNSET, OK or ERROR.
    `num_dropped` counts attributes, events and links that the sender's limits cut off.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: str
    service: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Value] = field(default_factory=dict)
    events: tuple[EventRecord, ...] = ()
    links: tuple[LinkRecord, ...] = ()
    status: str = "UNSET"
    status_message: str = ""
    scope: str = ""
    num_dropped: int = 0

    @property
    def duration_seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


def decode(request: ExportTraceServiceRequest) -> Iterator[SpanRecord]:
    for resource_spans in request.resource_spans:
        service = str(_attributes(resource_spans.resource.attributes).get("service.name", ""))
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield _decode_span(span, service, scope_spans.scope.name)


def _decode_span(span: trace_pb2.Span, service: str, scope: str) -> SpanRecord:
    return SpanRecord(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        service=service,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(EventRecord(e.name, e.time_unix_nano, _attributes(e.attributes)) for e in span.events),
        links=tuple(
            LinkRecord(link.trace_id.hex(), link.span_id.hex(), _attributes(link.attributes))
            for link in span.links
        ),
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
        scope=scope,
        num_dropped=span.dropped_attributes_count + span.dropped_events_count + span.dropped_links_count,
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "bytes_value":
            return value.bytes_value
        case "array_value":
            return tuple(_value(item) for item in value.array_value.values)
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
    return None


def size_bytes(span: SpanRecord) -> int:
    """About what the span costs in memory; its texts are counted, the rest is taken as a flat sum."""
    bags = (span.attributes, *(e.attributes for e in span.events), *(k.attributes for k in span.links))
    return 1024 + len(span.name) + len(span.status_message) + sum(_sizes(bags))


def _sizes(values: Iterable[Value]) -> Iterable[int]:
    for value in values:
        match value:
            case str() | bytes():
                yield 64 + len(value) * (4 if isinstance(value, str) and not value.isascii() else 1)
            case tuple():
                yield 64 + sum(_sizes(value))
            case Mapping():
                yield 64 + sum(_sizes((*value.keys(), *value.values())))
            case _:
                yield 32
