"""What a worker counts: facts of attempts, leases and the engine's steps as metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from opentelemetry.metrics import Meter, NoOpMeter, Observation

from engine.outputs import RequestOutput
from engine.stats import StepStats
from jobs.model import PRIORITIES, Failure
from jobs.states import JobState
from jobs.store import Claim, RenewOutcome, Settlement, SettleOutcome
from telemetry import metrics, names
from telemetry.series import Labelled, Series
from workers.attempts.result import failure_of
from workers.delivery import Delivery
from workers.engines.protocol import Outcome, Refused, StepTally

Attributes = Mapping[str, str]

Served = tuple[str, str | None]
"""A queue, and the reason of what failed."""


class WorkerMetrics:
    """Safe from any thread; recording neither blocks nor raises."""

    def __init__(self, meter: Meter, model: str) -> None:
        self._meter = meter
        self._model = {metrics.MODEL: model}
        self._generation = {
            names.GEN_AI_OPERATION_NAME: names.OPERATION_TEXT_COMPLETION,
            names.GEN_AI_PROVIDER_NAME: names.PROVIDER,
            metrics.MODEL: model,
        }
        made = self._generation | {metrics.MODALITY: "text"}
        self._request_duration = Labelled(metrics.histogram(meter, metrics.REQUEST_DURATION), self._served)
        self._time_to_first_token = Labelled(
            metrics.histogram(meter, metrics.TIME_TO_FIRST_TOKEN), self._served
        )
        self._time_per_output_token = Labelled(
            metrics.histogram(meter, metrics.TIME_PER_OUTPUT_TOKEN), self._served
        )
        self._input_tokens = Series(metrics.counter(meter, metrics.INPUT_TOKENS), made)
        self._output_tokens = Series(metrics.counter(meter, metrics.OUTPUT_TOKENS), made)
        self._cached_tokens = Series(metrics.counter(meter, metrics.CACHED_TOKENS), made)
        self._queue_wait = Labelled(metrics.histogram(meter, metrics.QUEUE_WAIT), queue_attributes)
        self._attempts = Labelled(metrics.counter(meter, metrics.ATTEMPTS), _attempt_attributes)
        self._renewals = metrics.counter(meter, metrics.LEASE_RENEWALS)
        self._republished = metrics.counter(meter, metrics.JOBS_REPUBLISHED)
        self._step_duration = Series(metrics.histogram(meter, metrics.STEP_DURATION), self._model)
        self._preemptions = Series(metrics.counter(meter, metrics.PREEMPTIONS), self._model)
        self._proposed_tokens = Series(metrics.counter(meter, metrics.PROPOSED_TOKENS), self._model)
        self._accepted_tokens = Series(metrics.counter(meter, metrics.ACCEPTED_TOKENS), self._model)

    def claimed(self, delivery: Delivery, claim: Claim, received_at_ns: int) -> None:
        self._count_lost(delivery, claim)
        if delivery.enqueued_at_ns is not None:
            published_at_ns = max(delivery.enqueued_at_ns, round((claim.published_at or 0.0) * 1e9))
            waited = max(0.0, (received_at_ns - published_at_ns) / 1e9)
            self._queue_wait[delivery.queue].add(waited)

    def dropped(self, delivery: Delivery, claim: Claim) -> None:
        self._count_lost(delivery, claim)
        self._count_attempt(delivery, claim.outcome.value)

    def generated(self, delivery: Delivery, outcomes: Iterable[Outcome]) -> None:
        """Once for each prompt, whatever becomes of its result: the tokens were made."""
        for outcome in outcomes:
            if isinstance(outcome, Refused):
                self._record_error(delivery, time.monotonic(), outcome.reason)
                continue
            self._count_tokens(outcome)
            self._record_times(delivery, outcome)

    def settled(self, delivery: Delivery, settlement: Settlement, outcome: SettleOutcome) -> None:
        if outcome not in (SettleOutcome.SETTLED, SettleOutcome.CANCELLED):
            self._count_attempt(delivery, "refused", outcome.value)
            return
        state = JobState.CANCELLED if outcome is SettleOutcome.CANCELLED else settlement.state
        reason = settlement.failure.reason if state is JobState.FAILED and settlement.failure else None
        self._count_attempt(delivery, state.value, reason)
        has_generated = settlement.timings is not None or settlement.result is not None
        if not has_generated and state in (JobState.FAILED, JobState.EXPIRED):
            self._record_error(delivery, time.monotonic(), reason or state.value)

    def given_back(self, delivery: Delivery, failure: Failure) -> None:
        self._count_attempt(delivery, "given_back", failure.reason)

    def lease_lost(self, delivery: Delivery) -> None:
        self._count_attempt(delivery, "lease_lost", "lease_lost")

    def renewed(self, outcomes: Iterable[RenewOutcome]) -> None:
        for outcome in outcomes:
            self._renewals.add(1, self._model | {metrics.OUTCOME: outcome.value})

    def not_renewed(self, num_held: int) -> None:
        self._renewals.add(num_held, self._model | {metrics.OUTCOME: "unavailable"})

    def republished(self, queue: str) -> None:
        self._republished.add(1, queue_attributes(queue))

    def stepped(self, tally: StepTally) -> None:
        for seconds in tally.durations_seconds:
            self._step_duration.add(seconds)
        self._preemptions.add(tally.num_preempted)
        self._proposed_tokens.add(tally.num_proposed_tokens)
        self._accepted_tokens.add(tally.num_accepted_tokens)

    def watch_engine(self, last_stats: Callable[[], StepStats | None]) -> None:
        """Show the state after the step told of last; nothing before the first."""
        shown: dict[str, Callable[[StepStats], int]] = {
            metrics.REQUESTS_RUNNING: lambda stats: stats.num_running,
            metrics.REQUESTS_WAITING: lambda stats: stats.num_waiting,
            metrics.BLOCKS_USED: lambda stats: stats.num_blocks_used,
            metrics.BLOCKS_TOTAL: lambda stats: stats.num_blocks_total,
        }
        for name, value in shown.items():
            metrics.watch(self._meter, name, self._reading(last_stats, value))

    def _reading(
        self, last_stats: Callable[[], StepStats | None], value: Callable[[StepStats], int]
    ) -> metrics.Read:
        def read() -> Iterable[Observation]:
            stats = last_stats()
            return () if stats is None else (Observation(value(stats), self._model),)

        return read

    def _count_tokens(self, output: RequestOutput) -> None:
        self._input_tokens.add(output.usage.prompt_tokens)
        self._output_tokens.add(output.usage.completion_tokens)
        self._cached_tokens.add(output.usage.cached_tokens)

    def _record_times(self, delivery: Delivery, output: RequestOutput) -> None:
        served, phases = (delivery.queue, None), output.phases
        if (failure := failure_of(output)) is not None:
            self._record_error(delivery, phases.finished_at, failure.reason)
            return
        duration = _since_publishing(delivery, phases.finished_at, phases.arrived_at)
        self._request_duration[served].add(duration)
        if phases.first_token_at is None:
            return
        first = _since_publishing(delivery, phases.first_token_at, phases.arrived_at)
        self._time_to_first_token[served].add(first)
        # The sequences of one request decode side by side: the longest one sets the pace.
        num_later_tokens = max(len(completion.token_ids) for completion in output.completions) - 1
        if num_later_tokens > 0:
            seconds = phases.finished_at - phases.first_token_at
            self._time_per_output_token[served].add(seconds / num_later_tokens)

    def _record_error(self, delivery: Delivery, at: float, reason: str) -> None:
        self._request_duration[delivery.queue, reason].add(_since_publishing(delivery, at))

    def _served(self, served: Served) -> Attributes:
        queue, reason = served
        attributes = self._generation | {metrics.PRIORITY: _priority(queue)}
        return attributes if reason is None else attributes | {names.ERROR_TYPE: reason}

    def _count_lost(self, delivery: Delivery, claim: Claim) -> None:
        """The attempt before, whose worker can count nothing any more."""
        if claim.lost is not None:
            self._count_attempt(delivery, "lost", "worker_lost")

    def _count_attempt(self, delivery: Delivery, outcome: str, error_type: str | None = None) -> None:
        self._attempts[delivery.queue, outcome, error_type].add(1)


def queue_attributes(queue: str) -> dict[str, str]:
    """Model and priority, from a queue's name (`jobs.registry.queue_name`)."""
    return {metrics.MODEL: queue.rpartition(".")[0], metrics.PRIORITY: _priority(queue)}


def _attempt_attributes(attempt: tuple[str, str, str | None]) -> Attributes:
    """Of a queue, an outcome, and the reason of what failed."""
    queue, outcome, reason = attempt
    attributes = queue_attributes(queue) | {metrics.OUTCOME: outcome}
    return attributes if reason is None else attributes | {names.ERROR_TYPE: reason}


def _priority(queue: str) -> str:
    priority = queue.rpartition(".")[2]
    return priority if priority in PRIORITIES else "other"


def _since_publishing(delivery: Delivery, until: float, arrived_at: float | None = None) -> float:
    """Seconds to a stamp of the monotonic clock; from the arrival where the message tells no time."""
    if delivery.enqueued_at_ns is None:
        return 0.0 if arrived_at is None else until - arrived_at
    seconds_ago = time.monotonic() - until
    return max(0.0, (time.time_ns() - delivery.enqueued_at_ns) / 1e9 - seconds_ago)


SILENT = WorkerMetrics(NoOpMeter(metrics.METER), "")
"""Counts nothing; for parts that are tried by themselves."""
