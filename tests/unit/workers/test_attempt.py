from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from opentelemetry.context import Context

from engine.outputs import Completion, FinishReason, RequestFailure, RequestOutput, Usage
from engine.stats import PhaseInterval, RequestPhases, StepStats
from jobs.errors import StoreUnavailable
from jobs.memory_store import MemoryStore
from jobs.model import Failure, ItemCounts, Job, JobId, JobRequest, Prompt, WorkerId, new_lease_token
from jobs.states import JobState
from tests.support.job_factory import NOW, job_result, new_job
from workers.attempts import attempt
from workers.attempts.attempt import AttemptRunner, Verdict, sampling_params
from workers.attempts.holding import Holding
from workers.attempts.observe import AttemptObserver
from workers.attempts.pause import RetryPause
from workers.delivery import Delivery
from workers.engines.protocol import EngineRequest, ModelFacts, Outcome, Refused
from workers.engines.runtime import Generation, GenerationTable
from workers.errors import EngineLost
from workers.pool import JobStopped

WORKER = WorkerId("w1")


@dataclass
class ScriptedRuntime:
    """Answers at once with what the test wrote; the real engine is proved elsewhere."""

    error: BaseException | None = None
    """What ends every generation, after the outcomes that `ends` leaves it."""
    ends: Callable[[EngineRequest], Outcome | None] = lambda request: output(request.id)
    asked: list[tuple[int, ...]] = field(default_factory=list)
    """The first tokens of the prompts of each generation."""
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[Generation] = field(default_factory=list)
    table: GenerationTable = field(default_factory=GenerationTable)

    def die_of(self, error: BaseException) -> None:
        """With everything that it was given."""
        self.error, self.ends = error, lambda request: None

    def start(self) -> ModelFacts:
        raise NotImplementedError

    def submit(self, requests: tuple[EngineRequest, ...]) -> Generation:
        generation = self.table.add(requests, {})
        self.requests += requests
        self.asked.append(tuple(request.prompt_token_ids[0] for request in requests))
        for request in requests:
            if (outcome := self.ends(request)) is not None:
                self.table.take(outcome)
        if self.error is not None:
            self.table.fail_all(self.error)
        return generation

    def abort(self, generation: Generation) -> None:
        self.aborted.append(generation)

    def is_healthy(self) -> bool:
        return True

    def last_stats(self) -> StepStats | None:
        return None

    def stop(self) -> None:
        return None


def output(
    id: str, *, finish_reason: FinishReason = "length", failure: RequestFailure | None = None
) -> Outcome:
    phases = RequestPhases(1.0, 1.5, 2.0, (PhaseInterval("decode", 1.0, 2.0),), 0, 1, 1.0, 1)
    completion = Completion(0, "out", (1,), finish_reason, None, None, None)
    return RequestOutput(id, (completion,), Usage(3, 1, 0), phases, failure)


class FixedClock:
    def now(self) -> float:
        return NOW + 1


@dataclass
class Bench:
    store: MemoryStore
    runtime: ScriptedRuntime
    runner: AttemptRunner

    async def run(self, **job: object) -> tuple[Verdict, JobId]:
        id = await self.create(**job)
        return await self.deliver(id), id

    async def create(self, **job: object) -> JobId:
        new = new_job(**job)
        await self.store.create(new, max_open=10)
        return new.id

    async def read(self, id: JobId) -> Job:
        job = await self.store.get(id, with_result=True)
        assert job is not None
        return job

    async def deliver(self, id: JobId) -> Verdict:
        return await self.runner.run(Delivery(id, new_job().queue, None, True, Context()))

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


def many_prompts(num: int) -> JobRequest:
    """They begin with tokens from 10 on."""
    prompts = tuple(Prompt(token_ids=(10 + index, 2, 3)) for index in range(num))
    return new_job().request.model_copy(update={"prompts": prompts})


async def test_attempt_stores_the_engines_output(bench: Bench) -> None:
    verdict, id = await bench.run()

    job = await bench.store.get(id, with_result=True)
    assert verdict is Verdict.ACKNOWLEDGE
    assert job is not None
    assert job.result is not None
    assert job.result.items[0].choices[0].text == "out"


async def test_attempt_gives_the_job_back_when_the_engine_dies(bench: Bench) -> None:
    bench.runtime.die_of(EngineLost("engine_crashed", "signal 9"))

    verdict, id = await bench.run()

    assert verdict is Verdict.REQUEUE
    assert await bench.state(id) == (JobState.QUEUED, "engine_crashed")


async def test_attempt_tells_a_lost_lease_when_its_engine_dies_after_another_took_the_job(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    id = await bench.create()

    bench.runtime.ends = lambda request: None
    running = asyncio.create_task(bench.deliver(id))
    while not bench.runtime.asked:
        await asyncio.sleep(0)
    claim = await bench.store.claim(id, new_lease_token(), WorkerId("w2"), now=NOW + 100, lease_seconds=9)
    assert claim.attempt == 2
    bench.runtime.table.fail_all(EngineLost("engine_hung", "no word for 60 s"))

    verdict = await running

    assert verdict is Verdict.ACKNOWLEDGE
    assert (await bench.read(id)).attempts == 2, "the job is the other's"
    assert "lease lost" in caplog.text
    assert "given back" not in caplog.text


async def test_attempt_gives_the_job_back_when_our_own_code_fails(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.runtime.die_of(ValueError("a secret"))

    verdict, id = await bench.run()

    assert verdict is Verdict.ACKNOWLEDGE, "the store has the message, until the retry's time"
    assert await bench.state(id) == (JobState.QUEUED, "internal_error")
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


async def test_request_that_the_engine_ended_itself_is_run_again(bench: Bench) -> None:
    bench.runtime.ends = lambda request: output(request.id, finish_reason="abort")

    verdict, id = await bench.run()

    assert verdict is Verdict.ACKNOWLEDGE
    assert await bench.state(id) == (JobState.QUEUED, "aborted")


async def test_broken_items_fail_alone_with_their_own_reasons(bench: Bench) -> None:
    unfollowed = RequestFailure("structure_failed", "could not be followed", retryable=False)
    endings: dict[int, Callable[[str], Outcome]] = {
        11: lambda id: Refused(id, "invalid_request", "too long"),
        13: lambda id: output(id, failure=unfollowed),
    }
    bench.runtime.ends = lambda request: endings.get(request.prompt_token_ids[0], output)(request.id)

    verdict, id = await bench.run(request=many_prompts(5))

    job = await bench.read(id)
    assert (verdict, job.state) == (Verdict.ACKNOWLEDGE, JobState.COMPLETED)
    assert job.items == ItemCounts(total=5, completed=3, failed=2)
    assert job.result is not None
    reasons = [item.failure and item.failure.reason for item in job.result.items]
    assert reasons == [None, "invalid_request", None, "structure_failed", None]
    assert job.usage is not None
    assert job.usage.completion_tokens == 4, "what was made for a failed prompt was made"


async def test_job_fails_when_all_its_items_do(bench: Bench) -> None:
    bench.runtime.ends = lambda request: Refused(request.id, "invalid_request", "too long")

    verdict, id = await bench.run(request=many_prompts(3))

    job = await bench.read(id)
    assert (verdict, job.state) == (Verdict.ACKNOWLEDGE, JobState.FAILED)
    assert job.failure == Failure(
        reason="invalid_request", message="all 3 prompts failed; the first: too long", retryable=False
    )
    assert job.items == ItemCounts(total=3, completed=0, failed=3)


async def test_item_that_may_be_tried_again_is_run_alone_in_the_next_attempt(bench: Bench) -> None:
    passing = RequestFailure("not_finite", "the logits were not finite", retryable=True)
    bench.runtime.ends = lambda request: output(
        request.id, failure=passing if request.prompt_token_ids[0] == 12 else None
    )
    _, id = await bench.run(request=many_prompts(4))
    assert await bench.state(id) == (JobState.QUEUED, "not_finite")

    bench.runtime.ends = lambda request: output(request.id)
    bench.store.advance(now=NOW + 100)
    await bench.deliver(id)

    job = await bench.read(id)
    assert bench.runtime.asked == [(10, 11, 12, 13), (12,)]
    assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
    assert job.items == ItemCounts(total=4, completed=4, failed=0)
    assert job.usage is not None
    assert job.usage.completion_tokens == 4


async def test_item_that_fails_in_every_attempt_leaves_the_others_completed(bench: Bench) -> None:
    passing = RequestFailure("not_finite", "the logits were not finite", retryable=True)
    bench.runtime.ends = lambda request: output(
        request.id, failure=passing if request.prompt_token_ids[0] == 12 else None
    )

    _, id = await bench.run(request=many_prompts(4), max_attempts=2)
    bench.store.advance(now=NOW + 100)
    await bench.deliver(id)
    await bench.deliver(id)

    job = await bench.read(id)
    assert bench.runtime.asked == [(10, 11, 12, 13), (12,)]
    assert job.state is JobState.COMPLETED
    assert job.result is not None
    assert [item.failure and item.failure.reason for item in job.result.items] == [
        None,
        None,
        "not_finite",
        None,
    ]


@pytest.mark.parametrize("ending", [EngineLost("engine_crashed", "signal 9"), JobStopped("the worker stops")])
async def test_items_that_ended_before_their_attempt_did_are_not_run_again(
    bench: Bench, ending: BaseException
) -> None:
    bench.runtime.ends = lambda request: output(request.id) if request.prompt_token_ids[0] < 12 else None
    bench.runtime.error = ending
    id = await bench.create(request=many_prompts(4))
    with nullcontext() if isinstance(ending, EngineLost) else pytest.raises(JobStopped):
        await bench.deliver(id)
    waiting = await bench.read(id)

    bench.runtime.error, bench.runtime.ends = None, lambda request: output(request.id)
    await bench.deliver(id)

    assert waiting.items == ItemCounts(total=4, completed=2, failed=0)
    assert bench.runtime.asked == [(10, 11, 12, 13), (12, 13)]
    assert (await bench.read(id)).state is JobState.COMPLETED


async def test_items_that_could_not_be_stored_are_told_by_the_attempt_that_runs_them_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, ...]] = []

    def generated(_self: AttemptObserver, *arguments: Any) -> None:
        told.append(tuple(arguments[3]))

    async def unavailable(*_: object, **__: object) -> bool:
        raise StoreUnavailable("away")

    monkeypatch.setattr(AttemptObserver, "generated", generated)
    bench.runner.is_stopping.set()  # no patience
    bench.runtime.ends = lambda request: output(request.id) if request.prompt_token_ids[0] < 12 else None
    bench.runtime.error = EngineLost("engine_crashed", "signal 9")
    id = await bench.create(request=many_prompts(4))
    with monkeypatch.context() as context:
        context.setattr(bench.store, "keep", unavailable)
        await bench.deliver(id)

    bench.runtime.error, bench.runtime.ends = None, lambda request: output(request.id)
    await bench.deliver(id)

    assert told == [(0, 1, 2, 3)]


async def test_job_whose_items_had_all_ended_is_settled_without_a_run(bench: Bench) -> None:
    id, lost = await bench.create(request=many_prompts(2)), new_lease_token()
    await bench.store.claim(id, lost, WORKER, now=NOW, lease_seconds=0.5)
    await bench.store.keep(id, lost, dict(enumerate(job_result().items * 2)), completed=2, failed=0)

    await bench.deliver(id)

    assert bench.runtime.asked == []
    assert (await bench.read(id)).state is JobState.COMPLETED


async def test_items_are_stored_while_others_run_until_the_lease_is_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "STORE_ITEMS_SECONDS", 0.01)
    bench.runtime.ends = lambda request: output(request.id) if request.prompt_token_ids[0] < 12 else None
    id = await bench.create(request=many_prompts(4))
    running = asyncio.create_task(bench.deliver(id))
    while (await bench.read(id)).items.completed < 2:
        await asyncio.sleep(0.005)

    token = new_lease_token()
    second = await bench.store.claim(id, token, WorkerId("w2"), now=NOW + 100, lease_seconds=9)
    late = bench.runtime.requests[2]
    bench.runtime.table.take(output(late.id))

    assert await running is Verdict.ACKNOWLEDGE
    assert len(bench.runtime.aborted) == 1
    assert sorted(second.items) == [0, 1]
    again = await bench.store.claim(id, token, WorkerId("w2"), now=NOW + 100, lease_seconds=9)
    assert sorted(again.items) == [0, 1], "a late attempt stored an item"


async def test_failed_job_waits_before_its_retry_and_a_forgiven_one_does_not(bench: Bench) -> None:
    bench.runtime.die_of(EngineLost("engine_crashed", "signal 9"))
    _, forgiven = await bench.run()
    bench.runtime.die_of(ValueError())
    _, failed = await bench.run()

    waiting = [await bench.store.get(id) for id in (forgiven, failed)]

    assert [job.next_attempt_at for job in waiting if job] == [None, NOW + 1 + 8.0]


async def test_failed_job_is_repeated_at_once_when_pauses_are_off(bench: Bench) -> None:
    bench.runtime.die_of(ValueError())
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

    verdict = await bench.runner.run(Delivery(new.id, new.queue, None, True, Context()))

    assert verdict is Verdict.ACKNOWLEDGE
    assert await bench.state(new.id) == (JobState.CANCELLED, None)


def test_sampling_parameters_are_read_back_from_json() -> None:
    params = sampling_params({"stop": ["a", "b"], "logit_bias": {"5": 1}, "max_tokens": 3})

    assert params.stop == ("a", "b")
    assert params.logit_bias == {5: 1.0}
