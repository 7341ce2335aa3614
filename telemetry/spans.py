"""The spans of a job around its generation, and the context that ties them together.

A worker never holds a live span open while the engine runs: the engine's child process stamps what
happened, and the parent draws the spans afterwards with those times. All stamps are wall-clock nanoseconds
since 1970 (`time.time_ns`). Nothing here blocks on the network or raises for a bad stamp: a job never fails
for its trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace import Link, NonRecordingSpan, Span, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from telemetry import names
from telemetry.drawing import FinishedSpan, draw

_W3C = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
_ERROR = Status(StatusCode.ERROR)


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
    own = trace.get_current_span(context).get_span_context()
    return f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}" if own.is_valid else ""


def link_to(context: Context, role: str) -> list[Link]:
    """A list of one link to the span in `context`; empty where there is none, or one that nobody keeps."""
    target = trace.get_current_span(context).get_span_context()
    is_kept = target.is_valid and target.trace_flags.sampled
    return [Link(target, {names.LINK_ROLE: role})] if is_kept else []


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
    draw(context, span, tracer)


def delay(context: Context, *, queue: str, job_id: str, started_at_ns: int, ended_at_ns: int) -> None:
    """Draw `delay <queue>`, a job's wait for its time before it goes into the queue, beside `queue_wait`."""
    _draw_step(f"delay {queue}", context, job_id, started_at_ns, ended_at_ns)


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
    own = draw(Context() if is_root else context, span)
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
        span.set_attribute(names.ERROR_TYPE, error_type)
        span.set_status(_ERROR)


def mark_handed_back(state: str) -> None:
    """The current `process` span tells that its worker stopped: the job's attempt does not count.

    The next attempt has the same number. `state` is what the job was left in.
    """
    trace.get_current_span().set_attributes({names.JOB_STATE: state, names.JOB_HANDED_BACK: True})


def accept() -> AbstractContextManager[None]:
    """A span from the arrival of a request until it is read, checked and tokenized.

    It begins with the server's span, so that routing has a name too.
    """
    return _Live(names.SPAN_ACCEPT, {}, getattr(trace.get_current_span(), "start_time", None) or 0)


def store_job(job_id: str) -> AbstractContextManager[None]:
    """A live span around the API's writing of a new job."""
    return _Live(names.SPAN_STORE_JOB, {names.JOB_ID: job_id})


def fetch_result(job_id: str) -> AbstractContextManager[None]:
    """A live span around the API's reading of an ended job."""
    return _Live(names.SPAN_FETCH_RESULT, {names.JOB_ID: job_id})


def wait_result(job_id: str) -> AbstractContextManager[None]:
    """A live span around the API's wait for a job, so that the gap in the server span has a name."""
    return _Live(names.SPAN_WAIT_RESULT, {names.JOB_ID: job_id})


def store_result(job_id: str) -> AbstractContextManager[None]:
    """A live span around the worker's settle."""
    return _Live(names.SPAN_STORE_RESULT, {names.JOB_ID: job_id})


def give_back(job_id: str) -> AbstractContextManager[None]:
    """A live span around the worker's handing a job back to its queue."""
    return _Live(names.SPAN_GIVE_BACK, {names.JOB_ID: job_id})


def report(job_id: str) -> AbstractContextManager[None]:
    """A live span around what an attempt tells when its result is stored, this trace too."""
    return _Live(names.SPAN_REPORT, {names.JOB_ID: job_id})


@dataclass(slots=True)
class _Live:
    """Never the current span: ids that are told and messages that are sent inside belong to the request.

    An error that passes through is told by the request's own span; its words might quote a prompt.
    """

    name: str
    attributes: dict[str, AttributeValue]
    start_ns: int = 0
    """0 is when the block is entered."""
    context: Context | None = None

    def __enter__(self) -> None:
        self.context, self.start_ns = context_api.get_current(), self.start_ns or time.time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.context is not None, "entered"
        span = FinishedSpan(
            name=self.name, start_ns=self.start_ns, end_ns=time.time_ns(), attributes=self.attributes
        )
        draw(self.context, span)


def _draw_step(name: str, context: Context, job_id: str, start_ns: int, end_ns: int) -> None:
    attributes = {names.JOB_ID: job_id}
    draw(context, FinishedSpan(name=name, start_ns=start_ns, end_ns=end_ns, attributes=attributes))


def _add_link(span: Span, traceparent: str | None, role: str) -> None:
    if traceparent is None or not span.is_recording():
        return
    target = extract({"traceparent": traceparent})
    for link in link_to(target, role):
        span.add_link(link.context, link.attributes)
