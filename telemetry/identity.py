"""The ids of new spans and whether they are sampled, at a fraction of what the SDK's sampler takes.

Under `parentbased_*`, the default, a span with a parent is sampled as its parent is: asking the SDK's sampler
makes five calls and two mappings for that. Any other sampler is asked as the SDK asks it.
"""

from __future__ import annotations

import re
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.util.types import Attributes

_FOLLOWING: Final = re.compile(
    r"ParentBased\{root:(AlwaysOnSampler|AlwaysOffSampler|TraceIdRatioBased\{[^{}]*\})"
    r",remoteParentSampled:AlwaysOnSampler,remoteParentNotSampled:AlwaysOffSampler"
    r",localParentSampled:AlwaysOnSampler,localParentNotSampled:AlwaysOffSampler\}"
)
"""How a sampler describes itself whose spans follow their parents, and whose roots are sampled or dropped."""

_FLAGS = tuple(TraceFlags(flags) for flags in range(4))
_SAMPLED, _RANDOM = int(TraceFlags.SAMPLED), int(TraceFlags.RANDOM_TRACE_ID)


class Identities:
    """Hands out span contexts as the SDK's tracer would; safe from any thread.

    `follows_parents`: no span is asked for but those without a parent, and none is recorded without being
    sampled.
    """

    def __init__(self, sampler: Sampler, ids: IdGenerator) -> None:
        self._sampler = sampler
        self._ids = ids
        self.follows_parents = _FOLLOWING.fullmatch(sampler.get_description()) is not None

    def new(
        self, context: Context | None, name: str, kind: SpanKind, attributes: Attributes
    ) -> tuple[SpanContext, SpanContext | None]:
        """A new span's context and its parent's, None for a root; only where `follows_parents`."""
        parent = trace.get_current_span(context).get_span_context()
        if parent.is_valid:
            is_sampled = bool(parent.trace_flags & _SAMPLED)
            return self.below(parent, is_sampled=is_sampled, trace_state=parent.trace_state), parent
        trace_id = self._ids.generate_trace_id()
        result = self._sampler.should_sample(context, trace_id, name, kind, attributes)
        flags = _SAMPLED if result.decision is Decision.RECORD_AND_SAMPLE else 0
        if self._ids.is_trace_id_random():
            flags |= _RANDOM
        own = SpanContext(
            trace_id, self._ids.generate_span_id(), False, _FLAGS[flags], trace_state=result.trace_state
        )
        return own, None

    def below(self, parent: SpanContext, *, is_sampled: bool, trace_state: TraceState | None) -> SpanContext:
        """Of a new span in `parent`'s trace."""
        flags = _SAMPLED if is_sampled else 0
        return SpanContext(
            parent.trace_id,
            self._ids.generate_span_id(),
            False,
            _FLAGS[flags | parent.trace_flags & _RANDOM],
            trace_state,
        )
