"""Accepting a job: stored, then published, and only then told to the client.

    create (job, ledger, watcher: one script) ──▶ publish (a thread) ──▶ accepted
                                                    │ failed
                                                    └──▶ discard, or keep if it has a key ──▶ 503

A job that was submitted with a key is kept when publishing fails: the client repeats with the key and gets
it, published then or by the reconciler. Discarding it could take a job from under a repeat that had been
answered already.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from api.measure import SILENT, ApiMetrics
from jobs.clock import Clock
from jobs.errors import JobsError, StoreUnavailable
from jobs.model import JobId, NewJob
from jobs.queue import Publisher
from jobs.states import JobState
from jobs.store import CancelOutcome, SubmissionStore
from telemetry.celery import publishing_again
from telemetry.spans import extract, store_job

_logger = logging.getLogger(__name__)

CLEANUP_SECONDS = 2.0
"""How long a shutdown waits for cancellations under way."""


@dataclass(frozen=True, slots=True)
class SubmissionLimits:
    max_open_jobs: int
    publish_threads: int
    publish_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Accepted:
    id: JobId
    replayed: bool
    """An earlier job, found by its idempotency key."""


class Submission:
    """Puts jobs into the store and the broker, and takes them back."""

    def __init__(
        self,
        store: SubmissionStore,
        publisher: Publisher,
        clock: Clock,
        limits: SubmissionLimits,
        metrics: ApiMetrics = SILENT,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._clock = clock
        self._limits = limits
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(limits.publish_threads, thread_name_prefix="publish")
        self._cleanups: set[asyncio.Task[None]] = set()

    async def submit(self, job: NewJob) -> Accepted:
        """The job is in store and broker, or neither.

        Raises:
            StoreUnavailable: one of them did not take it.
            QueueFull: too many open jobs in its queue.
            IdempotencyMismatch: the key was used before with another body.
        """
        try:
            accepted = await self._submit(job)
        except JobsError as error:
            self._metrics.refused(job, error.reason)
            raise
        self._metrics.accepted(job, replayed=accepted.replayed)
        return accepted

    async def _submit(self, job: NewJob) -> Accepted:
        with store_job(job.id):
            created = await self._store.create(job, max_open=self._limits.max_open_jobs)
        if created.replayed:
            await self._republish(created.id)
            return Accepted(created.id, replayed=True)
        try:
            await self._publish(job.id, job.queue)
        except StoreUnavailable:
            if job.idempotency_key or not await self._was_taken(job.id):
                raise
        return Accepted(job.id, replayed=False)

    async def cancel(self, id: JobId) -> CancelOutcome:
        return await self._store.cancel(id, now=self._clock.now())

    async def give_up(self, id: JobId) -> None:
        """Cancel a job that nobody waits for any more; a store that is away leaves it to its deadline."""
        try:
            await self.cancel(id)
        except JobsError as error:
            _logger.warning("Job %s was left running: its cancel failed (%s)", id, error.reason)

    def give_up_soon(self, id: JobId) -> None:
        """The same for a request that is being torn down and can wait for nothing."""
        task = asyncio.get_running_loop().create_task(self.give_up(id))
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    async def close(self) -> None:
        if self._cleanups:
            await asyncio.wait(self._cleanups, timeout=CLEANUP_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _publish(self, id: JobId, queue: str) -> None:
        # The context goes along, so that the producer span has the server span as its parent.
        call = partial(self._publisher.publish, id, queue, enqueued_at_ns=int(self._clock.now() * 1e9))
        in_context = partial(contextvars.copy_context().run, call)
        try:
            async with asyncio.timeout(self._limits.publish_timeout_seconds):
                await asyncio.get_running_loop().run_in_executor(self._threads, in_context)
        except TimeoutError as error:
            raise StoreUnavailable("the broker did not take the message in time") from error

    async def _republish(self, id: JobId) -> None:
        """Nobody knows whether the first request got as far as publishing; a second message is harmless."""
        job = await self._store.get(id)
        if job is None:
            raise StoreUnavailable("the earlier job with this idempotency key was just withdrawn")
        if job.state is JobState.QUEUED and job.attempts == 0:
            # Whichever message is taken, its worker's spans belong to the trace of the first request.
            with publishing_again(extract({"traceparent": job.traceparent})):
                await self._publish(id, job.queue)

    async def _was_taken(self, id: JobId) -> bool:
        """Withdraw a job that could not be published; True when a worker has it all the same."""
        try:
            if await self._store.discard(id):
                return False
        except StoreUnavailable:
            _logger.warning("Job %s could not be withdrawn; it may run though its client was refused", id)
            return False
        return await self._store.get(id) is not None
