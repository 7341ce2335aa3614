"""Spans that are over when they are drawn, without the SDK's live span around them.

Most spans of a job are drawn from stamps. The SDK would make two objects, three locks and two bounded lists
of each, so that threads may change it while it lives; here it is made as it ends, in half the time. The SDK
advises its users against that, so sampler, ids, limits and processors are the provider's own, and a test
holds the outcome equal to the SDK's. Processors see such a span only at its end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import (
    ReadableSpan,
    SpanLimits,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NoOpTracer, SpanContext, SpanKind, Status, Tracer, TraceState
from opentelemetry.util.types import Attributes, AttributeValue

from telemetry import names
from telemetry.identity import Identities
from telemetry.live import LiveTracer, SpanHome

_BLIND_TO_STARTS = (SpanProcessor.on_start, BatchSpanProcessor.on_start, SimpleSpanProcessor.on_start)
_SCOPE = InstrumentationScope(names.TRACER, "")  # as `get_tracer` makes it
_UNSET = Status()


@dataclass(slots=True, kw_only=True)
class FinishedSpan:
    """Of kind INTERNAL. Stamps are Unix nanoseconds; one that would end before its start has no length.

    Sequences among the attributes are tuples, which nobody changes until they are sent.
    """

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue]
    links: Sequence[Link] = ()
    status: Status = _UNSET


def draw(context: Context, span: FinishedSpan, tracer: Tracer | None = None) -> SpanContext:
    """`span` lies below that of `context`; the SDK makes roots, and all where the provider is not ours."""
    provider = trace.get_tracer_provider()
    if tracer is None and isinstance(provider, DrawingTracerProvider):
        own = provider.draw(context, span)
        if own is not None:
            return own
    live = (tracer or _tracer_of(provider)).start_span(
        span.name, context, attributes=span.attributes, links=span.links, start_time=span.start_ns
    )
    live.set_status(span.status)
    live.end(max(span.start_ns, span.end_ns))
    return live.get_span_context()


@functools.cache
def _tracer_of(provider: trace.TracerProvider) -> Tracer:
    """Kept, for the SDK makes a new one at every call, which takes half as long as a span."""
    return provider.get_tracer(names.TRACER)


class DrawingTracerProvider(TracerProvider):
    """The SDK's provider, which also takes finished spans; its live ones are `telemetry.live`'s."""

    def __init__(self, resource: Resource) -> None:
        self._processors = SynchronousMultiSpanProcessor()  # type: ignore[no-untyped-call]  # the SDK's gap
        self._limits = SpanLimits()
        super().__init__(
            resource=resource,
            shutdown_on_exit=False,  # the SDK's own exit handler may wait for 30 s
            active_span_processor=self._processors,
            span_limits=self._limits,
        )
        self._identities = Identities(self.sampler, self.id_generator)
        self._starts_matter = False
        self._is_off = isinstance(self.get_tracer(names.TRACER), NoOpTracer)

    def add_span_processor(self, span_processor: SpanProcessor) -> None:
        """One that looks at spans when they start makes the SDK's of all live ones, of tracers made later."""
        super().add_span_processor(span_processor)
        self._starts_matter |= type(span_processor).on_start not in _BLIND_TO_STARTS

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> Tracer:
        """Raises nothing; the SDK's own tracer where light spans would make a difference."""
        stock = super().get_tracer(
            instrumenting_module_name, instrumenting_library_version, schema_url, attributes
        )
        if not isinstance(stock, SdkTracer) or self._starts_matter or not self._identities.follows_parents:
            return stock
        scope = InstrumentationScope(
            instrumenting_module_name, instrumenting_library_version or "", schema_url, attributes
        )
        return LiveTracer(stock, self._identities, SpanHome(self, scope, self._limits, self._processors))

    def draw(self, context: Context, span: FinishedSpan) -> SpanContext | None:
        """`span` lies below that of `context`, unless the sampler leaves it out.

        Returns:
            The span's context, sampled or not; None where nothing was done, because `context` has no span
            or tracing is switched off: such a one is the SDK's to make.
        """
        parent = trace.get_current_span(context).get_span_context()
        if self._is_off or not parent.is_valid:
            return None
        if self._identities.follows_parents:
            is_sampled, attributes = parent.trace_flags.sampled, span.attributes
            trace_state: TraceState | None = parent.trace_state
        else:
            decision = self.sampler.should_sample(
                context, parent.trace_id, span.name, SpanKind.INTERNAL, span.attributes, span.links
            )
            is_sampled = decision.decision is Decision.RECORD_AND_SAMPLE
            trace_state, attributes = decision.trace_state, decision.attributes or {}
        own = self._identities.below(parent, is_sampled=is_sampled, trace_state=trace_state)
        if is_sampled:
            self._processors.on_end(self._readable(own, parent, span, attributes))
        return own

    def _readable(
        self,
        own: SpanContext,
        parent: SpanContext,
        span: FinishedSpan,
        attributes: Mapping[str, AttributeValue] | None,
    ) -> ReadableSpan:
        return ReadableSpan(
            name=span.name,
            context=own,
            parent=parent,
            resource=self.resource,
            attributes=self._bounded(attributes or {}),
            links=span.links,
            status=span.status,
            start_time=span.start_ns,
            end_time=max(span.start_ns, span.end_ns),
            instrumentation_scope=_SCOPE,
        )

    def _bounded(self, attributes: Mapping[str, AttributeValue]) -> Mapping[str, AttributeValue]:
        """As many and as long as the operator allows; their types are as declared and need no cleaning."""
        num_allowed, length = self._limits.max_span_attributes, self._limits.max_span_attribute_length
        if length is None and (num_allowed is None or len(attributes) <= num_allowed):
            return dict(attributes)
        return BoundedAttributes(num_allowed, attributes, max_value_len=length)
