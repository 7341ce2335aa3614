from __future__ import annotations

import json
from dataclasses import replace

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from telemetry import names
from telemetry.generation import GenerationRecord, Phase, generation, generation_apart
from telemetry.spans import extract, inject, mark_attempt, mark_outcome, queue_wait

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PARENT_SPAN_ID = 0x00F067AA0BA902B7
SECOND = 1_000_000_000

RECORD = GenerationRecord(
    model="facebook/opt-125m",
    response_id="cmpl-1",
    started_at_ns=10 * SECOND,
    ended_at_ns=12 * SECOND,
    finish_reasons=("stop", "length"),
    input_tokens=4,
    output_tokens=20,
)


class Recorded:
    """A tracer and what it drew."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer: Tracer = provider.get_tracer("test")

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def draw_generation(recorded: Recorded, record: GenerationRecord, **options: bool) -> ReadableSpan:
    generation(extract({"traceparent": TRACEPARENT}), record, tracer=recorded.tracer, **options)
    return recorded.spans()[f"text_completion {record.model}"]


def test_queue_wait_lies_below_its_context_with_the_stamps_it_was_given(recorded: Recorded) -> None:
    queue_wait(
        extract({"traceparent": TRACEPARENT}),
        queue="models.tiny",
        job_id="job-1",
        enqueued_at_ns=5 * SECOND,
        started_at_ns=7 * SECOND,
        tracer=recorded.tracer,
    )

    span = recorded.spans()["queue models.tiny"]
    assert span.parent is not None
    assert span.parent.span_id == PARENT_SPAN_ID
    assert (span.start_time, span.end_time, span.kind) == (5 * SECOND, 7 * SECOND, SpanKind.INTERNAL)
    assert dict(span.attributes or {}) == {names.JOB_ID: "job-1", names.QUEUE_WAIT: 2.0}


def test_queue_wait_has_no_length_and_a_flag_when_the_clocks_disagree(recorded: Recorded) -> None:
    queue_wait(
        Context(),
        queue="q",
        job_id="job-1",
        enqueued_at_ns=7 * SECOND,
        started_at_ns=5 * SECOND,
        tracer=recorded.tracer,
    )

    span = recorded.spans()["queue q"]
    assert (span.start_time, span.end_time) == (5 * SECOND, 5 * SECOND)
    assert dict(span.attributes or {}) == {
        names.JOB_ID: "job-1",
        names.QUEUE_WAIT: 0.0,
        names.CLOCK_SKEWED: True,
    }


def test_generation_has_only_what_every_one_has_when_nothing_was_asked_for(recorded: Recorded) -> None:
    span = draw_generation(recorded, RECORD)

    assert (span.start_time, span.end_time, span.kind) == (10 * SECOND, 12 * SECOND, SpanKind.INTERNAL)
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "throughline",
        "gen_ai.request.model": "facebook/opt-125m",
        "gen_ai.response.id": "cmpl-1",
        "gen_ai.response.model": "facebook/opt-125m",
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 20,
    }


def test_generation_carries_every_parameter_when_all_are_given(recorded: Recorded) -> None:
    record = replace(
        RECORD,
        job_id="job-1",
        item_index=0,
        cached_tokens=2,
        max_tokens=10,
        temperature=0,
        top_p=1,
        top_k=5,
        seed=0,
        frequency_penalty=0.5,
        presence_penalty=0,
        stop_sequences=("\n",),
        choice_count=2,
        prompt_count=3,
        uses_beam_search=True,
        is_streamed=True,
        phases=(Phase(name="prefill", start_ns=10 * SECOND, end_ns=11 * SECOND),),
        time_to_first_token_seconds=0.25,
        mean_batch_size=31.5,
        max_batch_size=32,
        num_steps=10,
        num_preemptions=1,
        num_proposed_tokens=4,
        num_accepted_tokens=3,
    )

    drawn = draw_generation(recorded, record, capture_content=True, uses_vllm_keys=True)
    attributes = dict(drawn.attributes or {})

    shape = names.shape_of("text_completion facebook/opt-125m", "INTERNAL")
    assert shape is not None
    assert set(attributes) == {*shape.required, *shape.optional} - {names.ERROR_TYPE}
    # A JSON number without a point is an int in Python; on the wire these are doubles all the same.
    assert isinstance(attributes["gen_ai.request.temperature"], float)
    assert attributes["gen_ai.request.seed"] == 0


def test_generation_carries_the_keys_of_vllm_in_its_meaning_only_when_asked(recorded: Recorded) -> None:
    """Preempted once: all from the first scheduling to the last token is inference, as there."""
    stays = ("wait", 10, 12), ("prefill", 12, 13), ("decode", 13, 14), ("wait", 14, 17), ("decode", 17, 20)
    phases = tuple(
        Phase(name=name, start_ns=start * SECOND, end_ns=end * SECOND)
        for name, start, end in stays  # type: ignore[arg-type]  # mypy widens the literals
    )
    record = replace(
        RECORD,
        ended_at_ns=20 * SECOND,
        phases=phases,
        item_index=3,
        choice_count=2,
        time_to_first_token_seconds=3.0,
    )

    plain = dict(draw_generation(recorded, record).attributes or {})
    recorded.exporter.clear()
    more = dict(draw_generation(recorded, record, uses_vllm_keys=True).attributes or {})

    assert {key: value for key, value in more.items() if key not in plain} == {
        "gen_ai.request.id": "cmpl-1-3",
        "gen_ai.request.n": 2,
        "gen_ai.usage.prompt_tokens": 4,
        "gen_ai.usage.completion_tokens": 20,
        "gen_ai.latency.time_in_queue": 2.0,
        "gen_ai.latency.time_to_first_token": 3.0,
        "gen_ai.latency.time_in_model_prefill": 1.0,
        "gen_ai.latency.time_in_model_decode": 7.0,
        "gen_ai.latency.time_in_model_inference": 8.0,
        "gen_ai.latency.e2e": 10.0,
    }
    assert plain.items() <= more.items()


def test_generation_has_no_latency_of_vllm_s_that_was_never_reached(recorded: Recorded) -> None:
    attributes = draw_generation(recorded, RECORD, uses_vllm_keys=True).attributes or {}

    assert {key for key in attributes if key.startswith("gen_ai.latency")} == {"gen_ai.latency.e2e"}


def test_generation_is_an_error_when_the_record_names_one(recorded: Recorded) -> None:
    span = draw_generation(recorded, replace(RECORD, error_type="out_of_memory", finish_reasons=("error",)))

    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "out_of_memory"


def test_generation_tells_no_content_unless_it_is_asked_to(recorded: Recorded) -> None:
    record = replace(RECORD, prompts=("San Francisco is a",), outputs=("city", "it's “fun”"))

    silent = draw_generation(recorded, record)
    assert "San Francisco" not in silent.to_json()
    assert "San Francisco" not in repr(record)

    recorded.exporter.clear()
    attributes = draw_generation(recorded, record, capture_content=True).attributes or {}
    assert json.loads(str(attributes["gen_ai.input.messages"])) == [
        {"role": "user", "parts": [{"type": "text", "content": "San Francisco is a"}]}
    ]
    assert [
        message["parts"][0]["content"] for message in json.loads(str(attributes["gen_ai.output.messages"]))
    ] == [
        "city",
        "it's “fun”",
    ]


def test_phases_are_children_in_order_when_a_request_was_preempted(recorded: Recorded) -> None:
    stays = ("wait", 10, 11), ("prefill", 11, 12), ("wait", 12, 13), ("prefill", 13, 14), ("decode", 14, 15)
    phases = tuple(
        Phase(name=name, start_ns=start * SECOND, end_ns=end * SECOND, attributes={names.PHASE_TOKENS: 3})
        for name, start, end in stays  # type: ignore[arg-type]  # mypy widens the literals
    )
    parent = draw_generation(recorded, replace(RECORD, ended_at_ns=15 * SECOND, phases=phases))

    drawn = [span for span in recorded.exporter.get_finished_spans() if span.name.startswith("engine.")]
    assert [(span.name, (span.start_time or 0) // SECOND) for span in drawn] == [
        (f"engine.{name}", start) for name, start, _ in stays
    ]
    assert {span.parent.span_id for span in drawn if span.parent} == {parent.context.span_id}
    assert all(not key.startswith("gen_ai.") for span in drawn for key in span.attributes or {})


def test_spans_never_end_before_they_start_when_stamps_are_the_wrong_way_round(recorded: Recorded) -> None:
    phase = Phase(name="decode", start_ns=12 * SECOND, end_ns=11 * SECOND)
    draw_generation(recorded, replace(RECORD, ended_at_ns=9 * SECOND, phases=(phase,)))

    assert all(
        (span.end_time or 0) >= (span.start_time or 0) for span in recorded.exporter.get_finished_spans()
    )


def test_generation_draws_nothing_when_the_client_is_not_sampled(recorded: Recorded) -> None:
    unsampled = extract({"traceparent": TRACEPARENT[:-2] + "00"})
    phase = Phase(name="decode", start_ns=11 * SECOND, end_ns=12 * SECOND)
    generation(unsampled, replace(RECORD, phases=(phase,)), tracer=recorded.tracer)

    assert recorded.exporter.get_finished_spans() == ()


@pytest.mark.parametrize("is_sampled", [True, False])
def test_item_apart_is_a_root_with_links_only_when_its_job_is_sampled(
    recorded: Recorded, is_sampled: bool
) -> None:
    attempt = extract({"traceparent": TRACEPARENT[:-2] + ("01" if is_sampled else "00")})
    creation = extract({"traceparent": TRACEPARENT.replace("00f067aa", "11111111")})
    phase = Phase(name="decode", start_ns=11 * SECOND, end_ns=12 * SECOND)

    generation_apart(
        creation, attempt, replace(RECORD, item_index=70, phases=(phase,)), tracer=recorded.tracer
    )

    spans = recorded.exporter.get_finished_spans()
    assert len(spans) == is_sampled
    for span in spans:
        assert span.parent is None
        assert f"{span.context.trace_id:032x}" not in TRACEPARENT
        assert (span.attributes or {})[names.ITEM_INDEX] == 70
        assert [((link.attributes or {})[names.LINK_ROLE], link.context.span_id) for link in span.links] == [
            (names.LINK_CREATION, 0x11111111_0BA902B7),
            (names.LINK_ATTEMPT, PARENT_SPAN_ID),
        ]


def test_attempt_names_itself_and_links_to_the_one_before(recorded: Recorded) -> None:
    with recorded.tracer.start_as_current_span("process q"):
        mark_attempt(job_id="job-1", attempt=2, queue_wait_seconds=-0.5, previous_traceparent=TRACEPARENT)
        mark_outcome("cancelled")

    span = recorded.spans()["process q"]
    assert dict(span.attributes or {}) == {
        names.JOB_ID: "job-1",
        names.JOB_ATTEMPT: 2,
        names.JOB_REDELIVERED: False,
        names.QUEUE_WAIT: 0.0,
        names.CLOCK_SKEWED: True,
        names.JOB_STATE: "cancelled",
    }
    [link] = span.links
    assert link.context.span_id == PARENT_SPAN_ID
    assert dict(link.attributes or {}) == {names.LINK_ROLE: names.LINK_PREVIOUS_ATTEMPT}
    assert span.status.status_code is StatusCode.UNSET


def test_outcome_is_an_error_only_when_a_type_is_given(recorded: Recorded) -> None:
    with recorded.tracer.start_as_current_span("process q"):
        mark_outcome("failed", error_type="engine_crashed")

    span = recorded.spans()["process q"]
    assert (span.status.status_code, (span.attributes or {})["error.type"]) == (
        StatusCode.ERROR,
        "engine_crashed",
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"traceparent": "nonsense"},
        {"traceparent": f"00-{'0' * 32}-{'0' * 16}-01"},
        {"traceparent": TRACEPARENT.replace("00-", "ff-", 1)},
        {"traceparent": 7},
    ],
)
def test_extract_finds_no_parent_when_the_header_is_missing_or_broken(headers: dict[str, object]) -> None:
    assert not trace.get_current_span(extract(headers)).get_span_context().is_valid


def test_extract_reads_what_inject_wrote_whatever_the_case_of_the_keys(recorded: Recorded) -> None:
    headers: dict[str, str] = {}
    with recorded.tracer.start_as_current_span("here") as span:
        inject(headers)

    found = trace.get_current_span(extract({key.title(): value for key, value in headers.items()}))
    assert found.get_span_context().span_id == span.get_span_context().span_id
