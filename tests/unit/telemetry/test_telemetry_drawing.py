from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from telemetry import names
from telemetry.drawing import DrawingTracerProvider, FinishedSpan

RESOURCE = Resource({"service.name": "worker"})
LINK = Link(SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1)), {names.LINK_ROLE: "step"})
FINISHED = FinishedSpan(
    name="claim",
    start_ns=5,
    end_ns=9,
    attributes={"job.id": "abcdef", "reasons": ("stop", "length"), "count": 3, "is": True},
    links=[LINK],
    status=Status(StatusCode.ERROR),
)
PLAIN = FinishedSpan(name="claim", start_ns=5, end_ns=3, attributes={})


def below(flags: int, *, is_remote: bool = False, state: TraceState | None = None) -> Context:
    parent = SpanContext(1, 2, is_remote=is_remote, trace_flags=TraceFlags(flags), trace_state=state)
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())


def wire(exporter: InMemorySpanExporter) -> list[WireSpan]:
    """As they would be sent, with resource and scope, but for their ids."""
    found = encode_spans(exporter.get_finished_spans())
    for of_resource in found.resource_spans:
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                span.ClearField("span_id")
    return list(found.resource_spans)


@pytest.mark.parametrize("sampler", ["parentbased_always_on", "always_off", "always_on", "traceidratio"])
@pytest.mark.parametrize("span", [FINISHED, PLAIN])
@pytest.mark.parametrize(
    "limits", [{}, {"OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "3"}, {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "3"}]
)
def test_drawn_span_equals_the_sdk_s_whatever_its_parent_and_sampler(
    sampler: str, span: FinishedSpan, limits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    contexts = [below(0), below(1), below(2), below(3), below(1, is_remote=True)]
    contexts.append(below(3, state=TraceState([("vendor", "x")])))
    drawing, sdk = DrawingTracerProvider(RESOURCE), TracerProvider(resource=RESOURCE, shutdown_on_exit=False)
    exporters = []
    for provider in (drawing, sdk):
        exporters.append(InMemorySpanExporter())
        provider.add_span_processor(SimpleSpanProcessor(exporters[-1]))
    for context in contexts:
        drawn = drawing.draw(context, span)
        live = sdk.get_tracer(names.TRACER).start_span(
            span.name, context, attributes=span.attributes, links=span.links, start_time=span.start_ns
        )
        live.set_status(span.status)
        live.end(max(span.start_ns, span.end_ns))
        its = live.get_span_context()

        assert drawn is not None
        assert (drawn.trace_id, drawn.trace_flags) == (its.trace_id, its.trace_flags)
        assert (drawn.trace_state, drawn.is_remote) == (its.trace_state, its.is_remote)

    assert wire(exporters[0]) == wire(exporters[1])


def test_drawing_leaves_a_root_to_the_sdk() -> None:
    assert DrawingTracerProvider(RESOURCE).draw(Context(), PLAIN) is None


def test_drawing_does_nothing_when_the_sdk_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert DrawingTracerProvider(RESOURCE).draw(below(1), PLAIN) is None
