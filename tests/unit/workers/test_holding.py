from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from jobs.memory_store import MemoryStore
from jobs.model import JobId, WorkerId, new_lease_token
from tests.support.job_factory import NOW, new_job
from workers.attempts.holding import HeldJob, Holding
from workers.errors import AttemptEnded, CancelWished, DeadlinePassed, LeaseLost

WORKER = WorkerId("w1")


@dataclass
class ChosenClock:
    time: float = NOW

    def now(self) -> float:
        return self.time


@dataclass
class Bench:
    store: MemoryStore
    clock: ChosenClock
    holding: Holding
    ended: list[AttemptEnded]

    async def claimed_job(self, expires_at: float | None = None) -> HeldJob:
        job = new_job(expires_at=expires_at)
        await self.store.create(job, max_open=10)
        token = new_lease_token()
        await self.store.claim(job.id, token, WORKER, now=self.clock.now(), lease_seconds=9)
        return HeldJob(job.id, token, expires_at, self.ended.append)


@pytest.fixture
def bench() -> Bench:
    store, clock = MemoryStore(), ChosenClock()
    holding = Holding(store, WORKER, clock, lease_seconds=9, renew_seconds=3, is_healthy=lambda: True)
    return Bench(store, clock, holding, [])


async def test_renewal_keeps_a_held_job_from_others(bench: Bench) -> None:
    job = await bench.claimed_job()
    with bench.holding.hold(job):
        bench.clock.time += 8
        bench.holding.renew()
        bench.clock.time += 8

        other = await bench.store.claim(
            job.id, new_lease_token(), WorkerId("w2"), now=bench.clock.now(), lease_seconds=9
        )

    assert other.outcome.value == "held"
    assert bench.ended == []


async def test_job_let_go_is_renewed_no_more(bench: Bench) -> None:
    job = await bench.claimed_job()
    with bench.holding.hold(job):
        pass
    bench.clock.time += 10
    bench.holding.renew()

    other = await bench.store.claim(
        job.id, new_lease_token(), WorkerId("w2"), now=bench.clock.now(), lease_seconds=9
    )

    assert other.outcome.value == "claimed"


async def test_attempt_ends_when_another_worker_has_the_lease(bench: Bench) -> None:
    job = await bench.claimed_job()
    with bench.holding.hold(job):
        bench.clock.time += 10
        await bench.store.claim(
            job.id, new_lease_token(), WorkerId("w2"), now=bench.clock.now(), lease_seconds=9
        )
        bench.holding.renew()

    assert [type(error) for error in bench.ended] == [LeaseLost]


async def test_attempt_ends_when_the_client_cancelled(bench: Bench) -> None:
    job = await bench.claimed_job()
    with bench.holding.hold(job):
        await bench.store.cancel(job.id, now=bench.clock.now())
        bench.holding.renew()

    assert [type(error) for error in bench.ended] == [CancelWished]


async def test_attempt_ends_at_its_deadline_and_not_before(bench: Bench) -> None:
    job = await bench.claimed_job(expires_at=NOW + 5)
    with bench.holding.hold(job):
        bench.clock.time = NOW + 4.9
        bench.holding.end_overdue()
        before = list(bench.ended)
        bench.clock.time = NOW + 5
        bench.holding.end_overdue()

    assert before == []
    assert [type(error) for error in bench.ended] == [DeadlinePassed]


async def test_cancel_reaches_a_running_attempt_through_the_stream(bench: Bench) -> None:
    job = await bench.claimed_job()
    other: list[AttemptEnded] = []
    bystander = HeldJob(JobId("job_other"), new_lease_token(), None, other.append)
    told = threading.Event()
    watched = HeldJob(job.id, job.token, None, lambda error: (bench.ended.append(error), told.set()))  # type: ignore[func-returns-value]
    bench.holding.start()
    try:
        with bench.holding.hold(watched), bench.holding.hold(bystander):
            await bench.store.cancel(job.id, now=bench.clock.now())
            assert told.wait(5)
    finally:
        bench.holding.stop()

    assert isinstance(bench.ended[0], CancelWished)
    assert other == []
