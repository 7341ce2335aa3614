"""What an attempt tells the trace and the log; never a prompt or an output."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext

from engine.outputs import RequestOutput
from engine.sampling import SamplingParams
from engine.stats import RequestPhases
from jobs.model import Failure, JobId, JobRequest
from jobs.states import JobState
from jobs.store import Claim, ClaimOutcome, Settlement, SettleOutcome
from telemetry import spans
from telemetry.generation import GenerationRecord, Phase, generation, generation_apart
from workers.attempts.measure import SILENT, WorkerMetrics
from workers.attempts.result import failure_of
from workers.delivery import Delivery
from workers.engines.protocol import Outcome, Refused
from workers.engines.steps import TracedRequest
from workers.settings import DEFAULT_ITEM_SPANS

logger = logging.getLogger(__name__)

_LEASE_LOST: Final = "lease_lost"
_DROPPED_AS = {
    ClaimOutcome.CANCELLED: JobState.CANCELLED,
    ClaimOutcome.EXPIRED: JobState.EXPIRED,
    ClaimOutcome.EXHAUSTED: JobState.FAILED,
}


@dataclass(slots=True)
class HandOver:
    """When a job asked to enter the engine, and when its outputs had come back: Unix nanoseconds."""

    asked_at_ns: int
    received_at_ns: int


@dataclass(slots=True)
class _EngineTimes:
    """One request's time in the engine, its wait at the door included."""

    started_at_ns: int
    ended_at_ns: int
    phases: tuple[Phase, ...]
    to_first_token_seconds: float | None


@dataclass(frozen=True, slots=True)
class AttemptObserver:
    """Called where the task runs, inside its `process` span. Drawing spans must never fail a job."""

    model: str
    captures_content: bool = False
    metrics: WorkerMetrics = SILENT
    max_item_spans: int = DEFAULT_ITEM_SPANS
    """Generations of one job in its own trace; those beyond are traces of their own, linked to it."""
    uses_vllm_keys: bool = False
    """Generations carry what dashboards made for vLLM read, beside today's keys."""
    uses_links_only: bool = False
    """All that is drawn here lies in the trace of its attempt, and nothing in that of the request."""

    def is_over(self, delivery: Delivery, claim: Claim, received_at_ns: int, claimed_at_ns: int) -> None:
        """The claim's span is drawn when the attempt is over: see `spans.claim`.

        So is the wait's where it lies below the attempt's.
        """
        if self.uses_links_only and claim.outcome is ClaimOutcome.CLAIMED:
            self._waited(otel_context.get_current(), delivery, claim, received_at_ns)
        spans.claim(
            otel_context.get_current(),
            job_id=delivery.id,
            started_at_ns=received_at_ns,
            ended_at_ns=claimed_at_ns,
        )

    def claimed(self, delivery: Delivery, claim: Claim, received_at_ns: int) -> None:
        self.metrics.claimed(delivery, claim, received_at_ns)
        since_ns = _in_queue_since_ns(delivery, claim)
        if not self.uses_links_only:
            self._waited(delivery.creation, delivery, claim, received_at_ns)
        spans.mark_attempt(
            job_id=delivery.id,
            attempt=claim.attempt,
            is_redelivered=delivery.is_redelivered,
            queue_wait_seconds=None if since_ns is None else (received_at_ns - since_ns) / 1e9,
            previous_traceparent=self._lost(delivery, claim, received_at_ns) or claim.previous_traceparent,
        )

    def interrupted(self, delivery: Delivery, asked_at_ns: int) -> None:
        """The time in the engine, or at its door, of a job that leaves it without an output has a span."""
        spans.interrupted(
            otel_context.get_current(),
            job_id=delivery.id,
            started_at_ns=asked_at_ns,
            ended_at_ns=time.time_ns(),
        )

    def dropped(self, delivery: Delivery, claim: Claim, received_at_ns: int) -> None:
        self._lost(delivery, claim, received_at_ns)
        if claim.ended_in_queue:  # its wait is all that there was of it
            above = otel_context.get_current() if self.uses_links_only else delivery.creation
            self._waited(above, delivery, claim, received_at_ns)
        self.metrics.dropped(delivery, claim)
        outcome = claim.outcome
        state = claim.ended_as or _DROPPED_AS.get(outcome)
        error = "worker_lost" if state is JobState.FAILED and outcome is ClaimOutcome.EXHAUSTED else None
        spans.mark_outcome(state.value if state else outcome.value, error_type=error)
        logger.info("message dropped: %s", outcome.value)

    def generated(
        self,
        delivery: Delivery,
        request: JobRequest,
        params: SamplingParams,
        outcomes: Mapping[int, Outcome],
        hand_over: HandOver,
        traced: Mapping[str, TracedRequest] = MappingProxyType({}),
    ) -> None:
        """Of the prompts that this attempt ran, by their place in the request.

        `traced` is the generation's; it links each prefill to the drawn step that admitted its request.
        """
        self.metrics.generated(delivery, outcomes.values())
        current = otel_context.get_current()
        wall_ns = spans.wall_clock()
        ends = [o.phases.finished_at for o in outcomes.values() if isinstance(o, RequestOutput)]
        last_ns = wall_ns(max(ends)) if ends else hand_over.received_at_ns
        spans.receive_output(
            current, job_id=delivery.id, started_at_ns=last_ns, ended_at_ns=hand_over.received_at_ns
        )
        for index, outcome in sorted(outcomes.items()):
            prompt = request.prompts[index].text if self.captures_content else None
            if isinstance(outcome, RequestOutput):
                step = traced.get(outcome.request_id)
                times = _engine_times(outcome.phases, hand_over.asked_at_ns, wall_ns, step)
                record = self._record(delivery, params, outcome, prompt, times)
            else:
                record = self._refused_record(delivery, params, outcome, hand_over)
            if len(request.prompts) > 1:
                record = replace(record, item_index=index)
            if index < self.max_item_spans:
                generation(
                    current,
                    record,
                    capture_content=self.captures_content,
                    uses_vllm_keys=self.uses_vllm_keys,
                )
            else:
                generation_apart(
                    delivery.creation,
                    current,
                    record,
                    capture_content=self.captures_content,
                    uses_vllm_keys=self.uses_vllm_keys,
                )

    def settling(self, delivery: Delivery) -> AbstractContextManager[object]:
        return spans.store_result(delivery.id)

    def reporting(self, delivery: Delivery) -> AbstractContextManager[None]:
        return spans.report(delivery.id)

    def settled(self, delivery: Delivery, settlement: Settlement, outcome: SettleOutcome) -> None:
        self.metrics.settled(delivery, settlement, outcome)
        if outcome not in (SettleOutcome.SETTLED, SettleOutcome.CANCELLED):
            _mark_lease_lost()
            return
        state = JobState.CANCELLED if outcome is SettleOutcome.CANCELLED else settlement.state
        error = settlement.failure.reason if state is JobState.FAILED and settlement.failure else None
        spans.mark_outcome(state.value, error_type=error)
        logger.info("job %s%s", state.value, f": {error}" if error else "")

    def giving_back(self, id: JobId) -> AbstractContextManager[None]:
        return spans.give_back(id)

    def given_back(self, delivery: Delivery, failure: Failure) -> None:
        self.metrics.given_back(delivery, failure)
        spans.mark_outcome(JobState.QUEUED.value, error_type=failure.reason)
        logger.warning("job given back: %s", failure.message)

    def handed_back(self, outcome: SettleOutcome | None) -> None:
        """The worker stops. What the store did not do, or not as asked, is not told as done."""
        if outcome is SettleOutcome.SETTLED:
            spans.mark_handed_back(JobState.QUEUED.value)
        elif outcome is SettleOutcome.CANCELLED:
            spans.mark_outcome(JobState.CANCELLED.value)

    def lease_lost(self, delivery: Delivery) -> None:
        self.metrics.lease_lost(delivery)
        _mark_lease_lost()

    def _lost(self, delivery: Delivery, claim: Claim, received_at_ns: int) -> str | None:
        """Draw the attempt before where its worker cannot any more; the traceparent to link to."""
        if claim.lost is None:
            return None
        logger.warning("attempt %d was lost with its worker", claim.lost.attempt)
        started_at_ns = round(claim.lost.started_at * 1e9)
        lost = spans.lost_attempt(
            delivery.creation,
            queue=delivery.queue,
            job_id=delivery.id,
            attempt=claim.lost.attempt,
            started_at_ns=started_at_ns,
            ended_at_ns=received_at_ns,
            is_root=self.uses_links_only,
        )
        if self.uses_links_only:  # else it drew its wait itself, and that has come
            self._draw_wait(lost, delivery, claim, started_at_ns)
        return spans.traceparent(lost)

    def _waited(self, context: Context, delivery: Delivery, claim: Claim, received_at_ns: int) -> None:
        if claim.lost is None:  # else the lost attempt's span lasts until now
            self._draw_wait(context, delivery, claim, received_at_ns)

    def _draw_wait(self, context: Context, delivery: Delivery, claim: Claim, until_ns: int) -> None:
        """In the queue, and before it where the job had to wait for its time."""
        since_ns, delayed_since_ns = _queued_at_ns(delivery, claim), _given_at_ns(delivery, claim)
        if since_ns is None or delayed_since_ns is None:
            return
        if delayed_since_ns < since_ns:
            spans.delay(
                context,
                queue=delivery.queue,
                job_id=delivery.id,
                started_at_ns=delayed_since_ns,
                ended_at_ns=since_ns,
            )
        spans.queue_wait(
            context,
            queue=delivery.queue,
            job_id=delivery.id,
            enqueued_at_ns=since_ns,
            started_at_ns=until_ns,
        )

    def _record(
        self,
        delivery: Delivery,
        params: SamplingParams,
        output: RequestOutput,
        prompt: str | None,
        times: _EngineTimes,
    ) -> GenerationRecord:
        phases, failure = output.phases, failure_of(output)
        reasons = (completion.finish_reason for completion in output.completions)
        return GenerationRecord(
            model=self.model,
            response_id=f"cmpl-{delivery.id}",
            job_id=delivery.id,
            started_at_ns=times.started_at_ns,
            ended_at_ns=times.ended_at_ns,
            finish_reasons=("error",) * params.n if failure else tuple(reasons),
            input_tokens=output.usage.prompt_tokens,
            output_tokens=output.usage.completion_tokens,
            cached_tokens=output.usage.cached_tokens,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or None,
            seed=params.seed,
            frequency_penalty=params.frequency_penalty or None,
            presence_penalty=params.presence_penalty or None,
            stop_sequences=params.stop,
            choice_count=params.n,
            uses_beam_search=params.use_beam_search,
            phases=times.phases,
            time_to_first_token_seconds=times.to_first_token_seconds,
            mean_batch_size=phases.mean_batch_size,
            max_batch_size=phases.max_batch_size,
            num_steps=phases.num_steps,
            num_preemptions=phases.num_preemptions,
            num_proposed_tokens=phases.num_proposed_tokens,
            num_accepted_tokens=phases.num_accepted_tokens,
            error_type=failure.reason if failure else None,
            prompts=(prompt,) if prompt is not None else (),
            outputs=tuple(c.text for c in output.completions) if self.captures_content else (),
        )

    def _refused_record(
        self, delivery: Delivery, params: SamplingParams, refusal: Refused, hand_over: HandOver
    ) -> GenerationRecord:
        """The engine stamps nothing of what it does not take."""
        return GenerationRecord(
            model=self.model,
            response_id=f"cmpl-{delivery.id}",
            job_id=delivery.id,
            started_at_ns=hand_over.asked_at_ns,
            ended_at_ns=hand_over.received_at_ns,
            finish_reasons=("error",) * params.n,
            input_tokens=0,
            output_tokens=0,
            choice_count=params.n,
            error_type=refusal.reason,
        )


def _mark_lease_lost() -> None:
    spans.mark_outcome(_LEASE_LOST, error_type=_LEASE_LOST)
    logger.warning("lease lost; the result is dropped")


def _in_queue_since_ns(delivery: Delivery, claim: Claim) -> int | None:
    """None after a lost attempt, whose span lasts until now."""
    return None if claim.lost is not None else _queued_at_ns(delivery, claim)


def _queued_at_ns(delivery: Delivery, claim: Claim) -> int | None:
    """Given to the queue, or put there when its time had come."""
    given_at_ns = _given_at_ns(delivery, claim)
    if given_at_ns is None or claim.published_at is None:
        return given_at_ns
    return max(given_at_ns, round(claim.published_at * 1e9))


def _given_at_ns(delivery: Delivery, claim: Claim) -> int | None:
    """By its client, or last by an attempt."""
    return delivery.enqueued_at_ns if claim.released_at is None else round(claim.released_at * 1e9)


def _engine_times(
    phases: RequestPhases, asked_at_ns: int, wall_ns: Callable[[float], int], traced: TracedRequest | None
) -> _EngineTimes:
    """The engine stamps a request when it looks up from the step it is in; its wait began before."""
    arrived_at_ns = wall_ns(phases.arrived_at)
    started_at_ns = min(asked_at_ns, arrived_at_ns)
    earlier_seconds = (arrived_at_ns - started_at_ns) / 1e9
    first = phases.first_token_at
    return _EngineTimes(
        started_at_ns,
        wall_ns(phases.finished_at),
        _phases(phases, started_at_ns, wall_ns, traced.admitted_by if traced else {}),
        None if first is None else first - phases.arrived_at + earlier_seconds,
    )


def _phases(
    phases: RequestPhases,
    started_at_ns: int,
    wall_ns: Callable[[float], int],
    admitted_by: Mapping[float, SpanContext],
) -> tuple[Phase, ...]:
    return tuple(
        Phase(
            name=interval.name,
            start_ns=started_at_ns if index == 0 else wall_ns(interval.start),
            end_ns=wall_ns(interval.end),
            step=admitted_by.get(interval.start) if interval.name == "prefill" else None,
        )
        for index, interval in enumerate(phases.intervals)
    )
