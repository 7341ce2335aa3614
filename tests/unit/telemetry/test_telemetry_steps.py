from __future__ import annotations

from dataclasses import replace

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from telemetry import names
from telemetry.generation import GenerationRecord, Phase, generation
from telemetry.steps import MAX_LINKS, StepRecord, step

MS = 1_000_000
RECORD = StepRecord(
    started_at_ns=5 * MS,
    ended_at_ns=9 * MS,
    batch_size=3,
    num_prefill_tokens=20,
    num_decode_tokens=2,
    num_blocks_used=7,
    num_blocks_total=40,
    num_running=3,
    num_waiting=1,
    num_preempted=0,
    num_joined=1,
    num_left=0,
)


class Recorded:
    """A tracer and what it drew."""

    def __init__(self, sampler: Sampler = ALWAYS_ON) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("test")

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def request_span(number: int, flags: int = TraceFlags.SAMPLED) -> SpanContext:
    return SpanContext(number, number, is_remote=False, trace_flags=TraceFlags(flags))


def links(span: ReadableSpan) -> list[tuple[int, object]]:
    return [(link.context.span_id, dict(link.attributes or {})[names.LINK_ROLE]) for link in span.links]


def test_step_is_a_root_even_inside_another_span(recorded: Recorded) -> None:
    with recorded.tracer.start_as_current_span("process q"):
        step(RECORD, joined=[], left=[], tracer=recorded.tracer)

    (drawn,) = recorded.spans("engine.step")
    assert drawn.parent is None
    assert (drawn.start_time, drawn.end_time, drawn.kind) == (5 * MS, 9 * MS, SpanKind.INTERNAL)
    shape = names.shape_of("engine.step", "INTERNAL")
    assert shape is not None
    assert set(drawn.attributes or {}) == set(shape.required)


def test_step_tells_of_its_length_only_when_it_was_slow(recorded: Recorded) -> None:
    step(replace(RECORD, is_slow=True), joined=[], left=[], tracer=recorded.tracer)

    (drawn,) = recorded.spans("engine.step")
    assert (drawn.attributes or {})[names.STEP_SLOW] is True


def test_step_links_once_to_each_span_that_joins_and_that_leaves(recorded: Recorded) -> None:
    first, second = request_span(1), request_span(2)

    step(RECORD, joined=[first, first, second], left=[first], tracer=recorded.tracer)

    (drawn,) = recorded.spans("engine.step")
    assert links(drawn) == [(1, "joined"), (2, "joined"), (1, "left")]


def test_step_links_to_no_span_that_is_not_kept(recorded: Recorded) -> None:
    step(RECORD, joined=[request_span(1, flags=0), request_span(0)], left=[], tracer=recorded.tracer)

    (drawn,) = recorded.spans("engine.step")
    assert links(drawn) == []
    assert names.STEP_LINKS_OMITTED not in (drawn.attributes or {})


@pytest.mark.parametrize(("num_requests", "num_omitted"), [(MAX_LINKS, None), (MAX_LINKS + 3, 3)])
def test_step_counts_the_links_that_it_leaves_out(
    recorded: Recorded, num_requests: int, num_omitted: int | None
) -> None:
    joined = [request_span(number) for number in range(1, num_requests + 1)]

    step(RECORD, joined=joined, left=[], tracer=recorded.tracer)

    (drawn,) = recorded.spans("engine.step")
    assert len(drawn.links) == MAX_LINKS
    assert drawn.dropped_links == 0
    assert (drawn.attributes or {}).get(names.STEP_LINKS_OMITTED) == num_omitted


def test_step_that_the_sampler_drops_says_so_in_its_context() -> None:
    dropping = Recorded(ALWAYS_OFF)

    context = step(RECORD, joined=[], left=[], tracer=dropping.tracer)

    assert not context.trace_flags.sampled
    assert not dropping.spans("engine.step")


def test_prefill_links_to_the_step_that_admitted_it(recorded: Recorded) -> None:
    admitting = step(RECORD, joined=[], left=[], tracer=recorded.tracer)
    record = GenerationRecord(
        model="m",
        response_id="cmpl-1",
        started_at_ns=4 * MS,
        ended_at_ns=9 * MS,
        finish_reasons=("stop",),
        input_tokens=20,
        output_tokens=1,
        phases=(
            Phase(name="wait", start_ns=4 * MS, end_ns=5 * MS),
            Phase(name="prefill", start_ns=5 * MS, end_ns=9 * MS, step=admitting),
        ),
    )

    generation(Context(), record, tracer=recorded.tracer)

    (prefill,) = recorded.spans("engine.prefill")
    (wait,) = recorded.spans("engine.wait")
    assert links(prefill) == [(admitting.span_id, "step")]
    assert prefill.links[0].context.trace_id == admitting.trace_id
    assert not wait.links
    assert trace.get_current_span() is trace.INVALID_SPAN
