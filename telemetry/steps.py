"""The span of one engine step: a root of its own, linked to the requests that joined or left in it.

A step is shared by all that it runs, so it lies below none of them; and who stays in the batch is not told,
for each further link costs as much as a span's attributes, and an SDK keeps 128 and drops the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Tracer
from opentelemetry.util.types import AttributeValue

from telemetry import names
from telemetry.drawing import FinishedSpan, draw

MAX_LINKS: Final = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """All that is told of one step.

    Attributes:
        started_at_ns, ended_at_ns: Wall-clock nanoseconds since 1970.
        batch_size: Sequences run in it.
        num_running, num_waiting, num_blocks_used: After it; requests, and blocks of the KV cache.
        num_joined: Requests admitted in it, again after a preemption.
        num_left: Requests that finished or were aborted.
        is_slow: It took longer than the operator's threshold.
    """

    started_at_ns: int
    ended_at_ns: int
    batch_size: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_blocks_used: int
    num_blocks_total: int
    num_running: int
    num_waiting: int
    num_preempted: int
    num_joined: int
    num_left: int
    is_slow: bool = False


def step(
    record: StepRecord,
    *,
    joined: Iterable[SpanContext],
    left: Iterable[SpanContext],
    tracer: Tracer | None = None,
) -> SpanContext:
    """Draw `engine.step` as the root of a trace of its own; returned is its context, for prefills to link to.

    Requests of one span share a link, and one whose span is not sampled has none: it would lead nowhere.
    Beyond MAX_LINKS the last ones are left out and counted.
    """
    links = _links(joined, left)
    span = FinishedSpan(
        name=names.SPAN_ENGINE_STEP,
        start_ns=record.started_at_ns,
        end_ns=record.ended_at_ns,
        attributes=_attributes(record, num_omitted=max(0, len(links) - MAX_LINKS)),
        links=links[:MAX_LINKS],
    )
    return draw(Context(), span, tracer)


def _links(joined: Iterable[SpanContext], left: Iterable[SpanContext]) -> list[Link]:
    targets = [(span, names.LINK_JOINED) for span in joined] + [(span, names.LINK_LEFT) for span in left]
    links = {
        (span.trace_id, span.span_id, role): Link(span, {names.LINK_ROLE: role})
        for span, role in targets
        if span.is_valid and span.trace_flags.sampled
    }
    return list(links.values())


def _attributes(record: StepRecord, *, num_omitted: int) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        names.STEP_BATCH_SIZE: record.batch_size,
        names.STEP_PREFILL_TOKENS: record.num_prefill_tokens,
        names.STEP_DECODE_TOKENS: record.num_decode_tokens,
        names.STEP_BLOCKS_USED: record.num_blocks_used,
        names.STEP_BLOCKS_TOTAL: record.num_blocks_total,
        names.STEP_RUNNING: record.num_running,
        names.STEP_WAITING: record.num_waiting,
        names.STEP_PREEMPTED: record.num_preempted,
        names.STEP_JOINED: record.num_joined,
        names.STEP_LEFT: record.num_left,
    }
    if record.is_slow:
        attributes[names.STEP_SLOW] = True
    if num_omitted:
        attributes[names.STEP_LINKS_OMITTED] = num_omitted
    return attributes
