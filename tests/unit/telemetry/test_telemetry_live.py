from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)
from opentelemetry.util.types import AttributeValue

from telemetry.drawing import DrawingTracerProvider
from telemetry.live import LiveSpan

RESOURCE = Resource({"service.name": "api"})
OTHER = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1))
PARENT = SpanContext(
    1, 2, is_remote=True, trace_flags=TraceFlags(3), trace_state=TraceState([("vendor", "x")])
)
PLAIN: Mapping[str, AttributeValue] = {"job.id": "abcdef", "tokens": 3, "seconds": 0.5, "is": True}


def _fail(span: Span) -> None:
    with pytest.raises(ValueError, match="broken"), trace.use_span(span, end_on_exit=False):
        raise ValueError("broken")


def _leave_by_error(span: Span) -> None:
    with pytest.raises(KeyError), span:
        raise KeyError("gone")


def _end_early(span: Span) -> None:
    span.end(8)
    span.set_attribute("late", 1)
    span.add_event("late")


DEEDS: dict[str, Callable[[Span], object]] = {
    "nothing": lambda span: None,
    "plain attribute": lambda span: span.set_attribute("state", "completed"),
    "attribute again": lambda span: span.set_attributes({"tokens": 4, "tokens ": 5}),
    "attribute of another type": lambda span: span.set_attribute("reasons", ["stop", "length"]),
    "attribute without a key": lambda span: span.set_attribute("", 1),
    "attribute that is none": lambda span: span.set_attributes({"a": 1, "b": None, "c": 2}),
    "status unset": lambda span: span.set_status(Status(StatusCode.UNSET)),
    "status error": lambda span: span.set_status(StatusCode.ERROR, "words"),
    "status unset after error": lambda span: (
        span.set_status(StatusCode.ERROR),
        span.set_status(StatusCode.UNSET),
    ),
    "event": lambda span: span.add_event("retry", {"number": 2}, timestamp=7),
    "link": lambda span: span.add_link(OTHER, {"role": "attempt"}),
    "link that leads nowhere": lambda span: span.add_link(trace.INVALID_SPAN_CONTEXT),
    "name": lambda span: span.update_name("other"),
    "attribute after an event": lambda span: (
        span.add_event("x", timestamp=7),
        span.set_attribute("late", 1),
    ),
    "error inside": _fail,
    "error that leaves it": _leave_by_error,
    "early end": _end_early,
}


class _Pair:
    """Our provider and the SDK's, each with what it sent."""

    def __init__(self) -> None:
        self.ours = DrawingTracerProvider(RESOURCE)
        self.sdk = TracerProvider(resource=RESOURCE, shutdown_on_exit=False)
        self._exporters = {provider: InMemorySpanExporter() for provider in (self.ours, self.sdk)}
        for provider, exporter in self._exporters.items():
            provider.add_span_processor(SimpleSpanProcessor(exporter))

    def do(self, context: Context, links: list[Link], deed: Callable[[Span], object]) -> list[Span]:
        spans = []
        for provider in (self.ours, self.sdk):
            span = provider.get_tracer("fastapi", "1.0", "https://schema").start_span(
                "POST", context, SpanKind.SERVER, dict(PLAIN), links, 5
            )
            deed(span)
            if span.is_recording():
                span.end(9)
            spans.append(span)
        return spans

    def sent(self) -> list[list[object]]:
        """Of each provider as on the wire, but for ids, times of errors and the attributes' order."""
        found = []
        for exporter in self._exporters.values():
            request = encode_spans(exporter.get_finished_spans())
            for of_resource in request.resource_spans:
                for of_scope in of_resource.scope_spans:
                    for span in of_scope.spans:
                        _forget_what_differs(span)
            found.append(list(request.resource_spans))
        return found


def _forget_what_differs(span: object) -> None:
    assert hasattr(span, "ClearField")
    span.ClearField("span_id")
    if not span.parent_span_id:  # type: ignore[attr-defined]  # a message of protobuf's
        span.ClearField("trace_id")
    if span.end_time_unix_nano > 10**9:  # type: ignore[attr-defined]  # ended by an error
        span.ClearField("end_time_unix_nano")
    for event in span.events:  # type: ignore[attr-defined]
        event.ClearField("time_unix_nano")
    span.attributes.sort(key=lambda attribute: attribute.key)  # type: ignore[attr-defined]


def _below(parent: SpanContext) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())


@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)
@pytest.mark.parametrize(
    "limits", [{}, {"OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "3"}, {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "4"}]
)
@pytest.mark.parametrize(
    "links", [[], [Link(OTHER, {"role": "creation"})], [Link(OTHER, {"roles": ["a", "b"]})]]
)
def test_live_span_is_sent_as_the_sdk_s_whatever_is_done_to_it(
    deed: Callable[[Span], object], limits: dict[str, str], links: list[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    pair = _Pair()
    for context in (Context(), _below(PARENT)):
        pair.do(context, links, deed)

    ours, sdk = pair.sent()

    assert ours == sdk
    assert ours


@pytest.mark.parametrize(
    "sampler", ["parentbased_always_on", "parentbased_always_off", "always_on", "always_off"]
)
@pytest.mark.parametrize("flags", range(4))
def test_live_span_is_sampled_as_the_sdk_s_whatever_its_parent(
    sampler: str, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    pair = _Pair()
    for context in (Context(), _below(SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(flags)))):
        ours, sdk = (span.get_span_context() for span in pair.do(context, [], DEEDS["nothing"]))

        assert (ours.trace_flags, ours.trace_state, ours.is_remote) == (
            sdk.trace_flags,
            sdk.trace_state,
            sdk.is_remote,
        )
        assert (ours.trace_id == sdk.trace_id) == trace.get_current_span(context).get_span_context().is_valid
    assert pair.sent()[0] == pair.sent()[1]


def test_live_span_stays_light_when_only_plain_attributes_are_set() -> None:
    span, _ = _Pair().do(Context(), [], DEEDS["plain attribute"])

    assert isinstance(span, LiveSpan)
    assert span._heavy is None


def test_live_span_complains_as_the_sdk_s_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "opentelemetry.sdk.trace"):
        _Pair().do(Context(), [], _end_early)

    messages = [record.getMessage() for record in caplog.records]
    assert messages[: len(messages) // 2] == messages[len(messages) // 2 :]
    assert "Setting attribute on ended span." in messages


def test_provider_starts_the_sdk_s_spans_when_a_processor_looks_at_their_start() -> None:
    class Marking(SpanProcessor):
        def on_start(self, span: Span, parent_context: Context | None = None) -> None:
            span.set_attribute("marked", True)

    provider = DrawingTracerProvider(RESOURCE)
    provider.add_span_processor(Marking())

    assert isinstance(provider.get_tracer("fastapi"), SdkTracer)
