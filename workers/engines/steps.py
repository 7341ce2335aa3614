"""Engine steps as spans: who is inside the engine, and which step let each of them in.

    attempt ──enter──▶ StepTracer ◀──progressed── reader thread: draws; only then futures resolve
         └────────────── draws the request's prefill, linked to the step that admitted it ◀──┘

A request is known from before the engine may see it until the engine says that it is gone, so that a step
can link to it even when its job was cancelled and its attempt is over.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.trace import SpanContext, Tracer

from engine.stats import StepStats
from telemetry import steps
from telemetry.spans import wall_ns
from workers.engines.protocol import EngineRequest, Progress, StepSampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request, for the time that the engine has it.

    Attributes:
        span: What steps link to: the attempt's process span.
        admitted_by: The drawn steps that admitted it, by the stamp of their start, which is to the bit the
            start of the prefill that followed.
    """

    span: SpanContext
    admitted_by: dict[float, SpanContext] = field(default_factory=dict)


class StepTracer:
    """Draws the steps that the engine tells of. Safe from any thread.

    Holds nothing and does nothing where `sampling` is None.
    """

    def __init__(self, sampling: StepSampling | None, tracer: Tracer | None = None) -> None:
        self.sampling = sampling
        self._tracer = tracer
        self._lock = threading.Lock()
        self._inside: dict[str, TracedRequest] = {}

    def enter(self, requests: Iterable[EngineRequest]) -> Mapping[str, TracedRequest]:
        """Steps will link these requests to the current span; to be called before the engine sees them."""
        if self.sampling is None:
            return {}
        span = trace.get_current_span().get_span_context()
        traced = {request.id: TracedRequest(span) for request in requests}
        with self._lock:
            self._inside.update(traced)
        return traced

    def progressed(self, progress: Progress) -> None:
        """Draw the steps, then forget who is gone; to be called before any of its futures resolves."""
        if self.sampling is None:
            return
        try:
            for stats in progress.steps:
                self._draw(stats, is_slow=self.sampling.is_slow(stats.duration_seconds))
        except Exception:  # a provider of somebody else's; the futures that wait for this thread must resolve
            logger.exception("engine steps were not drawn")
        self.leave(output.request_id for output in progress.finished)
        self.leave(refusal.request_id for refusal in progress.refused)

    def leave(self, request_ids: Iterable[str]) -> None:
        with self._lock:
            for id in request_ids:
                self._inside.pop(id, None)

    def leave_all(self) -> None:
        """The engine is lost, and what it had with it."""
        with self._lock:
            self._inside.clear()

    def __len__(self) -> int:
        """Requests inside the engine."""
        return len(self._inside)

    def _draw(self, stats: StepStats, *, is_slow: bool) -> None:
        if self._is_unwanted():
            return
        joined, left = self._find(stats.joined), self._find(stats.left)
        span = steps.step(
            _record(stats, is_slow=is_slow),
            joined=[request.span for request in joined],
            left=[request.span for request in left],
            tracer=self._tracer,
        )
        if span.trace_flags.sampled:
            for request in joined:
                request.admitted_by[stats.started_at] = span

    def _is_unwanted(self) -> bool:
        """Whether all that are inside were left out by head sampling, which leaves out their steps too."""
        with self._lock:
            spans = (request.span for request in self._inside.values())
            is_left_out = all(span.is_valid and not span.trace_flags.sampled for span in spans)
            return is_left_out and bool(self._inside)

    def _find(self, request_ids: Iterable[str]) -> list[TracedRequest]:
        with self._lock:
            return [self._inside[id] for id in request_ids if id in self._inside]


UNTRACED = StepTracer(None)


def _record(stats: StepStats, *, is_slow: bool) -> steps.StepRecord:
    return steps.StepRecord(
        started_at_ns=wall_ns(stats.started_at),
        ended_at_ns=wall_ns(stats.started_at + stats.duration_seconds),
        batch_size=stats.batch_size,
        num_prefill_tokens=stats.num_prefill_tokens,
        num_decode_tokens=stats.num_decode_tokens,
        num_blocks_used=stats.num_blocks_used,
        num_blocks_total=stats.num_blocks_total,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_preempted=stats.num_preempted,
        num_joined=len(stats.joined),
        num_left=len(stats.left),
        is_slow=is_slow,
    )
