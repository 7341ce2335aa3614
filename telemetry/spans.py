"""Spans drawn from recorded stamps, and the context that ties them together.

A worker never holds a live span open while the engine runs: the engine's child process stamps what
happened, and the parent draws the spans afterwards with those times. All stamps are wall-clock nanoseconds
since 1970 (`time.time_ns`). Nothing here blocks on the network or raises for a bad stamp: a job never fails
for its trace.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from telemetry import names
from telemetry.drawing import DrawingTracerProvider, FinishedSpan

PhaseName = Literal["wait", "prefill", "decode"]

_W3C = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
_UNSET = Status()
_ERROR = Status(StatusCode.ERROR)
_PHASE_SPANS: Mapping[PhaseName, str] = {
    "wait": names.SPAN_ENGINE_WAIT,
    "prefill": names.SPAN_ENGINE_PREFILL,
    "decode": names.SPAN_ENGINE_DECODE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
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
    error_type: str | None = None
    prompts: tuple[str, ...] = field(default=(), repr=False)
    outputs: tuple[str, ...] = field(default=(), repr=False)


def inject(headers: MutableMapping[str, str]) -> None:
    """`headers` carries the current `traceparent`, `tracestate` and `baggage`; unchanged outside any span."""
    _W3C.inject(headers)


def extract(headers: Mapping[str, object]) -> Context:
    """The context that `headers` carry; empty (a new trace) where they hold none or a malformed one.

    Values that are no strings are passed over, so a task's whole header mapping can be handed in.
    """
    carrier = {key.lower(): value for key, value in headers.items() if isinstance(value, str)}
    return _W3C.extract(carrier, context=Context())


def traceparent(context: Context | None = None) -> str:
    """The W3C header of the span in `context` (the current one), as kept in a job record; else empty."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context=context)
    return carrier.get("traceparent", "")


def queue_wait(
    context: Context,
    *,
    queue: str,
    job_id: str,
    enqueued_at_ns: int,
    started_at_ns: int,
    tracer: Tracer | None = None,
) -> None:
    """Draw `queue <queue>` below `context`, which is the send span's (`telemetry.celery.creation_context`).

    In link-only mode it is the span's that the wait led to: a service adds no span to another one's trace.

    The two stamps come from two machines' clocks. A wait that would be negative is drawn with length zero
    and flagged.
    """
    is_skewed = started_at_ns < enqueued_at_ns
    start_ns = started_at_ns if is_skewed else enqueued_at_ns
    attributes: dict[str, AttributeValue] = {
        names.JOB_ID: job_id,
        names.QUEUE_WAIT: (started_at_ns - start_ns) / 1e9,
    }
    if is_skewed:
        attributes[names.CLOCK_SKEWED] = True
    span = FinishedSpan(name=f"queue {queue}", start_ns=start_ns, end_ns=started_at_ns, attributes=attributes)
    _draw(context, span, tracer)


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
    own = _draw(context, _generation_span(record, attributes), tracer)
    if own.trace_flags.sampled:
        below = trace.set_span_in_context(NonRecordingSpan(own), context)
        for phase in record.phases:
            _draw(below, _phase_span(phase), tracer)
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
    _draw(Context(), _generation_span(record, attributes, links), tracer)


def claim(context: Context, *, job_id: str, started_at_ns: int, ended_at_ns: int) -> None:
    """Draw the worker's claim below `context`, the process span's.

    Drawn when the attempt ends, not live: of a worker that is killed the claim would arrive, its parent
    never.
    """
    _draw_step(names.SPAN_CLAIM, context, job_id, started_at_ns, ended_at_ns)


def interrupted(context: Context, *, job_id: str, started_at_ns: int, ended_at_ns: int) -> None:
    """Draw the time in the engine of a job that left it without an output, so that it has a name."""
    _draw_step(names.SPAN_ENGINE_INTERRUPTED, context, job_id, started_at_ns, ended_at_ns)


def receive_output(context: Context, *, job_id: str, started_at_ns: int, ended_at_ns: int) -> None:
    """Draw the way of a job's outputs from the engine's process to the thread that waits for them."""
    _draw_step(names.SPAN_RECEIVE_OUTPUT, context, job_id, started_at_ns, ended_at_ns)


def lost_attempt(
    context: Context,
    *,
    queue: str,
    job_id: str,
    attempt: int,
    started_at_ns: int,
    ended_at_ns: int,
    is_root: bool = False,
) -> Context:
    """Draw `lost <queue>` for an attempt whose own span can never come, beside the other attempts.

    Args:
        context: the send span's, as for `queue_wait`.
        queue: as in the names of its siblings.
        job_id: whose attempt it was.
        attempt: its number.
        started_at_ns: its claim.
        ended_at_ns: when the next claim found its lease run out; when it really ended nobody knows.
        is_root: of a trace of its own that only links to `context`, as `process` is in link-only mode.

    Returns:
        Its context, for the next attempt to link to: the lost span's own would lead nowhere.
    """
    span = FinishedSpan(
        name=f"lost {queue}",
        start_ns=started_at_ns,
        end_ns=ended_at_ns,
        attributes={names.JOB_ID: job_id, names.JOB_ATTEMPT: attempt, names.ERROR_TYPE: "worker_lost"},
        links=link_to(context, names.LINK_CREATION) if is_root else (),
        status=_ERROR,
    )
    own = _draw(Context() if is_root else context, span)
    return trace.set_span_in_context(NonRecordingSpan(own), Context())


def mark_job(job_id: str, *, created_by: str | None = None) -> None:
    """The current span (the request's, in the API) names the job.

    `created_by` is the traceparent in the job's record, which a later request about the job links to.
    """
    span = trace.get_current_span()
    span.set_attribute(names.JOB_ID, job_id)
    _add_link(span, created_by, names.LINK_CREATION)


def mark_attempt(
    *,
    job_id: str,
    attempt: int,
    is_redelivered: bool = False,
    queue_wait_seconds: float | None = None,
    previous_traceparent: str | None = None,
) -> None:
    """The current `process` span names its job and attempt, and links to the attempt before it.

    `attempt` counts from 1, as the job store does. `queue_wait_seconds` is the searchable twin of the
    `queue` span; a negative one is clock skew and told as such. `previous_traceparent` is what
    `traceparent` gave in the attempt before, or `lost_attempt` for it.
    """
    span = trace.get_current_span()
    attributes: dict[str, AttributeValue] = {
        names.JOB_ID: job_id,
        names.JOB_ATTEMPT: attempt,
        names.JOB_REDELIVERED: is_redelivered,
    }
    if queue_wait_seconds is not None:
        attributes[names.QUEUE_WAIT] = max(queue_wait_seconds, 0.0)
        if queue_wait_seconds < 0:
            attributes[names.CLOCK_SKEWED] = True
    span.set_attributes(attributes)
    _add_link(span, previous_traceparent, names.LINK_PREVIOUS_ATTEMPT)


def mark_outcome(state: str, *, error_type: str | None = None) -> None:
    """The current `process` span tells how its attempt left the job; ERROR only with an `error_type`."""
    span = trace.get_current_span()
    span.set_attribute(names.JOB_STATE, state)
    if error_type is not None:
        _fail(span, error_type)


def mark_handed_back(state: str) -> None:
    """The current `process` span tells that its worker stopped: the job's attempt does not count.

    The next attempt has the same number. `state` is what the job was left in.
    """
    trace.get_current_span().set_attributes({names.JOB_STATE: state, names.JOB_HANDED_BACK: True})


@contextmanager
def accept() -> Iterator[None]:
    """A span from the arrival of a request until it is read, checked and tokenized.

    It begins with the server's span, so that routing has a name too.
    """
    with _live(names.SPAN_ACCEPT, {}, start_ns=getattr(trace.get_current_span(), "start_time", None)):
        yield


@contextmanager
def store_job(job_id: str) -> Iterator[None]:
    """A live span around the API's writing of a new job."""
    with _live(names.SPAN_STORE_JOB, {names.JOB_ID: job_id}):
        yield


@contextmanager
def fetch_result(job_id: str) -> Iterator[None]:
    """A live span around the API's reading of an ended job."""
    with _live(names.SPAN_FETCH_RESULT, {names.JOB_ID: job_id}):
        yield


@contextmanager
def wait_result(job_id: str) -> Iterator[Span]:
    """A live span around the API's wait for a job, so that the gap in the server span has a name."""
    with _tracer(None).start_as_current_span(
        names.SPAN_WAIT_RESULT, attributes={names.JOB_ID: job_id}
    ) as span:
        yield span


@contextmanager
def store_result(job_id: str) -> Iterator[Span]:
    """A live span around the worker's settle."""
    with _tracer(None).start_as_current_span(
        names.SPAN_STORE_RESULT, attributes={names.JOB_ID: job_id}
    ) as span:
        yield span


def wall_ns(monotonic_seconds: float) -> int:
    """A stamp of the monotonic clock, which all processes of a machine share, as spans want it."""
    return wall_clock()(monotonic_seconds)


def wall_clock() -> Callable[[float], int]:
    """`wall_ns` for many stamps: the clocks are compared once, so that equal stamps stay equal."""
    offset_ns = _wall_minus_monotonic_ns()
    return lambda monotonic_seconds: offset_ns + round(monotonic_seconds * 1e9)


def _wall_minus_monotonic_ns() -> int:
    """The two clocks cannot be read at once: of three readings the one that was least held up counts."""
    readings = []
    for _ in range(3):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


@contextmanager
def give_back(job_id: str) -> Iterator[None]:
    """A live span around the worker's handing a job back to its queue."""
    with _live(names.SPAN_GIVE_BACK, {names.JOB_ID: job_id}):
        yield


@contextmanager
def report(job_id: str) -> Iterator[None]:
    """A live span around what an attempt tells when its result is stored, this trace too."""
    with _live(names.SPAN_REPORT, {names.JOB_ID: job_id}):
        yield


def link_to(context: Context, role: str) -> list[Link]:
    """A list of one link to the span in `context`; empty where there is none, or one that nobody keeps."""
    target = trace.get_current_span(context).get_span_context()
    is_kept = target.is_valid and target.trace_flags.sampled
    return [Link(target, {names.LINK_ROLE: role})] if is_kept else []


def _tracer(tracer: Tracer | None) -> Tracer:
    return tracer if tracer is not None else _tracer_of(trace.get_tracer_provider())


@functools.cache
def _tracer_of(provider: TracerProvider) -> Tracer:
    """Kept, for the SDK makes a new one at every call, which takes half as long as a span."""
    return provider.get_tracer(names.TRACER)


@contextmanager
def _live(name: str, attributes: dict[str, AttributeValue], start_ns: int | None = None) -> Iterator[None]:
    """Never the current span: ids that are told and messages that are sent inside belong to the request.

    An error that passes through is told by the request's own span; its words might quote a prompt.
    """
    context, started_at_ns = context_api.get_current(), start_ns or time.time_ns()
    try:
        yield
    finally:
        _draw(
            context,
            FinishedSpan(name=name, start_ns=started_at_ns, end_ns=time.time_ns(), attributes=attributes),
        )


def _draw(context: Context, span: FinishedSpan, tracer: Tracer | None = None) -> SpanContext:
    """`span` lies below that of `context`; the SDK makes roots, and all where the provider is not ours."""
    provider = trace.get_tracer_provider()
    if tracer is None and isinstance(provider, DrawingTracerProvider):
        own = provider.draw(context, span)
        if own is not None:
            return own
    live = _tracer(tracer).start_span(
        span.name, context, attributes=span.attributes, links=span.links, start_time=span.start_ns
    )
    live.set_status(span.status)
    live.end(max(span.start_ns, span.end_ns))
    return live.get_span_context()


def _draw_step(name: str, context: Context, job_id: str, start_ns: int, end_ns: int) -> None:
    attributes = {names.JOB_ID: job_id}
    _draw(context, FinishedSpan(name=name, start_ns=start_ns, end_ns=end_ns, attributes=attributes))


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


def _add_link(span: Span, traceparent: str | None, role: str) -> None:
    if traceparent is None or not span.is_recording():
        return
    target = extract({"traceparent": traceparent})
    for link in link_to(target, role):
        span.add_link(link.context, link.attributes)


def _fail(span: Span, error_type: str) -> None:
    span.set_attribute(names.ERROR_TYPE, error_type)
    span.set_status(_ERROR)


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
