from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from api import waiting
from api.waiting import ReplyReader, WaitOutcome, wait_for
from jobs.errors import StoreUnavailable
from jobs.memory_store import MemoryStore
from jobs.model import JobId, ReplicaId, WorkerId, new_job_id, new_lease_token
from jobs.states import JobState
from jobs.store import Reply
from tests.support.job_factory import completed, new_job

REPLICA = ReplicaId("api-1")


class CutStore(MemoryStore):
    """A memory store whose replica streams can be cut, and lost on the way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_cut = False
        self.num_reads = 0

    async def read_replies(self, replica: ReplicaId, after: str, *, block_seconds: float) -> list[Reply]:
        self.num_reads += 1
        if self.is_cut:
            raise StoreUnavailable("cut")
        return await super().read_replies(replica, after, block_seconds=min(block_seconds, 0.05))

    async def watch(self, id: JobId, replica: ReplicaId) -> JobState | None:
        if self.is_cut:
            raise StoreUnavailable("cut")
        return await super().watch(id, replica)

    async def end(self, id: JobId) -> None:
        token = new_lease_token()
        await self.claim(id, token, WorkerId("worker-1"), now=0.0, lease_seconds=30)
        await self.settle(id, token, completed(), now=1.0)


@asynccontextmanager
async def _running(store: MemoryStore) -> AsyncIterator[ReplyReader]:
    reader = ReplyReader(store, store, REPLICA)
    task = asyncio.create_task(reader.run())
    yield reader
    task.cancel()
    await asyncio.wait({task})


async def _stored(store: MemoryStore, num_jobs: int) -> list[JobId]:
    jobs = [new_job() for _ in range(num_jobs)]
    for job in jobs:
        await store.create(job, max_open=1000)
    return [job.id for job in jobs]


async def _until_waiting(reader: ReplyReader, store: MemoryStore, ids: list[JobId]) -> None:
    async with asyncio.timeout(5):
        while not all(store._records[id].get("watchers") for id in ids) or reader.num_waiters < len(ids):
            await asyncio.sleep(0.001)


async def test_200_waiters_are_told_by_one_reader() -> None:
    store = CutStore()
    ids = await _stored(store, 200)
    async with _running(store) as reader:
        waits = [asyncio.create_task(reader.wait(id, 30)) for id in ids]
        await _until_waiting(reader, store, ids)
        num_reads = store.num_reads
        for id in reversed(ids):
            await store.end(id)

        assert await asyncio.gather(*waits) == [WaitOutcome.ENDED] * 200
        assert store.num_reads - num_reads < 10
        assert reader.num_waiters == 0


async def test_several_waiters_of_one_job_are_all_told() -> None:
    store = CutStore()
    (id,) = await _stored(store, 1)
    async with _running(store) as reader:
        waits = [asyncio.create_task(reader.wait(id, 30)) for _ in range(3)]
        await _until_waiting(reader, store, [id, id, id])
        await store.end(id)

        assert await asyncio.gather(*waits) == [WaitOutcome.ENDED] * 3


async def test_waiter_is_not_told_of_a_move_that_ends_nothing() -> None:
    store = CutStore()
    (id,) = await _stored(store, 1)
    async with _running(store) as reader:
        wait = asyncio.create_task(reader.wait(id, 0.1))
        await _until_waiting(reader, store, [id])
        await store.claim(id, new_lease_token(), WorkerId("worker-1"), now=0.0, lease_seconds=30)

        assert await wait is WaitOutcome.TIMED_OUT


async def test_job_that_ended_or_never_was_is_not_waited_for() -> None:
    store = CutStore()
    (id,) = await _stored(store, 1)
    await store.end(id)
    reader = ReplyReader(store, store, REPLICA)  # nobody reads: there is nothing to wait for

    assert await reader.wait(id, 30) is WaitOutcome.ENDED
    assert await reader.wait(new_job_id(), 30) is WaitOutcome.ENDED


async def test_job_created_with_its_watcher_ends_though_it_was_settled_before_the_wait() -> None:
    store = CutStore()
    job = new_job(watcher=REPLICA)
    async with _running(store) as reader:
        with reader.expect(job.id) as ending:
            await store.create(job, max_open=10)
            await store.end(job.id)

            assert await wait_for(ending, 30) is WaitOutcome.ENDED


async def test_nobody_is_lost_when_jobs_end_and_the_stream_is_lost_during_a_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "FIRST_PAUSE_SECONDS", 0.001)
    store = CutStore()
    ids = await _stored(store, 50)
    async with _running(store) as reader:
        waits = [asyncio.create_task(reader.wait(id, 30)) for id in ids]
        await _until_waiting(reader, store, ids)
        store.is_cut = True
        for id in ids[:25]:
            await store.end(id)
        await store.forget_replica(REPLICA)
        num_reads = store.num_reads
        async with asyncio.timeout(5):
            while store.num_reads == num_reads:
                await asyncio.sleep(0.001)
        store.is_cut = False
        for id in ids[25:]:
            await store.end(id)

        assert await asyncio.gather(*waits) == [WaitOutcome.ENDED] * 50


async def test_job_that_is_just_being_stored_during_a_cut_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client was told 503 job_lost, and the job ran for nobody."""
    monkeypatch.setattr(waiting, "FIRST_PAUSE_SECONDS", 0.001)
    store, job = CutStore(), new_job(watcher=REPLICA)
    store.is_cut = True
    async with _running(store) as reader, asyncio.timeout(10):
        with reader.expect(job.id) as ending:
            await _until_read(store, 1)
            store.is_cut = False
            await _until_read(store, store.num_reads + 2)

            assert not ending.done()
            await store.create(job, max_open=10)
            await store.end(job.id)
            assert await wait_for(ending, 5) is WaitOutcome.ENDED


async def test_job_that_the_store_lost_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SUBMIT_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "RECHECK_SECONDS", 0.0)
    store = CutStore()
    async with _running(store) as reader:
        with reader.expect(new_job().id) as ending:
            assert await wait_for(ending, 5) is WaitOutcome.ENDED


async def _until_read(store: CutStore, num_reads: int) -> None:
    while store.num_reads < num_reads:
        await asyncio.sleep(0.001)


async def test_reader_without_waiters_tells_of_a_long_cut_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "FIRST_PAUSE_SECONDS", 0.001)
    store = CutStore()
    store.is_cut = True
    async with _running(store), asyncio.timeout(5):
        while store.num_reads < 6:
            await asyncio.sleep(0.001)

    assert caplog.text.count("Lost the reply stream") == 1


async def test_waiter_is_told_without_its_stream_when_states_are_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "RECHECK_SECONDS", 0.0)
    store = CutStore()
    (id,) = await _stored(store, 1)
    async with _running(store) as reader:
        wait = asyncio.create_task(reader.wait(id, 30))
        await _until_waiting(reader, store, [id])
        store._records[id].pop("watchers")
        await store.end(id)

        assert await wait is WaitOutcome.ENDED


async def test_reader_goes_on_after_an_error_that_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CutStore()
    (id,) = await _stored(store, 1)
    read, failures = store.read_replies, [ValueError("odd")]

    async def read_after_failing(replica: ReplicaId, after: str, *, block_seconds: float) -> list[Reply]:
        if failures:
            raise failures.pop()
        return await read(replica, after, block_seconds=block_seconds)

    monkeypatch.setattr(store, "read_replies", read_after_failing)
    async with _running(store) as reader:
        wait = asyncio.create_task(reader.wait(id, 30))
        await _until_waiting(reader, store, [id])
        await store.end(id)

        assert await wait is WaitOutcome.ENDED
    assert "ValueError" in caplog.text


async def test_client_that_leaves_ends_the_wait() -> None:
    loop = asyncio.get_running_loop()
    ending, client_gone = loop.create_future(), loop.create_future()
    client_gone.set_result(None)

    assert await wait_for(ending, 30, client_gone=client_gone) is WaitOutcome.CLIENT_GONE
    ending.set_result(None)
    assert await wait_for(ending, 30, client_gone=client_gone) is WaitOutcome.ENDED
