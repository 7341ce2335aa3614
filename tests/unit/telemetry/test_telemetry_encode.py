from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from telemetry import encode as encoding
from telemetry import names
from telemetry.encode import encode
from telemetry.export import GrpcExporter
from telemetry.generation import GenerationRecord, Phase, generation

RESOURCES = [Resource({"service.name": name}, f"https://schema/{name}") for name in ("api", "worker")]
SCOPES = [InstrumentationScope("throughline", ""), InstrumentationScope("other", "1.2", "https://schema")]

scalars = (
    st.text(max_size=200)
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**63), max_value=2**63 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=5)
    | st.none()
)
attributes = st.dictionaries(
    st.text(min_size=1, max_size=140),
    scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(min_size=1), scalars, max_size=2),
    max_size=6,
).map(lambda values: BoundedAttributes(5, values, immutable=True))  # a sixth counts as dropped
states = st.sampled_from([TraceState(), TraceState([("vendor", "x"), ("other", "y")])])
contexts = st.builds(
    SpanContext,
    st.integers(min_value=0, max_value=2**128 - 1),
    st.integers(min_value=0, max_value=2**64 - 1),
    st.booleans(),
    st.sampled_from([TraceFlags(0), TraceFlags(3)]),
    states,
)
times = st.integers(min_value=0, max_value=2**64 - 1)
spans = st.builds(
    ReadableSpan,
    name=st.text(max_size=200),
    context=contexts,
    parent=st.none() | contexts,
    resource=st.sampled_from(RESOURCES),
    attributes=st.none() | attributes,
    events=st.just(())
    | st.lists(st.builds(Event, name=st.text(), attributes=attributes, timestamp=times), max_size=2),
    links=st.lists(st.builds(Link, contexts, attributes), max_size=3),
    kind=st.sampled_from(SpanKind),
    status=st.just(Status()) | st.builds(Status, st.just(StatusCode.ERROR), st.none() | st.text()),
    start_time=times,
    end_time=st.none() | times,
    instrumentation_scope=st.sampled_from(SCOPES),
)
batches = st.lists(spans, max_size=6, unique_by=lambda span: (span.context.trace_id, span.context.span_id))


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(batches)
def test_encoding_equals_the_sdk_s_for_any_batch(batch: list[ReadableSpan]) -> None:
    assert encode(batch) == encode_spans(batch)
    assert encode(batch).SerializeToString() == encode_spans(batch).SerializeToString()


@pytest.mark.parametrize("value", [0, 1, True, False, 1.0, 0.0, -0.0, "1", "", -1, 2**63 - 1, (1,), (True,)])
def test_encoding_keeps_apart_values_that_python_calls_equal(value: object) -> None:
    for other in (0, 1, True, False, 1.0, 0.0, -0.0):
        encode([span_with(other)])

    assert encode([span_with(value)]) == encode_spans([span_with(value)])


def test_encoding_leaves_the_spans_of_a_plain_generation_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be as slow as the SDK's, and no test would tell."""
    handed_on: list[int] = []

    def watched(spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        handed_on.append(len(spans))
        return encode_spans(spans)

    drawn = generation_spans()
    assert len(drawn) == 3
    monkeypatch.setattr(encoding, "encode_spans", watched)

    assert encode(drawn) == encode_spans(drawn)
    assert handed_on == [1]  # for the resource and the scope of all


def test_encoding_keeps_no_long_values_when_prompts_are_captured() -> None:
    encoding._recurring.cache_clear()

    encode([span_with("x" * 65)])
    assert encoding._recurring.cache_info().currsize == 0
    encode([span_with("x" * 64)])
    assert encoding._recurring.cache_info().currsize == 1


def test_grpc_exporter_sends_what_this_encoder_makes() -> None:
    """`_translate_data` is private: the SDK's exporter must still have it, and ours take its place."""
    assert "_translate_data" in vars(OTLPSpanExporter)
    drawn = generation_spans()
    exporter = GrpcExporter("http://127.0.0.1:9", insecure=True)

    assert exporter._translate_data(drawn) == encode(drawn)
    assert GrpcExporter._translate_data is not OTLPSpanExporter._translate_data
    exporter.shutdown()


def span_with(value: object) -> ReadableSpan:
    context = SpanContext(1, 2, is_remote=False)
    return ReadableSpan(
        "s",
        context,
        resource=RESOURCES[0],
        attributes={"key": value},  # type: ignore[dict-item]  # any of the types
        start_time=1,
        end_time=2,
        instrumentation_scope=SCOPES[0],
    )


def generation_spans() -> tuple[ReadableSpan, ...]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=RESOURCES[0], shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    step = SpanContext(5, 6, is_remote=False, trace_flags=TraceFlags(1))
    record = GenerationRecord(
        model="m",
        response_id="cmpl-1",
        started_at_ns=1,
        ended_at_ns=9,
        finish_reasons=("stop", "length"),
        input_tokens=4,
        output_tokens=300,
        temperature=0.5,
        phases=(
            Phase(name="prefill", start_ns=1, end_ns=4, step=step),
            Phase(name="decode", start_ns=4, end_ns=9, attributes={names.PHASE_TOKENS: 1}),
        ),
    )
    generation(Context(), record, tracer=provider.get_tracer("throughline"))
    return exporter.get_finished_spans()
