"""Waits and deadlines, which no worker keeps: retries, start times, expiry. Over memory and a real Valkey."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.model import JobId
from jobs.states import JobState
from jobs.store import (
    CancelOutcome,
    ClaimOutcome,
    LostAttempt,
    SettleOutcome,
)
from tests.support.job_factory import NOW, completed, new_job
from tests.support.store_acts import (
    CRASH,
    LEASE,
    REPLICA,
    SPANS,
    claim,
    claim_as,
    state_of,
    submit,
)

if TYPE_CHECKING:
    from tests.contract.conftest import Stores


async def wait_for_retry(stores: Stores, id: JobId, *, until: float) -> None:
    token = await claim(stores, id)
    outcome = await stores.worker.release(id, token, now=NOW + 2, failure=CRASH, next_attempt_at=until)
    assert outcome is SettleOutcome.WAITING


async def test_retry_is_published_once_and_not_before_its_time(stores: Stores) -> None:
    id = await submit(stores)
    await wait_for_retry(stores, id, until=NOW + 10)

    early = await stores.schedule.advance(now=NOW + 9.9)
    waiting = await stores.api.get(id)
    on_time = await stores.schedule.advance(now=NOW + 10)
    again = await stores.schedule.advance(now=NOW + 11)
    _, second = await claim_as(stores, id, now=NOW + 12, traceparent=SPANS[0])

    assert [advance.num_published for advance in (early, on_time, again)] == [0, 1, 0]
    assert waiting is not None
    assert (waiting.state, waiting.next_attempt_at, waiting.attempts) == (JobState.QUEUED, NOW + 10, 1)
    assert (second.attempt, second.released_at, second.published_at) == (2, NOW + 2, NOW + 10)
    assert (await stores.api.get(id)).next_attempt_at is None  # type: ignore[union-attr]


async def test_job_with_a_start_time_is_published_once_and_not_before_it(stores: Stores) -> None:
    id = await submit(stores, start_at=NOW + 60, expires_at=NOW + 90)

    _, early = await claim_as(stores, id, now=NOW + 1, traceparent=SPANS[0])
    waiting = await stores.api.get(id)
    assert stores.messages(new_job().queue) == []
    published = [
        (await stores.schedule.advance(now=at)).num_published for at in (NOW + 59, NOW + 60, NOW + 61)
    ]
    _, first = await claim_as(stores, id, now=NOW + 61, traceparent=SPANS[0])

    assert early.outcome is ClaimOutcome.WAITING
    assert waiting is not None
    assert (waiting.state, waiting.next_attempt_at, waiting.attempts) == (JobState.QUEUED, NOW + 60, 0)
    assert published == [0, 1, 0]
    assert stores.messages(new_job().queue) == [id]
    assert (first.attempt, first.released_at, first.published_at) == (1, None, NOW + 60)


async def test_message_too_many_does_not_start_a_job_that_waits_for_its_retry(stores: Stores) -> None:
    id = await submit(stores)
    await wait_for_retry(stores, id, until=NOW + 10)

    _, early = await claim_as(stores, id, now=NOW + 30, traceparent=SPANS[0])

    assert early.outcome is ClaimOutcome.WAITING
    assert (await stores.schedule.advance(now=NOW + 30)).num_published == 1
    await claim(stores, id, now=NOW + 30)


async def test_job_without_attempts_left_does_not_wait_for_its_end(stores: Stores) -> None:
    id = await submit(stores, max_attempts=1)
    token = await claim(stores, id)

    outcome = await stores.worker.release(id, token, now=NOW + 2, failure=CRASH, next_attempt_at=NOW + 60)
    _, last = await claim_as(stores, id, now=NOW + 3, traceparent=SPANS[0])

    assert outcome is SettleOutcome.SETTLED
    assert last.outcome is ClaimOutcome.EXHAUSTED


async def test_job_cancelled_while_it_waits_for_its_retry_is_final_and_met_by_a_worker(
    stores: Stores,
) -> None:
    id = await submit(stores)
    await wait_for_retry(stores, id, until=NOW + 10)

    assert await stores.api.cancel(id, now=NOW + 5) is CancelOutcome.CANCELLED

    assert (await stores.schedule.advance(now=NOW + 20)).num_published == 0, "it was with the cancel"
    _, met = await claim_as(stores, id, now=NOW + 20, traceparent=SPANS[0])
    assert (met.ended_as, met.ended_in_queue) == (JobState.CANCELLED, True)
    assert (met.released_at, met.published_at) == (NOW + 2, NOW + 5)


async def test_deadline_ends_jobs_that_no_worker_holds(stores: Stores) -> None:
    queued, waiting, held, late = [await submit(stores, expires_at=NOW + at) for at in (5, 5, 5, 60)]
    await wait_for_retry(stores, waiting, until=NOW + 10)
    token = await claim(stores, held, now=NOW + 1)
    await stores.api.watch(queued, REPLICA)

    early = await stores.schedule.advance(now=NOW + 4.9)
    on_time = await stores.schedule.advance(now=NOW + 5)

    assert (early.num_ended, on_time.num_ended) == (0, 2)
    states = [await state_of(stores, id) for id in (queued, waiting, held, late)]
    assert states == [JobState.EXPIRED, JobState.EXPIRED, JobState.IN_PROGRESS, JobState.QUEUED]
    (told,) = await stores.replies.read_replies(REPLICA, "0", block_seconds=1)
    assert (told.id, told.state) == (queued, JobState.EXPIRED)
    assert stores.open(new_job().queue) == {held, late}
    assert await stores.worker.settle(held, token, completed(), now=NOW + 6) is SettleOutcome.SETTLED


async def test_deadline_ends_a_job_whose_worker_vanished_and_its_first_message_tells_the_loss(
    stores: Stores,
) -> None:
    running, cancelling = [await submit(stores, expires_at=NOW + 5) for _ in range(2)]
    for id in (running, cancelling):
        await claim(stores, id, now=NOW + 1)
    await stores.api.cancel(cancelling, now=NOW + 2)

    leased = await stores.schedule.advance(now=NOW + 6)
    lapsed = await stores.schedule.advance(now=NOW + 1 + LEASE)

    assert (leased.num_ended, lapsed.num_ended) == (0, 2)
    assert await state_of(stores, running) is JobState.EXPIRED
    assert await state_of(stores, cancelling) is JobState.CANCELLED
    met = [(await claim_as(stores, running, now=NOW + 20, traceparent=""))[1] for _ in range(2)]
    assert [claim.lost for claim in met] == [LostAttempt(attempt=1, started_at=NOW + 1), None]
    assert [claim.ended_in_queue for claim in met] == [False, False]
