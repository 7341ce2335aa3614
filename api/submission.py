"""Accepting a job: stored and in its queue by one act, and only then told to the client.

    make the message (Celery) ──▶ create (job, ledger, message, watcher: one script) ──▶ accepted
                                                    │ failed
                                                    └──▶ 503: nothing of it is there, or all of it

All of it is there when only the answer was lost: a client that repeats with a key then gets that job.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from api.measure import SILENT, ApiMetrics
from jobs.clock import Clock
from jobs.errors import JobsError
from jobs.model import JobId, NewJob
from jobs.store import CancelOutcome, SubmissionStore
from telemetry.celery import sending
from telemetry.spans import store_job

_logger = logging.getLogger(__name__)

CLEANUP_SECONDS = 2.0
"""How long a shutdown waits for cancellations under way."""


@dataclass(frozen=True, slots=True)
class Accepted:
    id: JobId
    replayed: bool
    """An earlier job, found by its idempotency key."""


class Submission:
    """Puts jobs into the store and their queue, and takes them back."""

    def __init__(
        self,
        store: SubmissionStore,
        clock: Clock,
        *,
        max_open_jobs: int,
        metrics: ApiMetrics = SILENT,
    ) -> None:
        self._store = store
        self._clock = clock
        self._max_open_jobs = max_open_jobs
        self._metrics = metrics
        self._cleanups: set[asyncio.Task[None]] = set()

    async def submit(self, job: NewJob) -> Accepted:
        """The job is stored and in its queue.

        Raises:
            StoreUnavailable: it may be, all the same: the answer may be what was lost.
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
        with store_job(job.id), sending() as sent:
            created = await self._store.create(job, max_open=self._max_open_jobs)
            if created.replayed:
                sent.withdraw()
        return Accepted(created.id, replayed=created.replayed)

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
