"""Items of a job of many prompts, stored before their job ends. Over memory and over a real Valkey."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from jobs.model import (
    Choice,
    Failure,
    ItemCounts,
    ItemResult,
    Job,
    JobId,
    JobResult,
    LeaseToken,
    Prompt,
    Usage,
    WorkerId,
    new_lease_token,
)
from jobs.states import JobState
from jobs.store import Claim, ClaimOutcome, Settlement, SettleOutcome
from tests.support.job_factory import NOW, new_job

if TYPE_CHECKING:
    from tests.contract.conftest import Stores

WORKER = WorkerId("worker-1")
LEASE = 9.0
CRASH = Failure(reason="engine_crashed", message="signal 9", retryable=True)
BROKEN = ItemResult(failure=Failure(reason="invalid_request", message="too long", retryable=False))


def done(text: str) -> ItemResult:
    choice = Choice(index=0, text=text, finish_reason="length")
    return ItemResult(choices=(choice,), usage=Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1))


async def submit(stores: Stores, *, num_prompts: int = 3, **overrides: object) -> JobId:
    prompts = tuple(Prompt(token_ids=(index, 2, 3)) for index in range(num_prompts))
    request = new_job().request.model_copy(update={"prompts": prompts})
    job = new_job(request=request, **overrides)
    await stores.api.create(job, max_open=10)
    return job.id


async def claim(stores: Stores, id: JobId, *, now: float = NOW + 1) -> tuple[LeaseToken, Claim]:
    token = new_lease_token()
    return token, await stores.worker.claim(id, token, WORKER, now=now, lease_seconds=LEASE)


async def keep(stores: Stores, id: JobId, token: LeaseToken, **texts: str) -> bool:
    """`_0="a"` stores the first item as one with that text."""
    items = {int(place[1:]): done(text) for place, text in texts.items()}
    return await stores.worker.keep(id, token, items, completed=len(items), failed=0)


async def read(stores: Stores, id: JobId) -> Job:
    job = await stores.api.get(id, with_result=True)
    assert job is not None
    return job


def reasons(job: Job) -> list[str | None]:
    assert job.result is not None
    return [item.failure.reason if item.failure else None for item in job.result.items]


async def test_kept_items_are_told_to_the_attempt_after(stores: Stores) -> None:
    id = await submit(stores)
    lost, first = await claim(stores, id)
    assert await stores.worker.keep(id, lost, {0: done("a"), 2: BROKEN}, completed=1, failed=1)

    token, second = await claim(stores, id, now=NOW + 20)
    again = await stores.worker.claim(id, token, WORKER, now=NOW + 20, lease_seconds=LEASE)

    assert first.items == {}
    assert second.items == {0: done("a"), 2: BROKEN}
    assert again.items == second.items


async def test_unfinished_job_tells_how_many_of_its_items_are_kept(stores: Stores) -> None:
    id = await submit(stores, num_prompts=4)
    token, _ = await claim(stores, id)
    assert (await read(stores, id)).items == ItemCounts(total=4, completed=0, failed=0)

    await stores.worker.keep(id, token, {0: done("a"), 2: BROKEN}, completed=1, failed=1)

    assert (await read(stores, id)).items == ItemCounts(total=4, completed=1, failed=1)
    await stores.worker.release(id, token, now=NOW + 2)
    assert (await read(stores, id)).items == ItemCounts(total=4, completed=1, failed=1)


async def test_more_items_than_one_call_takes_are_kept(stores: Stores) -> None:
    id = await submit(stores, num_prompts=1200)
    token, _ = await claim(stores, id)

    assert await stores.worker.keep(
        id, token, {index: done(str(index)) for index in range(1200)}, completed=1200, failed=0
    )

    _, second = await claim(stores, id, now=NOW + 20)
    assert sorted(second.items) == list(range(1200))


async def test_late_attempt_cannot_keep_an_item(stores: Stores) -> None:
    id = await submit(stores)
    late, _ = await claim(stores, id)
    token, _ = await claim(stores, id, now=NOW + 20)

    assert not await keep(stores, id, late, _0="late")

    assert await keep(stores, id, token, _1="b")
    await stores.worker.release(id, token, now=NOW + 21)
    assert not await keep(stores, id, token, _2="after the release")
    _, third = await claim(stores, id, now=NOW + 22)
    assert third.items == {1: done("b")}


async def test_nothing_is_kept_of_a_job_that_has_ended(stores: Stores) -> None:
    id = await submit(stores)
    token, _ = await claim(stores, id)
    result = JobResult(items=(done("a"), done("b"), BROKEN))
    await keep(stores, id, token, _0="a")

    await stores.worker.settle(id, token, Settlement(JobState.COMPLETED, result=result), now=NOW + 2)

    assert not await keep(stores, id, token, _1="late")
    assert not await keep(stores, JobId("job_unknown"), token, _0="a")
    job = await read(stores, id)
    assert job.result == result
    assert job.items == ItemCounts(total=3, completed=2, failed=1)
    assert job.usage == Usage(prompt_tokens=6, completion_tokens=4, cached_tokens=2)


@pytest.mark.parametrize("end", ["settled", "cancelled", "expired", "exhausted"])
async def test_items_kept_apart_are_gone_with_the_end_of_their_job(stores: Stores, end: str) -> None:
    id = await submit(stores, max_attempts=1, expires_at=NOW + 100 if end == "expired" else None)
    token, _ = await claim(stores, id)
    await keep(stores, id, token, _0="a")
    assert stores.num_with_items() == 1

    match end:
        case "settled":
            await stores.worker.settle(id, token, Settlement(JobState.FAILED, failure=CRASH), now=NOW + 2)
        case "cancelled":
            await stores.worker.release(id, token, now=NOW + 2)
            await stores.api.cancel(id, now=NOW + 3)
        case _:
            await stores.worker.release(id, token, now=NOW + 2, failure=CRASH)
            await claim(stores, id, now=NOW + 200)

    assert stores.num_with_items() == 0


async def test_job_of_which_all_items_failed_tells_each_ones_failure(stores: Stores) -> None:
    id = await submit(stores)
    token, _ = await claim(stores, id)
    result = JobResult(items=(BROKEN, BROKEN, BROKEN))

    settlement = Settlement(JobState.FAILED, result=result, failure=result.failure)
    assert await stores.worker.settle(id, token, settlement, now=NOW + 2) is SettleOutcome.SETTLED

    job = await read(stores, id)
    assert (job.state, job.items) == (JobState.FAILED, ItemCounts(total=3, completed=0, failed=3))
    assert reasons(job) == ["invalid_request"] * 3


async def test_exhausted_job_completes_with_the_items_that_did(stores: Stores) -> None:
    id = await submit(stores, max_attempts=1)
    token, _ = await claim(stores, id)
    await stores.worker.keep(id, token, {0: done("a"), 2: BROKEN}, completed=1, failed=1)
    await stores.worker.release(id, token, now=NOW + 2, failure=CRASH)

    _, last = await claim(stores, id, now=NOW + 3)

    assert (last.outcome, last.ended_as) == (ClaimOutcome.EXHAUSTED, JobState.COMPLETED)
    job = await read(stores, id)
    assert (job.state, job.items) == (JobState.COMPLETED, ItemCounts(total=3, completed=1, failed=2))
    assert reasons(job) == [None, "engine_crashed", "invalid_request"]
    assert job.result is not None
    assert job.result.items[0] == done("a")
    assert job.usage == done("a").usage


async def test_exhausted_job_fails_when_no_item_completed(stores: Stores) -> None:
    id = await submit(stores, max_attempts=1)
    token, _ = await claim(stores, id)
    await stores.worker.keep(id, token, {2: BROKEN}, completed=0, failed=1)
    await stores.worker.release(id, token, now=NOW + 2, failure=CRASH)

    _, last = await claim(stores, id, now=NOW + 3)

    assert (last.outcome, last.ended_as) == (ClaimOutcome.EXHAUSTED, JobState.FAILED)
    job = await read(stores, id)
    assert (job.state, job.failure) == (JobState.FAILED, CRASH)
    assert reasons(job) == ["engine_crashed", "engine_crashed", "invalid_request"]


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.EXPIRED])
async def test_job_that_is_stopped_keeps_what_had_ended(stores: Stores, state: JobState) -> None:
    id = await submit(stores)
    token, _ = await claim(stores, id)
    await keep(stores, id, token, _0="a", _1="b")

    await stores.worker.settle(id, token, Settlement(state), now=NOW + 2)

    job = await read(stores, id)
    assert (job.state, job.items) == (state, ItemCounts(total=3, completed=2, failed=1))
    assert reasons(job) == [None, None, state.value]
