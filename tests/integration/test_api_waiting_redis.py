from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from pydantic import SecretStr

from api import waiting
from api.waiting import ReplyReader, WaitOutcome
from jobs.clock import SystemClock
from jobs.message import MessageMaker
from jobs.model import JobId, ReplicaId, WorkerId, new_lease_token
from jobs.queue import create_celery
from jobs.redis_connection import connect, connect_async, connect_reader
from jobs.redis_store import RedisAttemptStore, RedisReplyStream, RedisSubmissionStore
from jobs.settings import JobsSettings
from jobs.states import JobState
from tests.support.job_factory import completed, new_job
from tests.support.valkey import ValkeyServer, running_valkey

REPLICA = ReplicaId("api-1")
NUM_WAITERS = 200


class Sides:
    """The API's store and reader, and a worker, on one server."""

    def __init__(self, valkey: ValkeyServer) -> None:
        settings = JobsSettings(redis_url=SecretStr(valkey.url), socket_timeout_seconds=3)
        self.valkey = valkey
        self._client, self._async_client = connect(settings), connect_async(settings)
        self._reading = connect_reader(settings, block_seconds=waiting.READ_SECONDS)
        messages = MessageMaker(create_celery(settings), SystemClock())
        self.store = RedisSubmissionStore(self._async_client, settings, messages)
        self._worker = RedisAttemptStore(self._client, settings)
        self.reader = ReplyReader(self.store, RedisReplyStream(self._reading, settings), REPLICA)

    async def create(self, num_jobs: int) -> list[JobId]:
        jobs = [new_job() for _ in range(num_jobs)]
        for job in jobs:
            await self.store.create(job, max_open=1000)
        return [job.id for job in jobs]

    async def until_watched(self, ids: list[JobId]) -> None:
        async with asyncio.timeout(10):
            for id in ids:
                while not self._client.hget(f"tl:job:{id}", "watchers"):
                    await asyncio.sleep(0.001)

    def end(self, ids: list[JobId]) -> None:
        async def end_all() -> None:
            for id in ids:
                token = new_lease_token()
                await self._worker.claim(id, token, WorkerId("worker-1"), now=1.0, lease_seconds=30)
                await self._worker.settle(id, token, completed(), now=2.0)

        asyncio.run(end_all())  # of the thread that plays the worker

    def drop_streams(self) -> None:
        self._client.delete(f"tl:replies:{REPLICA}")

    async def close(self) -> None:
        await self._reading.aclose()
        await self._async_client.aclose()
        self._client.close()


@pytest.fixture
async def sides() -> AsyncIterator[Sides]:
    with running_valkey() as valkey:
        sides = Sides(valkey)
        reading = asyncio.create_task(sides.reader.run())
        yield sides
        reading.cancel()
        await asyncio.wait({reading})
        await sides.close()


async def test_200_waiters_are_told_over_one_stream(sides: Sides) -> None:
    ids = await sides.create(NUM_WAITERS)
    waits = [asyncio.create_task(sides.reader.wait(id, 60)) for id in ids]
    await sides.until_watched(ids)

    await asyncio.to_thread(sides.end, ids)

    assert await asyncio.gather(*waits) == [WaitOutcome.ENDED] * NUM_WAITERS


async def test_nobody_is_lost_when_redis_is_killed_and_its_streams_are_gone(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "LONGEST_PAUSE_SECONDS", 0.1)
    ids = await sides.create(NUM_WAITERS)
    waits = [asyncio.create_task(sides.reader.wait(id, 60)) for id in ids]
    await sides.until_watched(ids)

    def kill_and_restart() -> None:
        sides.end(ids[:50])
        sides.valkey.kill()
        sides.valkey.start()
        sides.end(ids[50:100])
        sides.drop_streams()
        sides.end(ids[100:])

    await asyncio.to_thread(kill_and_restart)

    assert await asyncio.gather(*waits) == [WaitOutcome.ENDED] * NUM_WAITERS


async def test_job_that_a_routine_recheck_met_before_it_was_stored_is_waited_for(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cut is needed: the reader asks for all expected jobs every 30 s, and one may be on its way there."""
    monkeypatch.setattr(waiting, "RECHECK_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "READ_SECONDS", 0.01)
    job, seen = new_job(watcher=REPLICA), []
    watch = sides.store.watch

    async def watched(id: JobId, replica: ReplicaId) -> JobState | None:
        seen.append(await watch(id, replica))
        return seen[-1]

    monkeypatch.setattr(sides.store, "watch", watched)
    with sides.reader.expect(job.id) as ending:
        async with asyncio.timeout(10):
            while len(seen) < 3:
                await asyncio.sleep(0.001)
        assert seen[:3] == [None] * 3
        assert not ending.done()

        await sides.store.create(job, max_open=10)
        await asyncio.to_thread(sides.end, [job.id])
        assert await waiting.wait_for(ending, 10) is WaitOutcome.ENDED
    done = await sides.store.get(job.id)
    assert done is not None
    assert done.state is JobState.COMPLETED
