from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from engine.outputs import Completion, RequestFailure, RequestOutput, Usage
from engine.stats import RequestPhases, StepStats
from jobs.memory_store import MemoryStore
from jobs.model import Failure, JobId, WorkerId, new_lease_token
from jobs.registry import queue_name
from jobs.states import JobState
from jobs.store import Claim, ClaimOutcome, LostAttempt, RenewOutcome, Settlement, SettleOutcome
from telemetry import metrics
from tests.support.job_factory import MODEL, NOW, completed, failed, new_job
from workers.attempts.holding import HeldJob, Holding
from workers.attempts.measure import WorkerMetrics
from workers.delivery import Delivery
from workers.engines.protocol import StepTally
from workers.errors import AttemptEnded

QUEUE = queue_name(MODEL, "interactive")
SHAPES = {shape.name: shape for shape in metrics.METRICS}


@dataclass
class Bench:
    metrics: WorkerMetrics
    reader: InMemoryMetricReader

    def points(self, name: str) -> list[Any]:
        """The data points of a metric; each keeps to the attributes that its shape allows."""
        data = self.reader.get_metrics_data()
        assert data is not None
        found = {
            metric.name: metric.data.data_points
            for scope in data.resource_metrics[0].scope_metrics
            for metric in scope.metrics
        }
        for told, points in found.items():
            for point in points:
                keys = set(point.attributes)
                assert set(SHAPES[told].required) <= keys
                assert keys <= {*SHAPES[told].required, *SHAPES[told].optional}
        return list(found.get(name, []))

    def attempts(self) -> dict[tuple[object, object], float]:
        return {
            (point.attributes[metrics.OUTCOME], point.attributes.get("error.type")): point.value
            for point in self.points(metrics.ATTEMPTS)
        }


@pytest.fixture
def bench() -> Bench:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    return Bench(WorkerMetrics(provider.get_meter("test"), MODEL), reader)


def delivery(*, published_seconds_ago: float = 10.0) -> Delivery:
    published = time.time_ns() - round(published_seconds_ago * 1e9)
    return Delivery(JobId("job_1"), QUEUE, published, False, Context())


def output(
    *, num_tokens: int = 5, failure: RequestFailure | None = None, has_first: bool = True
) -> RequestOutput:
    """Arrived 4 s ago, first token 2 s after, last one now; two sequences, the second of one token."""
    now = time.monotonic()
    phases = RequestPhases(now - 4, now - 2 if has_first else None, now, (), 0, 5, 1.0, 1)
    completions = tuple(
        Completion(index, "secret", tuple(range(length)), "length", None, None, None)
        for index, length in enumerate((num_tokens, 1))
    )
    return RequestOutput("r", completions, Usage(7, num_tokens + 1, 3), phases, failure)


def test_generation_is_timed_from_its_publishing(bench: Bench) -> None:
    bench.metrics.generated(delivery(published_seconds_ago=10), (output(),))

    (duration,) = bench.points(metrics.REQUEST_DURATION)
    (first,) = bench.points(metrics.TIME_TO_FIRST_TOKEN)
    (later,) = bench.points(metrics.TIME_PER_OUTPUT_TOKEN)
    assert duration.sum == pytest.approx(10, abs=0.5)
    assert first.sum == pytest.approx(8, abs=0.5)
    assert later.sum == pytest.approx(2 / 4)
    assert duration.attributes[metrics.PRIORITY] == "interactive"


def test_generation_is_timed_from_its_arrival_when_the_message_tells_no_time(bench: Bench) -> None:
    bench.metrics.generated(Delivery(JobId("job_1"), QUEUE, None, False, Context()), (output(),))

    (duration,) = bench.points(metrics.REQUEST_DURATION)
    (first,) = bench.points(metrics.TIME_TO_FIRST_TOKEN)
    assert duration.sum == pytest.approx(4)
    assert first.sum == pytest.approx(2)


def test_tokens_are_counted_once_for_each_prompt(bench: Bench) -> None:
    bench.metrics.generated(delivery(), (output(), output()))
    bench.metrics.settled(delivery(), completed(), SettleOutcome.SETTLED)

    totals = [
        bench.points(name)[0].value
        for name in (metrics.INPUT_TOKENS, metrics.OUTPUT_TOKENS, metrics.CACHED_TOKENS)
    ]
    assert totals == [14, 12, 6]


def test_failed_generation_has_a_duration_with_its_error_and_no_other_time(bench: Bench) -> None:
    bench.metrics.generated(
        delivery(), (output(failure=RequestFailure("structure_failed", "no", retryable=False)),)
    )

    (duration,) = bench.points(metrics.REQUEST_DURATION)
    assert duration.attributes["error.type"] == "structure_failed"
    assert bench.points(metrics.TIME_TO_FIRST_TOKEN) == []


def test_generation_of_one_token_has_no_time_between_tokens(bench: Bench) -> None:
    bench.metrics.generated(delivery(), (output(num_tokens=1),))

    assert bench.points(metrics.TIME_PER_OUTPUT_TOKEN) == []
    assert len(bench.points(metrics.TIME_TO_FIRST_TOKEN)) == 1


def test_job_that_ends_without_a_generation_is_timed_with_its_reason(bench: Bench) -> None:
    bench.metrics.settled(delivery(), failed("invalid_request"), SettleOutcome.SETTLED)
    bench.metrics.settled(delivery(), Settlement(JobState.EXPIRED), SettleOutcome.SETTLED)
    bench.metrics.settled(delivery(), Settlement(JobState.CANCELLED), SettleOutcome.SETTLED)

    reasons = {point.attributes["error.type"] for point in bench.points(metrics.REQUEST_DURATION)}
    assert reasons == {"invalid_request", "expired"}


def test_attempts_are_told_apart_by_outcome_and_reason(bench: Bench) -> None:
    told = delivery()
    bench.metrics.settled(told, completed(), SettleOutcome.SETTLED)
    bench.metrics.settled(told, completed(), SettleOutcome.CANCELLED)
    bench.metrics.settled(told, completed(), SettleOutcome.LOST)
    bench.metrics.settled(told, failed("engine_error"), SettleOutcome.SETTLED)
    bench.metrics.given_back(told, Failure(reason="engine_crashed", message="signal 9", retryable=True))
    bench.metrics.lease_lost(told)
    bench.metrics.dropped(told, Claim(ClaimOutcome.HELD))
    bench.metrics.claimed(told, Claim(ClaimOutcome.CLAIMED, 2, lost=LostAttempt(1, NOW)), time.time_ns())

    assert bench.attempts() == {
        ("completed", None): 1,
        ("cancelled", None): 1,
        ("refused", "lost"): 1,
        ("failed", "engine_error"): 1,
        ("given_back", "engine_crashed"): 1,
        ("lease_lost", "lease_lost"): 1,
        ("held", None): 1,
        ("lost", "worker_lost"): 1,
    }


def test_queue_wait_is_never_negative_when_clocks_disagree(bench: Bench) -> None:
    bench.metrics.claimed(delivery(published_seconds_ago=-5), Claim(ClaimOutcome.CLAIMED, 1), time.time_ns())

    (wait,) = bench.points(metrics.QUEUE_WAIT)
    assert wait.sum == 0


def test_priority_of_a_strange_queue_makes_no_series_of_its_own(bench: Bench) -> None:
    bench.metrics.republished("m.something")

    (point,) = bench.points(metrics.JOBS_REPUBLISHED)
    assert point.attributes == {metrics.MODEL: "m", metrics.PRIORITY: "other"}


def test_steps_become_durations_and_preemptions(bench: Bench) -> None:
    bench.metrics.stepped(StepTally((0.1, 0.2, 0.3), 2))

    (steps,) = bench.points(metrics.STEP_DURATION)
    assert (steps.count, steps.sum) == (3, pytest.approx(0.6))
    assert bench.points(metrics.PREEMPTIONS)[0].value == 2


def test_steps_count_the_tokens_run_ahead_and_those_that_were_kept(bench: Bench) -> None:
    bench.metrics.stepped(StepTally((0.1,), 0, num_proposed_tokens=7, num_accepted_tokens=5))

    assert bench.points(metrics.PROPOSED_TOKENS)[0].value == 7
    assert bench.points(metrics.ACCEPTED_TOKENS)[0].value == 5


def test_engine_gauges_show_the_last_step_and_nothing_before_the_first(bench: Bench) -> None:
    shown: list[StepStats] = []
    bench.metrics.watch_engine(lambda: shown[-1] if shown else None)
    bench.metrics.stepped(StepTally((0.1,), 0))
    assert bench.points(metrics.REQUESTS_RUNNING) == []

    shown.append(StepStats(0.0, 0.1, 3, 5, 2, 3, 4, 10, 64, 0, (), ()))

    names = (
        metrics.REQUESTS_RUNNING,
        metrics.REQUESTS_WAITING,
        metrics.BLOCKS_USED,
        metrics.BLOCKS_TOTAL,
    )
    assert [bench.points(name)[0].value for name in names] == [3, 4, 10, 64]


async def test_renewals_are_counted_by_what_the_store_said(bench: Bench) -> None:
    class Clock:
        def now(self) -> float:
            return NOW

    store, ended = MemoryStore(), list[AttemptEnded]()
    holding = Holding(
        store,
        WorkerId("w1"),
        Clock(),
        lease_seconds=9,
        renew_seconds=3,
        is_healthy=lambda: True,
        metrics=lambda: bench.metrics,
    )
    job = new_job()
    await store.create(job, max_open=10)
    token = new_lease_token()
    await store.claim(job.id, token, WorkerId("w1"), now=NOW, lease_seconds=9)
    kept = HeldJob(job.id, token, None, ended.append)
    gone = HeldJob(JobId("job_gone"), new_lease_token(), None, ended.append)

    with holding.hold(kept), holding.hold(gone):
        holding.renew()

    counted = {
        point.attributes[metrics.OUTCOME]: point.value for point in bench.points(metrics.LEASE_RENEWALS)
    }
    assert counted == {RenewOutcome.RENEWED.value: 1, RenewOutcome.LOST.value: 1}
