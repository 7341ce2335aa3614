"""What both stores promise. Every test runs over memory and over a real Valkey."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from jobs.errors import IdempotencyMismatch, QueueFull
from jobs.model import Failure, JobId, LeaseToken, new_lease_token
from jobs.states import JobState
from jobs.store import (
    FORGIVEN_LIMIT,
    CancelOutcome,
    ClaimOutcome,
    LostAttempt,
    RenewOutcome,
    Settlement,
    SettleOutcome,
)
from tests.support.job_factory import NOW, completed, failed, job_result, new_job
from tests.support.store_acts import (
    CRASH,
    LEASE,
    OTHER_WORKER,
    REPLICA,
    SPANS,
    WORKER,
    claim,
    claim_as,
    state_of,
    submit,
)

if TYPE_CHECKING:
    from tests.contract.conftest import Stores


async def test_created_job_reads_back_as_queued(stores: Stores) -> None:
    job = new_job(metadata={"run": "7"}, expires_at=NOW + 60)

    created = await stores.api.create(job, max_open=10)
    stored = await stores.api.get(job.id)

    assert not created.replayed
    assert stored is not None
    assert (stored.state, stored.attempts, stored.num_prompts) == (JobState.QUEUED, 0, 1)
    assert stored.metadata == {"run": "7"}
    assert stored.expires_at == NOW + 60
    assert stored.trace_id == "0af7651916cd43dd8448eb211c80319c"


async def test_unknown_job_reads_as_none(stores: Stores) -> None:
    assert await stores.api.get(JobId("job_unknown")) is None
    assert await stores.api.cancel(JobId("job_unknown"), now=NOW) is CancelOutcome.MISSING
    assert await stores.api.watch(JobId("job_unknown"), REPLICA) is None


async def test_create_is_refused_when_the_queue_is_full(stores: Stores) -> None:
    await stores.api.create(new_job(), max_open=1)
    refused = new_job()

    with pytest.raises(QueueFull, match="holds 1 open jobs, its limit is 1"):
        await stores.api.create(refused, max_open=1)

    assert await stores.api.get(refused.id) is None


async def test_settling_makes_room_in_a_full_queue(stores: Stores) -> None:
    id = await submit(stores)
    await stores.worker.settle(id, await claim(stores, id), completed(), now=NOW + 2)

    job = new_job()
    await stores.api.create(job, max_open=1)

    assert stores.open(job.queue) == {job.id}


async def test_same_idempotency_key_and_body_gives_the_first_job_again(stores: Stores) -> None:
    first = new_job(idempotency_key="k", fingerprint="f")
    second = new_job(idempotency_key="k", fingerprint="f")
    await stores.api.create(first, max_open=10)

    created = await stores.api.create(second, max_open=10)

    assert created.replayed
    assert created.id == first.id
    assert await stores.api.get(second.id) is None


async def test_same_idempotency_key_with_another_body_is_refused(stores: Stores) -> None:
    await stores.api.create(new_job(idempotency_key="k", fingerprint="f"), max_open=10)

    with pytest.raises(IdempotencyMismatch):
        await stores.api.create(new_job(idempotency_key="k", fingerprint="g"), max_open=10)


async def test_message_is_queued_once_with_a_job_and_never_for_one_that_is_refused_or_replayed(
    stores: Stores,
) -> None:
    first, second = new_job(idempotency_key="k", fingerprint="f"), new_job()
    await stores.api.create(first, max_open=2)
    await stores.api.create(second, max_open=2)

    await stores.api.create(new_job(idempotency_key="k", fingerprint="f"), max_open=2)
    with pytest.raises(IdempotencyMismatch):
        await stores.api.create(new_job(idempotency_key="k", fingerprint="g"), max_open=2)
    with pytest.raises(QueueFull):
        await stores.api.create(new_job(), max_open=2)

    assert stores.messages(first.queue) == [first.id, second.id]
    assert stores.open(first.queue) == {first.id, second.id}


@pytest.mark.parametrize("key", [None, "k"])
async def test_creating_a_job_again_changes_nothing_when_a_worker_has_it(
    stores: Stores, key: str | None
) -> None:
    """As a client of the store does by itself whose connection was cut before the answer came."""
    job = new_job(idempotency_key=key, fingerprint="f")
    await stores.api.create(job, max_open=1)
    await claim(stores, job.id)

    again = await stores.api.create(job, max_open=1)

    assert (again.id, again.replayed) == (job.id, False)
    assert await state_of(stores, job.id) is JobState.IN_PROGRESS
    assert stores.messages(job.queue) == [job.id]


async def test_claim_hands_out_the_request_and_counts_the_attempt(stores: Stores) -> None:
    job = new_job()
    await stores.api.create(job, max_open=10)

    taken = await stores.worker.claim(job.id, LeaseToken("t"), WORKER, now=NOW + 1, lease_seconds=LEASE)

    assert taken.outcome is ClaimOutcome.CLAIMED
    assert taken.request == job.request
    assert (taken.attempt, taken.queued_at, taken.traceparent) == (1, NOW, job.traceparent)
    stored = await stores.api.get(job.id)
    assert stored is not None
    assert (stored.state, stored.in_progress_at) == (JobState.IN_PROGRESS, NOW + 1)


async def test_claim_repeated_with_the_same_token_counts_once(stores: Stores) -> None:
    id = await submit(stores)
    token = await claim(stores, id)

    again = await stores.worker.claim(id, token, WORKER, now=NOW + 2, lease_seconds=LEASE)

    assert (again.outcome, again.attempt) == (ClaimOutcome.CLAIMED, 1)


async def test_claim_is_refused_while_another_lease_is_good(stores: Stores) -> None:
    id = await submit(stores)
    await claim(stores, id, now=NOW)

    second = await stores.worker.claim(
        id, new_lease_token(), OTHER_WORKER, now=NOW + LEASE - 0.1, lease_seconds=LEASE
    )

    assert second.outcome is ClaimOutcome.HELD


async def test_claim_after_the_lease_ran_out_fences_off_the_first_worker(stores: Stores) -> None:
    id = await submit(stores)
    late = await claim(stores, id, now=NOW)
    await claim(stores, id, now=NOW + LEASE + 1, worker=OTHER_WORKER)

    assert await stores.worker.settle(id, late, completed("late"), now=NOW + 20) is SettleOutcome.LOST
    assert await stores.worker.release(id, late, now=NOW + 20) is SettleOutcome.LOST
    assert stores.worker.renew({id: late}, now=NOW + 20, lease_seconds=LEASE) == {id: RenewOutcome.LOST}
    assert await state_of(stores, id) is JobState.IN_PROGRESS


async def test_late_attempt_is_told_that_it_lost_when_the_next_one_has_ended_the_job(stores: Stores) -> None:
    id = await submit(stores)
    late = await claim(stores, id, now=NOW)
    next_one = await claim(stores, id, now=NOW + LEASE + 1, worker=OTHER_WORKER)
    await stores.worker.settle(id, next_one, completed("next"), now=NOW + LEASE + 2)

    assert await stores.worker.settle(id, late, completed("late"), now=NOW + 20) is SettleOutcome.LOST
    assert await stores.worker.release(id, late, now=NOW + 20) is SettleOutcome.LOST
    job = await stores.api.get(id, with_result=True)
    assert job is not None
    assert job.result == job_result("next")


async def test_renewed_lease_outlives_its_first_term(stores: Stores) -> None:
    id = await submit(stores)
    token = await claim(stores, id, now=NOW)

    renewed = stores.worker.renew({id: token}, now=NOW + 8, lease_seconds=LEASE)
    other = await stores.worker.claim(id, new_lease_token(), OTHER_WORKER, now=NOW + 10, lease_seconds=LEASE)

    assert renewed == {id: RenewOutcome.RENEWED}
    assert other.outcome is ClaimOutcome.HELD


async def test_settled_job_keeps_its_result_usage_and_timings(stores: Stores) -> None:
    id = await submit(stores)
    token = await claim(stores, id)

    outcome = await stores.worker.settle(id, token, completed(), now=NOW + 3)

    assert outcome is SettleOutcome.SETTLED
    job = await stores.api.get(id, with_result=True)
    assert job is not None
    assert (job.state, job.finished_at) == (JobState.COMPLETED, NOW + 3)
    assert job.result == job_result()
    assert job.usage == job_result().usage
    assert job.timings == completed().timings
    assert job.result_expires_at == NOW + 3 + 3600
    assert (await stores.api.get(id)).result is None  # type: ignore[union-attr]
    assert stores.open(job.queue) == set()


async def test_settling_twice_keeps_the_first_result_and_is_told_the_same(stores: Stores) -> None:
    id = await submit(stores)
    token = await claim(stores, id)
    first = await stores.worker.settle(id, token, completed("first"), now=NOW + 2)

    second = await stores.worker.settle(id, token, completed("second"), now=NOW + 3)

    assert (first, second) == (SettleOutcome.SETTLED, SettleOutcome.SETTLED)
    job = await stores.api.get(id, with_result=True)
    assert job is not None
    assert job.result == job_result("first")


async def test_failed_job_keeps_its_failure(stores: Stores) -> None:
    id = await submit(stores)
    await stores.worker.settle(id, await claim(stores, id), failed("engine_error"), now=NOW + 2)

    job = await stores.api.get(id)

    assert job is not None
    assert job.failure is not None
    assert (job.state, job.failure.reason) == (JobState.FAILED, "engine_error")


async def test_released_job_is_queued_and_the_attempt_not_counted(stores: Stores) -> None:
    id = await submit(stores)

    assert await stores.worker.release(id, await claim(stores, id), now=NOW + 2) is SettleOutcome.SETTLED

    job = await stores.api.get(id)
    assert job is not None
    assert (job.state, job.attempts) == (JobState.QUEUED, 0)
    await claim(stores, id, now=NOW + 2)


async def test_job_fails_with_its_last_failure_when_its_attempts_are_used_up(stores: Stores) -> None:
    id = await submit(stores, max_attempts=2)
    crash = Failure(reason="engine_crashed", message="the engine process ended", retryable=True)
    for attempt in range(2):
        await stores.worker.release(
            id, await claim(stores, id, now=NOW + attempt), now=NOW + attempt, failure=crash
        )

    last = await stores.worker.claim(id, new_lease_token(), WORKER, now=NOW + 5, lease_seconds=LEASE)

    assert last.outcome is ClaimOutcome.EXHAUSTED
    job = await stores.api.get(id)
    assert job is not None
    assert (job.state, job.failure) == (JobState.FAILED, crash)


async def test_job_whose_workers_vanish_fails_as_worker_lost(stores: Stores) -> None:
    id = await submit(stores, max_attempts=2)
    for start in (NOW, NOW + 20):
        assert await stores.worker.mark_alone(id, await claim(stores, id, now=start))

    last = await stores.worker.claim(id, new_lease_token(), WORKER, now=NOW + 40, lease_seconds=LEASE)

    assert last.outcome is ClaimOutcome.EXHAUSTED
    job = await stores.api.get(id)
    assert job is not None
    assert job.failure is not None
    assert job.failure.reason == "worker_lost"


async def test_attempts_that_vanish_in_company_are_forgiven_up_to_a_limit(stores: Stores) -> None:
    id = await submit(stores, max_attempts=2)

    claims = [
        (await claim_as(stores, id, now=NOW + 20 * number, traceparent=SPANS[0]))[1]
        for number in range(FORGIVEN_LIMIT + 3)
    ]

    assert [taken.attempt for taken in claims[:-1]] == list(range(1, FORGIVEN_LIMIT + 3))
    assert [taken.forgiven for taken in claims[:-1]] == [*range(FORGIVEN_LIMIT + 1), FORGIVEN_LIMIT]
    assert claims[-1].outcome is ClaimOutcome.EXHAUSTED


async def test_attempt_that_vanishes_alone_is_counted(stores: Stores) -> None:
    id = await submit(stores)
    assert await stores.worker.mark_alone(id, await claim(stores, id, now=NOW))
    _, second = await claim_as(stores, id, now=NOW + 20, traceparent=SPANS[0])

    _, third = await claim_as(stores, id, now=NOW + 40, traceparent=SPANS[0])

    assert (second.attempt, second.forgiven) == (2, 0)
    assert (third.attempt, third.forgiven) == (3, 1), "the mark was the first attempt's, not the second's"


async def test_forgiven_release_keeps_its_number_and_does_not_count(stores: Stores) -> None:
    id = await submit(stores, max_attempts=1)
    token = await claim(stores, id)

    await stores.worker.release(id, token, now=NOW + 2, failure=CRASH, is_forgiven=True)
    _, second = await claim_as(stores, id, now=NOW + 3, traceparent=SPANS[0])

    assert (second.outcome, second.attempt, second.forgiven) == (ClaimOutcome.CLAIMED, 2, 1)


async def test_only_the_lease_holder_can_be_marked_alone(stores: Stores) -> None:
    id = await submit(stores)
    late = await claim(stores, id, now=NOW)
    await claim(stores, id, now=NOW + 20, worker=OTHER_WORKER)

    assert not await stores.worker.mark_alone(id, late)
    assert not await stores.worker.mark_alone(JobId("job_unknown"), late)


async def test_first_claim_tells_of_no_attempt_before(stores: Stores) -> None:
    id = await submit(stores)

    _, first = await claim_as(stores, id, now=NOW, traceparent=SPANS[0])

    assert (first.previous_traceparent, first.lost) == (None, None)


async def test_claim_after_a_vanished_worker_tells_its_span_and_start(stores: Stores) -> None:
    id = await submit(stores)
    await claim_as(stores, id, now=NOW + 1, traceparent=SPANS[0])

    token, second = await claim_as(stores, id, now=NOW + 20, traceparent=SPANS[1])
    _, repeated = await claim_as(stores, id, now=NOW + 21, traceparent=SPANS[1], token=token)

    assert (second.attempt, second.previous_traceparent) == (2, SPANS[0])
    assert second.lost == LostAttempt(attempt=1, started_at=NOW + 1)
    assert repeated == second


async def test_claim_after_a_release_tells_the_span_but_no_loss(stores: Stores) -> None:
    id = await submit(stores)
    token, _ = await claim_as(stores, id, now=NOW + 1, traceparent=SPANS[0])
    await stores.worker.release(id, token, now=NOW + 2, failure=CRASH)

    token, second = await claim_as(stores, id, now=NOW + 3, traceparent=SPANS[1])
    await stores.worker.release(id, token, now=NOW + 4)
    _, third = await claim_as(stores, id, now=NOW + 5, traceparent=SPANS[2])

    assert (second.previous_traceparent, second.lost, second.released_at) == (SPANS[0], None, NOW + 2)
    assert (third.previous_traceparent, third.lost, third.released_at) == (SPANS[1], None, NOW + 4)


async def test_claim_that_ends_a_job_tells_of_its_last_attempt(stores: Stores) -> None:
    exhausted = await submit(stores, max_attempts=1)
    cancelled = await submit(stores)
    expired = await submit(stores, expires_at=NOW + 10)
    for id in (exhausted, cancelled, expired):
        token, _ = await claim_as(stores, id, now=NOW + 1, traceparent=SPANS[0])
        assert await stores.worker.mark_alone(id, token)
    await stores.api.cancel(cancelled, now=NOW + 2)

    ends = [
        (await claim_as(stores, id, now=NOW + 20, traceparent=SPANS[1]))[1]
        for id in (exhausted, cancelled, expired)
    ]

    assert [end.outcome for end in ends] == [
        ClaimOutcome.EXHAUSTED,
        ClaimOutcome.CANCELLED,
        ClaimOutcome.EXPIRED,
    ]
    assert {end.lost for end in ends} == {LostAttempt(attempt=1, started_at=NOW + 1)}


async def test_cancel_of_a_queued_job_is_final_at_once(stores: Stores) -> None:
    id = await submit(stores)

    assert await stores.api.cancel(id, now=NOW + 1) is CancelOutcome.CANCELLED

    assert await state_of(stores, id) is JobState.CANCELLED
    taken = await stores.worker.claim(id, new_lease_token(), WORKER, now=NOW + 2, lease_seconds=LEASE)
    assert (taken.outcome, taken.ended_as) == (ClaimOutcome.FINAL, JobState.CANCELLED)


async def test_refused_claim_tells_whether_the_job_ended_in_its_queue_and_since_when_it_waited(
    stores: Stores,
) -> None:
    waiting, expired, given_back, running = [await submit(stores, expires_at=NOW + 9) for _ in range(4)]
    await stores.api.cancel(waiting, now=NOW + 1)
    await stores.worker.release(given_back, await claim(stores, given_back), now=NOW + 2)
    await stores.api.cancel(given_back, now=NOW + 3)
    await stores.worker.settle(running, await claim(stores, running), completed(), now=NOW + 4)

    ids = (waiting, expired, given_back, running)
    taken = [(await claim_as(stores, id, now=NOW + 20, traceparent=""))[1] for id in ids]

    assert [claim.ended_in_queue for claim in taken] == [True, True, True, False]
    assert [claim.released_at for claim in taken] == [None, None, NOW + 2, None]


async def test_cancel_of_a_running_job_reaches_its_worker_and_wins_over_the_result(stores: Stores) -> None:
    id = await submit(stores)
    token = await claim(stores, id)

    assert await stores.api.cancel(id, now=NOW + 2) is CancelOutcome.CANCELLING

    told = stores.worker.read_cancels(WORKER, "0", block_seconds=0.01)
    assert [job for _, job in told] == [id]
    assert stores.worker.read_cancels(WORKER, told[-1][0], block_seconds=0.01) == []
    assert stores.worker.renew({id: token}, now=NOW + 3, lease_seconds=LEASE) == {id: RenewOutcome.CANCELLING}
    assert await stores.worker.settle(id, token, completed(), now=NOW + 4) is SettleOutcome.CANCELLED
    assert await stores.worker.settle(id, token, completed(), now=NOW + 5) is SettleOutcome.CANCELLED
    assert await stores.worker.release(id, token, now=NOW + 5) is SettleOutcome.CANCELLED
    assert await state_of(stores, id) is JobState.CANCELLED
    assert await stores.api.cancel(id, now=NOW + 5) is CancelOutcome.FINAL


async def test_job_being_cancelled_ends_when_its_worker_dies(stores: Stores) -> None:
    id = await submit(stores)
    await claim(stores, id, now=NOW)
    await stores.api.cancel(id, now=NOW + 1)

    taken = await stores.worker.claim(id, new_lease_token(), OTHER_WORKER, now=NOW + 20, lease_seconds=LEASE)

    assert taken.outcome is ClaimOutcome.CANCELLED
    assert await state_of(stores, id) is JobState.CANCELLED


async def test_claim_past_the_deadline_expires_the_job(stores: Stores) -> None:
    id = await submit(stores, expires_at=NOW + 5)

    taken = await stores.worker.claim(id, new_lease_token(), WORKER, now=NOW + 5, lease_seconds=LEASE)

    assert taken.outcome is ClaimOutcome.EXPIRED
    assert await state_of(stores, id) is JobState.EXPIRED


async def test_watcher_hears_every_move_in_order(stores: Stores) -> None:
    id = await submit(stores)
    assert await stores.api.watch(id, REPLICA) is JobState.QUEUED
    token = await claim(stores, id)
    await stores.worker.release(id, token, now=NOW + 2)
    await stores.worker.settle(id, await claim(stores, id, now=NOW + 3), completed(), now=NOW + 4)

    replies = await stores.replies.read_replies(REPLICA, "0", block_seconds=1)

    assert {reply.id for reply in replies} == {id}
    assert [reply.state for reply in replies] == [
        JobState.IN_PROGRESS,
        JobState.QUEUED,
        JobState.IN_PROGRESS,
        JobState.COMPLETED,
    ]
    assert await stores.replies.read_replies(REPLICA, replies[-1].position, block_seconds=0.01) == []


async def test_replica_named_at_creation_is_a_watcher(stores: Stores) -> None:
    id = await submit(stores, watcher=REPLICA)
    await stores.api.cancel(id, now=NOW)

    replies = await stores.replies.read_replies(REPLICA, "0", block_seconds=1)

    assert [(reply.id, reply.state) for reply in replies] == [(id, JobState.CANCELLED)]


async def test_read_replies_returns_when_a_move_comes_while_it_waits(stores: Stores) -> None:
    id = await submit(stores, watcher=REPLICA)
    reading = asyncio.create_task(stores.replies.read_replies(REPLICA, "0", block_seconds=10))
    await asyncio.sleep(0)

    await stores.api.cancel(id, now=NOW)

    assert [reply.state for reply in await asyncio.wait_for(reading, 5)] == [JobState.CANCELLED]


async def test_watch_of_a_final_job_says_so(stores: Stores) -> None:
    id = await submit(stores)
    await stores.api.cancel(id, now=NOW)

    assert await stores.api.watch(id, REPLICA) is JobState.CANCELLED


async def test_expiry_can_be_settled_by_the_worker(stores: Stores) -> None:
    id = await submit(stores)

    outcome = await stores.worker.settle(
        id, await claim(stores, id), Settlement(JobState.EXPIRED), now=NOW + 9
    )

    assert outcome is SettleOutcome.SETTLED
    assert await state_of(stores, id) is JobState.EXPIRED
