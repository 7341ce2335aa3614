"""A live span that weighs little for as long as nothing rare happens to it.

The SDK gives every span a lock, two bounded lists and a mapping that checks each entry, so that threads may
change it and limits may cut it. Nearly every span of a job gets a few plain attributes and ends. Here that
is a dict; with an event, another link, an error, an attribute that is not plain or one too many the span
turns into the SDK's, which then rules. A test holds both equal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
)
from opentelemetry.util.types import Attributes, AttributeValue

from telemetry.identity import Identities

_PLAIN = frozenset({str, int, float, bool})


@dataclass(frozen=True, slots=True)
class SpanHome:
    """What the spans of one tracer share. `processor` must not care when a span starts."""

    provider: TracerProvider
    scope: InstrumentationScope
    limits: SpanLimits
    processor: SpanProcessor


class LiveTracer(Tracer):
    """Starts light spans; what they cannot be is left to `stock`, the SDK's tracer of the same scope."""

    def __init__(self, stock: Tracer, identities: Identities, home: SpanHome) -> None:
        """The identities must follow parents."""
        self._stock = stock
        self._identities = identities
        self._home = home

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> Span:
        if not (record_exception and set_status_on_exception) or not self._is_light(attributes, links):
            return self._stock.start_span(
                name,
                context,
                kind,
                attributes,
                links,
                start_time,
                record_exception,
                set_status_on_exception,
            )
        own, parent = self._identities.new(context, name, kind, attributes)
        if not own.trace_flags.sampled:
            return NonRecordingSpan(own)
        started_at_ns = time.time_ns() if start_time is None else start_time
        return LiveSpan(
            self._home, name, kind, own, parent, started_at_ns, dict(attributes or {}), tuple(links or ())
        )

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        """The SDK's, whose context manager decorates coroutines too."""
        return self._stock.start_as_current_span(*args, **kwargs)

    def _is_light(self, attributes: Attributes, links: Sequence[Link] | None) -> bool:
        limits = self._home.limits
        if limits.max_span_attribute_length is not None or (links and not all(map(_is_plain_link, links))):
            return False
        return not attributes or (
            _fits(len(attributes), limits.max_span_attributes)
            and all(_is_plain(key, value) for key, value in attributes.items())
        )


@dataclass(slots=True, eq=False)
class LiveSpan(Span):
    """Sampled, and without limits on the length of its attributes."""

    home: SpanHome
    name: str
    kind: SpanKind
    context: SpanContext
    parent: SpanContext | None
    start_time: int
    _attributes: dict[str, AttributeValue]
    _links: tuple[Link, ...]
    _heavy: SdkSpan | None = None
    _is_over: bool = False

    @property
    def attributes(self) -> Attributes:
        return MappingProxyType(self._attributes) if self._heavy is None else self._heavy.attributes

    def get_span_context(self) -> SpanContext:
        return self.context

    def is_recording(self) -> bool:
        return not self._is_over if self._heavy is None else self._heavy.is_recording()

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        if self._takes(key, value):
            self._attributes[key] = value
        else:
            self._sdk_span().set_attribute(key, value)

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        code = status.status_code if isinstance(status, Status) else status
        if self._heavy is None and code is StatusCode.UNSET:
            return  # as the SDK does with it
        self._sdk_span().set_status(status, description)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        self._sdk_span().add_event(name, attributes, timestamp)

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        self._sdk_span().add_link(context, attributes)

    def update_name(self, name: str) -> None:
        self._sdk_span().update_name(name)
        self.name = name

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        self._sdk_span().record_exception(exception, attributes, timestamp, escaped)

    def end(self, end_time: int | None = None) -> None:
        if self._heavy is not None or self._is_over:
            self._sdk_span().end(end_time)
            return
        self._is_over = True
        self.home.processor.on_end(self._ended(time.time_ns() if end_time is None else end_time))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_val is None:
            self.end()
        else:
            self._sdk_span().__exit__(exc_type, exc_val, exc_tb)

    def _takes(self, key: str, value: AttributeValue) -> bool:
        if self._heavy is not None or self._is_over or not _is_plain(key, value):
            return False
        is_new = key not in self._attributes
        return _fits(len(self._attributes) + is_new, self.home.limits.max_span_attributes)

    def _ended(self, end_time: int) -> ReadableSpan:
        return ReadableSpan(
            name=self.name,
            context=self.context,
            parent=self.parent,
            resource=self.home.provider.resource,
            attributes=self._attributes,
            links=self._links,
            kind=self.kind,
            start_time=self.start_time,
            end_time=end_time,
            instrumentation_scope=self.home.scope,
        )

    def _sdk_span(self) -> SdkSpan:
        """From now on this span is the SDK's; of one that is over a copy that only complains."""
        with _turning:
            if self._heavy is None:
                self._heavy = self._turned()
        return self._heavy

    def _turned(self) -> SdkSpan:
        home = self.home
        span = _HeavySpan(
            self.name,
            self.context,
            self.parent,
            resource=home.provider.resource,
            attributes=self._attributes,
            links=self._links,
            kind=self.kind,
            span_processor=SpanProcessor() if self._is_over else home.processor,
            limits=home.limits,
            instrumentation_scope=home.scope,
        )
        span.start(self.start_time)
        if self._is_over:
            span.end()
        return span


class _HeavySpan(SdkSpan):
    """The SDK lets nobody make a `Span` but by a tracer, which would give it ids of its own."""


_turning = threading.Lock()
"""Rarely taken: one for all spans."""


def _is_plain(key: str, value: object) -> bool:
    return type(value) in _PLAIN and type(key) is str and key != ""


def _is_plain_link(link: Link) -> bool:
    return link.context.is_valid and all(_is_plain(*item) for item in (link.attributes or {}).items())


def _fits(num_attributes: int, max_attributes: int | None) -> bool:
    return max_attributes is None or num_attributes <= max_attributes
