"""Spans in OTLP's wire form, for a third of what the SDK's encoder takes.

The SDK makes protobuf messages of each attribute, and for each span hashes its resource by way of JSON: half
of what a job's trace costs, under the interpreter's lock. Here the plain parts of a span are written as
bytes, those of a recurring attribute once, and protobuf reads them back into the message that the SDK's
exporter sends. What is rare goes through the SDK: resources and scopes, once a batch, and whole spans with
events, a status, a trace state, or anything else that is not plain. A test holds the outcome equal to the
SDK's.

The fields are those of opentelemetry-proto's trace/v1/trace.proto and common/v1/common.proto. On the wire
(protobuf.dev, "Encoding") a tag stands before each value, and a length before strings, bytes and messages.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode
from opentelemetry.util.types import Attributes

_NUM_KEPT: Final = 4096
_MAX_KEPT_CHARACTERS: Final = 64
"""Of an attribute's value: ids, models and states are kept, a captured prompt is not."""

_INT64 = range(-(2**63), 2**63)
_KINDS: Mapping[SpanKind, bytes] = {
    SpanKind.INTERNAL: b"\x30\x01",
    SpanKind.SERVER: b"\x30\x02",
    SpanKind.CLIENT: b"\x30\x03",
    SpanKind.PRODUCER: b"\x30\x04",
    SpanKind.CONSUMER: b"\x30\x05",
}
_NO_STATUS = b"\x7a\x00"
# By whether the parent, or a link's target, is of another process. Fixed 32 bits: "it is known", and "it is".
_SPAN_FLAGS = {False: b"\x85\x01\x00\x01\x00\x00", True: b"\x85\x01\x00\x03\x00\x00"}
_LINK_FLAGS = {False: b"\x35\x00\x01\x00\x00", True: b"\x35\x00\x03\x00\x00"}
_times = struct.Struct("<BQBQ").pack
_double = struct.Struct("<Bd").pack


class _Rare(Exception):
    """Something that is left to the SDK's encoder."""


def encode(spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
    """Equal to the SDK's `encode_spans(spans)`, also in what it raises, or logs and leaves out."""
    groups: dict[tuple[int, int], list[ReadableSpan]] = {}
    for span in spans:
        groups.setdefault((id(span.resource), id(span.instrumentation_scope)), []).append(span)
    # The SDK sorts one span of each group into resources and scopes; the group then takes its place.
    request = encode_spans([group[0] for group in groups.values()])
    by_first = {_ids(group[0].context): group for group in groups.values()}
    for of_resource in request.resource_spans:
        for of_scope in of_resource.scope_spans:
            own = [by_first[first.trace_id + first.span_id] for first in of_scope.spans]
            del of_scope.spans[:]
            of_scope.MergeFromString(b"".join([_of_scope(span) for group in own for span in group]))
    return request


def _ids(context: SpanContext) -> bytes:
    return context.trace_id.to_bytes(16, "big") + context.span_id.to_bytes(8, "big")


def _of_scope(span: ReadableSpan) -> bytes:
    """As one more of ScopeSpans' `spans`."""
    try:
        body = _span(span)
    except (_Rare, UnicodeEncodeError, struct.error):
        body = encode_spans([span]).resource_spans[0].scope_spans[0].spans[0].SerializeToString()
    return b"\x12" + _sized(body)


def _span(span: ReadableSpan) -> bytes:
    context, parent, links = span.context, span.parent, span.links
    if not _is_plain(span) or context.trace_state:
        raise _Rare
    return b"".join(
        (
            b"\x0a\x10",
            context.trace_id.to_bytes(16, "big"),
            b"\x12\x08",
            context.span_id.to_bytes(8, "big"),
            b"\x22\x08" + parent.span_id.to_bytes(8, "big") if parent else b"",
            _name(span.name),
            _KINDS[span.kind],
            _times(0x39, span.start_time, 0x41, span.end_time),
            _attributes(b"\x4a", span.attributes),
            b"".join([_link(link) for link in links]) if links else b"",
            _NO_STATUS,
            _SPAN_FLAGS[parent is not None and parent.is_remote],
        )
    )


def _is_plain(span: ReadableSpan) -> bool:
    status = span.status
    return not (
        status.status_code is not StatusCode.UNSET
        or status.description
        or span.events
        or span.dropped_attributes
        or span.dropped_events
        or span.dropped_links
        or span.start_time == 0  # which the wire leaves out
        or span.end_time == 0
    )


def _link(link: Link) -> bytes:
    if link.dropped_attributes:
        raise _Rare
    context = link.context
    parts = (
        b"\x0a\x10",
        context.trace_id.to_bytes(16, "big"),
        b"\x12\x08",
        context.span_id.to_bytes(8, "big"),
        _attributes(b"\x22", link.attributes),
        _LINK_FLAGS[context.is_remote],
    )
    return b"\x6a" + _sized(b"".join(parts))


def _attributes(tag: bytes, attributes: Attributes) -> bytes:
    if not attributes:
        return b""
    # The SDK's mapping walks its items in Python, its copy is a plain dict.
    plain = attributes.copy() if isinstance(attributes, MappingProxyType) else attributes
    return b"".join([tag + _attribute(key, value) for key, value in plain.items()])


def _attribute(key: str, value: object) -> bytes:
    # No match statement: its class patterns take as long as the rest.
    if isinstance(value, str):
        is_kept = len(value) <= _MAX_KEPT_CHARACTERS
        return _recurring(key, value) if is_kept else _key_value(key, _scalar(value))
    if isinstance(value, int):
        return _recurring(key, value)
    if isinstance(value, float):  # not kept: zero and minus zero would share a place
        return _key_value(key, _double(0x21, value))
    if isinstance(value, tuple):
        return _key_value(key, _array(value))
    raise _Rare


@functools.lru_cache(_NUM_KEPT, typed=True)
def _recurring(key: str, value: str | int) -> bytes:
    return _key_value(key, _scalar(value))


def _key_value(key: str, any_value: bytes) -> bytes:
    """Of an `attributes` field, without its tag."""
    return _sized(b"\x0a" + _sized(key.encode()) + b"\x12" + _sized(any_value))


def _scalar(value: object) -> bytes:
    """An AnyValue."""
    match value:
        case str():
            return b"\x0a" + _sized(value.encode())
        case bool():
            return b"\x10\x01" if value else b"\x10\x00"
        case int() if value in _INT64:
            return b"\x18" + _varint(value % 2**64)
        case float():
            return _double(0x21, value)
    raise _Rare


def _array(values: tuple[object, ...]) -> bytes:
    return b"\x2a" + _sized(b"".join([b"\x0a" + _sized(_scalar(value)) for value in values]))


@functools.lru_cache(_NUM_KEPT)
def _name(name: str) -> bytes:
    return b"\x2a" + _sized(name.encode()) if name else b""


def _sized(body: bytes) -> bytes:
    return _varint(len(body)) + body


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have their top bit set."""
    if number < 0x80:
        return bytes((number,))
    return bytes((number & 0x7F | 0x80,)) + _varint(number >> 7)
