"""The span of one generation, with its engine phases: the one that carries `gen_ai.*`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from telemetry import names
from telemetry.drawing import FinishedSpan, draw
from telemetry.spans import link_to

PhaseName = Literal["wait", "prefill", "decode"]

_UNSET = Status()
_ERROR = Status(StatusCode.ERROR)
_PHASE_SPANS: Mapping[PhaseName, str] = {
    "wait": names.SPAN_ENGINE_WAIT,
    "prefill": names.SPAN_ENGINE_PREFILL,
    "decode": names.SPAN_ENGINE_DECODE,
}


@dataclass(slots=True, kw_only=True)
class Phase:
    """One stay of a request in one phase of the engine; a preempted request has more than one of each.

    `attributes` are own keys of `telemetry.names` (`PHASE_TOKENS`, `PHASE_STEPS`), never `gen_ai.*`.
    `step` is the drawn step that the phase began with, if it was drawn.
    """

    name: PhaseName
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    step: SpanContext | None = None


@dataclass(slots=True, kw_only=True)
class GenerationRecord:
    """All that is told of one generation, whatever its number of prompts, choices or beams.

    Args:
        response_id: what the client sees as the completion's `id`.
        started_at_ns: handed to the engine.
        ended_at_ns: last token out, or the failure.
        finish_reasons: one a choice, in order; `error` for a choice that failed, was cancelled or never
            finished.
        input_tokens: of all prompts together, cached ones included.
        output_tokens: of all choices together.
        item_index: of the prompt in a job of many, from 0; None where it is the only one.
        time_to_first_token_seconds: from `started_at_ns`.
        num_proposed_tokens, num_accepted_tokens: run ahead of their turn, and those of them that were kept.
        error_type: a low-cardinality reason; None also for a cancelled generation, which is no error.
        prompts: content, drawn only by a caller that asks for it (see `generation`).
        outputs: content, one a choice.
    """

    model: str
    response_id: str
    started_at_ns: int
    ended_at_ns: int
    finish_reasons: tuple[str, ...]
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    job_id: str | None = None
    item_index: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop_sequences: tuple[str, ...] = ()
    choice_count: int = 1
    prompt_count: int = 1
    uses_beam_search: bool = False
    is_streamed: bool = False
    phases: tuple[Phase, ...] = ()
    time_to_first_token_seconds: float | None = None
    mean_batch_size: float | None = None
    max_batch_size: int | None = None
    num_steps: int | None = None
    num_preemptions: int = 0
    num_proposed_tokens: int = 0
    num_accepted_tokens: int = 0
    error_type: str | None = None
    prompts: tuple[str, ...] = field(default=(), repr=False)
    outputs: tuple[str, ...] = field(default=(), repr=False)


def generation(
    context: Context,
    record: GenerationRecord,
    *,
    capture_content: bool = False,
    uses_vllm_keys: bool = False,
    tracer: Tracer | None = None,
) -> SpanContext:
    """Draw the one `gen_ai.*` span of a generation below `context`, with its engine phases as children.

    `capture_content` puts prompts and outputs on it; only `TelemetrySettings.captures_content` may say so.
    `uses_vllm_keys` adds what dashboards made for vLLM read.
    Returned is the span's own context, for others to link to.
    """
    attributes = _generation_attributes(record, capture_content=capture_content, vllm=uses_vllm_keys)
    own = draw(context, _generation_span(record, attributes), tracer)
    if own.trace_flags.sampled:
        below = trace.set_span_in_context(NonRecordingSpan(own), context)
        for phase in record.phases:
            draw(below, _phase_span(phase), tracer)
    return own


def generation_apart(
    creation: Context,
    attempt: Context,
    record: GenerationRecord,
    *,
    capture_content: bool = False,
    uses_vllm_keys: bool = False,
    tracer: Tracer | None = None,
) -> None:
    """Draw a generation as the root of a trace of its own, for an item that its job's trace has no room for.

    It links to `creation`, the job's send span, and to `attempt`, the process span it belongs to. The
    sampler decides about it as about any root, except that a job that is not sampled has none. Its phases
    are left out: such items come by the thousand.
    """
    if not trace.get_current_span(attempt).get_span_context().trace_flags.sampled:
        return
    links = [*link_to(creation, names.LINK_CREATION), *link_to(attempt, names.LINK_ATTEMPT)]
    attributes = _generation_attributes(record, capture_content=capture_content, vllm=uses_vllm_keys)
    draw(Context(), _generation_span(record, attributes, links), tracer)


def _generation_span(
    record: GenerationRecord, attributes: dict[str, AttributeValue], links: Sequence[Link] = ()
) -> FinishedSpan:
    return FinishedSpan(
        name=f"{names.OPERATION_TEXT_COMPLETION} {record.model}",
        start_ns=record.started_at_ns,
        end_ns=record.ended_at_ns,
        attributes=attributes
        if record.error_type is None
        else attributes | {names.ERROR_TYPE: record.error_type},
        links=links,
        status=_UNSET if record.error_type is None else _ERROR,
    )


def _phase_span(phase: Phase) -> FinishedSpan:
    return FinishedSpan(
        name=_PHASE_SPANS[phase.name],
        start_ns=phase.start_ns,
        end_ns=phase.end_ns,
        attributes=phase.attributes,
        links=[Link(phase.step, {names.LINK_ROLE: names.LINK_STEP})] if phase.step else (),
    )


def _generation_attributes(
    record: GenerationRecord, *, capture_content: bool, vllm: bool
) -> dict[str, AttributeValue]:
    attributes = _request_attributes(record) | _response_attributes(record)
    if capture_content:
        attributes |= _content_attributes(record)
    if vllm:
        attributes |= _vllm_attributes(record)
    return attributes


def _request_attributes(record: GenerationRecord) -> dict[str, AttributeValue]:
    given: dict[str, AttributeValue | None] = {
        names.GEN_AI_OPERATION_NAME: names.OPERATION_TEXT_COMPLETION,
        names.GEN_AI_PROVIDER_NAME: names.PROVIDER,
        names.GEN_AI_REQUEST_MODEL: record.model,
        names.JOB_ID: record.job_id,
        names.ITEM_INDEX: record.item_index,
        names.GEN_AI_REQUEST_MAX_TOKENS: record.max_tokens,
        names.GEN_AI_REQUEST_TEMPERATURE: _as_double(record.temperature),
        names.GEN_AI_REQUEST_TOP_P: _as_double(record.top_p),
        names.GEN_AI_REQUEST_TOP_K: record.top_k,
        names.GEN_AI_REQUEST_SEED: record.seed,
        names.GEN_AI_REQUEST_FREQUENCY_PENALTY: _as_double(record.frequency_penalty),
        names.GEN_AI_REQUEST_PRESENCE_PENALTY: _as_double(record.presence_penalty),
        names.GEN_AI_REQUEST_STOP_SEQUENCES: record.stop_sequences or None,
        # The convention leaves out a count of one and a stream that is none.
        names.GEN_AI_REQUEST_CHOICE_COUNT: record.choice_count if record.choice_count != 1 else None,
        names.GEN_AI_REQUEST_STREAM: record.is_streamed or None,
        names.REQUEST_PROMPT_COUNT: record.prompt_count if record.prompt_count != 1 else None,
        names.REQUEST_BEAM_SEARCH: record.uses_beam_search or None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _response_attributes(record: GenerationRecord) -> dict[str, AttributeValue]:
    given: dict[str, AttributeValue | None] = {
        names.GEN_AI_RESPONSE_ID: record.response_id,
        names.GEN_AI_RESPONSE_MODEL: record.model,
        names.GEN_AI_RESPONSE_FINISH_REASONS: record.finish_reasons,
        names.GEN_AI_USAGE_INPUT_TOKENS: record.input_tokens,
        names.GEN_AI_USAGE_OUTPUT_TOKENS: record.output_tokens,
        names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: record.cached_tokens or None,
        names.TIME_TO_FIRST_TOKEN: _as_double(record.time_to_first_token_seconds),
        names.BATCH_SIZE_MEAN: _as_double(record.mean_batch_size),
        names.BATCH_SIZE_MAX: record.max_batch_size,
        names.STEPS: record.num_steps,
        names.PREEMPTIONS: record.num_preemptions or None,
        names.PROPOSED_TOKENS: record.num_proposed_tokens or None,
        names.ACCEPTED_TOKENS: record.num_accepted_tokens if record.num_proposed_tokens else None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _vllm_attributes(record: GenerationRecord) -> dict[str, AttributeValue]:
    """What vLLM puts on its `llm_request`, as it means it (vllm/tracing/utils.py).

    A request arrives when the engine is handed it, as there; its wait in the broker has keys of its own.
    Preempted time counts as prefill or decode. One span tells of all choices, where vLLM has one a choice.
    """
    e2e = (record.ended_at_ns - record.started_at_ns) / 1e9
    scheduled_ns = next((phase.start_ns for phase in record.phases if phase.name == "prefill"), None)
    queued = None if scheduled_ns is None else (scheduled_ns - record.started_at_ns) / 1e9
    first = record.time_to_first_token_seconds
    given: dict[str, AttributeValue | None] = {
        names.VLLM_REQUEST_ID: f"{record.response_id}-{record.item_index or 0}",
        names.VLLM_REQUEST_N: record.choice_count,
        names.VLLM_PROMPT_TOKENS: record.input_tokens,
        names.VLLM_COMPLETION_TOKENS: record.output_tokens,
        names.VLLM_TIME_TO_FIRST_TOKEN: _as_double(first),
        names.VLLM_E2E: e2e,
        names.VLLM_TIME_IN_QUEUE: queued,
        names.VLLM_TIME_IN_PREFILL: None if first is None or queued is None else first - queued,
        names.VLLM_TIME_IN_DECODE: None if first is None else e2e - first,
        names.VLLM_TIME_IN_INFERENCE: None if queued is None else e2e - queued,
    }
    return {key: value for key, value in given.items() if value is not None}


def _content_attributes(record: GenerationRecord) -> dict[str, AttributeValue]:
    """Messages as JSON strings, the form every back end reads."""
    inputs = [{"role": "user", "parts": [{"type": "text", "content": prompt}]} for prompt in record.prompts]
    outputs = [
        {"role": "assistant", "parts": [{"type": "text", "content": output}], "finish_reason": reason}
        for output, reason in zip(record.outputs, record.finish_reasons, strict=False)
    ]
    return {
        names.GEN_AI_INPUT_MESSAGES: json.dumps(inputs, ensure_ascii=False),
        names.GEN_AI_OUTPUT_MESSAGES: json.dumps(outputs, ensure_ascii=False),
    }


def _as_double(value: float | None) -> float | None:
    return None if value is None else float(value)
