"""What the tests of a job store ask of it, from both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.model import Failure, JobId, LeaseToken, ReplicaId, WorkerId, new_lease_token
from jobs.states import JobState
from jobs.store import Claim, ClaimOutcome
from tests.support.job_factory import NOW, new_job

if TYPE_CHECKING:
    from tests.contract.conftest import Stores

WORKER = WorkerId("worker-1")
OTHER_WORKER = WorkerId("worker-2")
REPLICA = ReplicaId("replica-1")
LEASE = 9.0
SPANS = [f"00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333{number}-01" for number in range(3)]
CRASH = Failure(reason="engine_crashed", message="signal 9", retryable=True)


async def submit(stores: Stores, **overrides: object) -> JobId:
    job = new_job(**overrides)
    await stores.api.create(job, max_open=1000)
    return job.id


async def claim(stores: Stores, id: JobId, *, now: float = NOW + 1, worker: WorkerId = WORKER) -> LeaseToken:
    token = new_lease_token()
    taken = await stores.worker.claim(id, token, worker, now=now, lease_seconds=LEASE)
    assert taken.outcome is ClaimOutcome.CLAIMED
    return token


async def claim_as(
    stores: Stores, id: JobId, *, now: float, traceparent: str, token: LeaseToken | None = None
) -> tuple[LeaseToken, Claim]:
    token = token or new_lease_token()
    return token, await stores.worker.claim(
        id, token, WORKER, now=now, lease_seconds=LEASE, traceparent=traceparent
    )


async def state_of(stores: Stores, id: JobId) -> JobState:
    job = await stores.api.get(id)
    assert job is not None
    return job.state
