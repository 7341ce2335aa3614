from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import pytest
from opentelemetry.context import Context

from engine.outputs import Completion, RequestOutput, Usage
from engine.stats import PhaseInterval, RequestPhases, StepStats
from jobs.memory_store import MemoryStore
from jobs.model import JobId, WorkerId
from jobs.states import JobState
from tests.support.job_factory import NOW, new_job
from workers.attempts.attempt import AttemptRunner, Verdict, sampling_params
from workers.attempts.holding import Holding
from workers.attempts.observe import AttemptObserver
from workers.attempts.pause import RetryPause
from workers.delivery import Delivery
from workers.engines.protocol import EngineRequest, ModelFacts
from workers.engines.runtime import Generation
from workers.errors import EngineLost

WORKER = WorkerId("w1")


@dataclass
class ScriptedRuntime:
    """Answers at once with what the test wrote; the real engine is proved elsewhere."""

    error: Exception | None = None
    finish_reason: str = "length"
    aborted: list[Generation] = field(default_factory=list)

    def start(self) -> ModelFacts:
        raise NotImplementedError

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        future: Future[tuple[RequestOutput, ...]] = Future()
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(tuple(self._output(request) for request in requests))
        return Generation(tuple(request.id for request in requests), future)

    def _output(self, request: EngineRequest) -> RequestOutput:
        phases = RequestPhases(1.0, 1.5, 2.0, (PhaseInterval("decode", 1.0, 2.0),), 0, 1, 1.0, 1)
        completion = Completion(0, "out", (1,), self.finish_reason, None, None, None)  # type: ignore[arg-type]
        return RequestOutput(request.id, (completion,), Usage(3, 1, 0), phases)

    def abort(self, generation: Generation) -> None:
        self.aborted.append(generation)

    def is_healthy(self) -> bool:
        return True

    def last_stats(self) -> StepStats | None:
        return None

    def stop(self) -> None:
        return None


class FixedClock:
    def now(self) -> float:
        return NOW + 1


@dataclass
class Bench:
    store: MemoryStore
    runtime: ScriptedRuntime
    runner: AttemptRunner

    async def run(self, **job: object) -> tuple[Verdict, JobId]:
        new = new_job(**job)
        await self.store.create(new, max_open=10)
        return self.runner.run(Delivery(new.id, new.queue, None, False, Context())), new.id

    async def state(self, id: JobId) -> tuple[JobState, str | None]:
        job = await self.store.get(id)
        assert job is not None
        return job.state, job.failure.reason if job.failure else None


@pytest.fixture
def bench() -> Bench:
    store, runtime, clock = MemoryStore(), ScriptedRuntime(), FixedClock()
    holding = Holding(store, WORKER, clock, lease_seconds=9, renew_seconds=3, is_healthy=lambda: True)
    runner = AttemptRunner(
        store=store,
        runtime=runtime,
        holding=holding,
        observer=AttemptObserver("test-model"),
        clock=clock,
        worker=WORKER,
        lease_seconds=9,
        is_stopping=threading.Event(),
        pause=RetryPause(first_seconds=8, spread=lambda: 1.0),
    )
    return Bench(store, runtime, runner)


async def test_attempt_stores_the_engines_output(bench: Bench) -> None:
    verdict, id = await bench.run()

    job = await bench.store.get(id, with_result=True)
    assert verdict is Verdict.ACKNOWLEDGE
    assert job is not None
    assert job.result is not None
    assert job.result.items[0].choices[0].text == "out"


async def test_attempt_gives_the_job_back_when_the_engine_dies(bench: Bench) -> None:
    bench.runtime.error = EngineLost("engine_crashed", "signal 9")

    verdict, id = await bench.run()

    assert verdict is Verdict.REQUEUE
    assert await bench.state(id) == (JobState.QUEUED, "engine_crashed")


async def test_attempt_gives_the_job_back_when_our_own_code_fails(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.runtime.finish_reason = "abort"  # no result can be made of it

    verdict, id = await bench.run()

    assert verdict is Verdict.ACKNOWLEDGE, "the store has the message, until the retry's time"
    assert await bench.state(id) == (JobState.QUEUED, "internal_error")
    assert "ValueError" in caplog.text


async def test_failed_job_waits_before_its_retry_and_a_forgiven_one_does_not(bench: Bench) -> None:
    bench.runtime.error = EngineLost("engine_crashed", "signal 9")
    _, forgiven = await bench.run()
    bench.runtime.error, bench.runtime.finish_reason = None, "abort"
    _, failed = await bench.run()

    waiting = [await bench.store.get(id) for id in (forgiven, failed)]

    assert [job.next_attempt_at for job in waiting if job] == [None, NOW + 1 + 8.0]


async def test_failed_job_is_repeated_at_once_when_pauses_are_off(bench: Bench) -> None:
    bench.runtime.finish_reason = "abort"
    bench.runner = replace(bench.runner, pause=RetryPause(first_seconds=0))

    verdict, id = await bench.run()

    assert verdict is Verdict.REQUEUE
    assert (await bench.store.get(id)).next_attempt_at is None  # type: ignore[union-attr]


def test_retry_pause_doubles_up_to_its_limit_and_spreads_over_its_upper_half() -> None:
    shortest = RetryPause(2, 30, spread=lambda: 0.0)
    longest = RetryPause(2, 30, spread=lambda: 1.0)

    assert [longest.seconds_after(number) for number in (1, 2, 3, 4, 5, 10_000)] == [2, 4, 8, 16, 30, 30]
    assert [shortest.seconds_after(number) for number in (1, 2, 3)] == [1, 2, 4]


async def test_attempt_fails_the_job_when_its_parameters_break_a_rule(bench: Bench) -> None:
    request = new_job().request.model_copy(update={"sampling": {"top_p": 7.0}})

    verdict, id = await bench.run(request=request)

    assert verdict is Verdict.ACKNOWLEDGE
    assert await bench.state(id) == (JobState.FAILED, "invalid_request")


async def test_message_of_a_cancelled_job_is_acknowledged_without_a_run(bench: Bench) -> None:
    new = new_job()
    await bench.store.create(new, max_open=10)
    await bench.store.cancel(new.id, now=NOW)

    verdict = bench.runner.run(Delivery(new.id, new.queue, None, True, Context()))

    assert verdict is Verdict.ACKNOWLEDGE
    assert await bench.state(new.id) == (JobState.CANCELLED, None)


def test_sampling_parameters_are_read_back_from_json() -> None:
    params = sampling_params({"stop": ["a", "b"], "logit_bias": {"5": 1}, "max_tokens": 3})

    assert params.stop == ("a", "b")
    assert params.logit_bias == {5: 1.0}
