"""Random walks: whatever is asked in whatever order, only the moves of `jobs.states.MOVES` happen."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from jobs.model import Failure, JobId, LeaseToken, WorkerId, new_lease_token
from jobs.states import MOVES, JobState
from jobs.store import FORGIVEN_LIMIT
from tests.support.job_factory import NOW, completed, failed, new_job

if TYPE_CHECKING:
    from tests.contract.conftest import Stores


@pytest.mark.parametrize("seed", range(12))
async def test_store_makes_only_lawful_moves_whatever_is_asked(stores: Stores, seed: int) -> None:
    rng = random.Random(seed)
    job = new_job(max_attempts=3, expires_at=NOW + 120)
    await stores.api.create(job, max_open=10)
    tokens = [new_lease_token() for _ in range(3)]
    state, now, finals = JobState.QUEUED, NOW, 0

    for _ in range(40):
        now += rng.random() * 6
        await _ask_something(stores, rng, job.id, rng.choice(tokens), now)
        stored = await stores.api.get(job.id)
        assert stored is not None
        assert stored.state is state or stored.state in _reachable(state)
        assert stored.attempts <= job.max_attempts + FORGIVEN_LIMIT
        assert stores.open(job.queue) == (set() if stored.state.is_final else {job.id})
        finals += stored.state.is_final and not state.is_final
        state = stored.state

    assert finals <= 1


def _reachable(state: JobState) -> set[JobState]:
    """One call makes one move."""
    return set(MOVES[state])


async def _ask_something(
    stores: Stores, rng: random.Random, id: JobId, token: LeaseToken, now: float
) -> None:
    worker = WorkerId("worker-1")
    match rng.randrange(10):
        case 0 | 1 | 2:
            await stores.worker.claim(id, token, worker, now=now, lease_seconds=9)
        case 3:
            stores.worker.renew({id: token}, now=now, lease_seconds=9)
        case 4:
            failure = Failure(reason="engine_crashed", message="ended", retryable=True)
            await stores.worker.release(
                id,
                token,
                now=now,
                failure=rng.choice([failure, None]),
                is_forgiven=rng.random() < 0.5,
                next_attempt_at=rng.choice([None, now + rng.random() * 20]),
            )
        case 5:
            await stores.worker.settle(id, token, rng.choice([completed(), failed()]), now=now)
        case 6:
            await stores.worker.mark_alone(id, token)
        case 7:
            await stores.schedule.advance(now=now)
        case 8 if rng.random() < 0.2:
            await stores.api.cancel(id, now=now)
