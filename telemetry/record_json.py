"""Spans as JSON, for whoever reads them out of the receiver.

One object a span, its keys the fields of `SpanRecord`; times stay Unix nanoseconds. Bytes become `0x…` text
and stay that when read back; everything else comes back as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from telemetry.errors import SpanFormatError
from telemetry.record import EventRecord, LinkRecord, SpanRecord, Value


def to_json(span: SpanRecord) -> dict[str, Any]:
    """Return what `json.dumps` takes."""
    plain = asdict(span)
    for holder in (plain, *plain["events"], *plain["links"]):
        holder["attributes"] = _to_plain(holder["attributes"])
    return plain


def from_json(content: object) -> SpanRecord:
    """Return the span that `to_json` made this of.

    Raises:
        SpanFormatError: It is no such object.
    """
    if not isinstance(content, Mapping):
        raise SpanFormatError(f"a span must be a JSON object, not {type(content).__name__}")
    try:
        return _span(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpanFormatError(f"no span of ours: {type(error).__name__} at {error}") from error


def _span(content: Mapping[str, Any]) -> SpanRecord:
    parts = {**content}
    parts["start_ns"], parts["end_ns"] = int(parts["start_ns"]), int(parts["end_ns"])
    parts["attributes"] = _attributes(parts["attributes"])
    parts["events"] = tuple(
        EventRecord(event["name"], int(event["at_ns"]), _attributes(event["attributes"]))
        for event in parts["events"]
    )
    parts["links"] = tuple(
        LinkRecord(link["trace_id"], link["span_id"], _attributes(link["attributes"]))
        for link in parts["links"]
    )
    return SpanRecord(**parts)


def _attributes(pairs: Mapping[str, Any]) -> dict[str, Value]:
    return {key: _from_plain(value) for key, value in pairs.items()}


def _to_plain(value: Value) -> Any:
    match value:
        case bytes():
            return f"0x{value.hex()}"
        case tuple():
            return [_to_plain(item) for item in value]
        case Mapping():
            return {key: _to_plain(inner) for key, inner in value.items()}
    return value


def _from_plain(value: Any) -> Value:
    match value:
        case list():
            return tuple(map(_from_plain, value))
        case dict():
            return _attributes(value)
    return value  # type: ignore[no-any-return]  # JSON leaves str, bool, int, float and None
