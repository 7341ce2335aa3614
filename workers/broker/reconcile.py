"""Publishes what is due, and again what the broker has lost.

The first every worker does, and the API's processes beside them: see `jobs.schedule`. The second one worker
at a time; see `jobs.ledger` for why.
"""

from __future__ import annotations

import logging
import threading

from jobs.clock import Clock
from jobs.errors import StoreUnavailable
from jobs.ledger import Ledger, LostJob
from jobs.model import JobId, WorkerId
from jobs.queue import Publisher
from jobs.schedule import TICK_SECONDS, Schedule
from telemetry.celery import publishing_again
from telemetry.log import logged_job
from telemetry.spans import extract
from workers.attempts.measure import SILENT, WorkerMetrics

logger = logging.getLogger(__name__)

SHORT_TIMES = 3
"""Counts that must be short in a row: storing and publishing are two acts."""


class Reconciler:
    def __init__(
        self,
        schedule: Schedule,
        ledger: Ledger,
        publisher: Publisher,
        clock: Clock,
        worker: WorkerId,
        metrics: WorkerMetrics = SILENT,
    ) -> None:
        self._schedule = schedule
        self._ledger = ledger
        self._metrics = metrics
        self._publisher = publisher
        self._clock = clock
        self._worker = worker
        self._num_short = 0
        self._suspects: frozenset[JobId] = frozenset()
        self._is_stopping = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="reconciler", daemon=True).start()

    def stop(self) -> None:
        self._is_stopping.set()

    def check(self) -> list[JobId]:
        """Compare once; the jobs that were published again.

        A job is published when it was lost at two looks in a row, the counts being short SHORT_TIMES before.
        """
        if not self._ledger.is_short():
            self._num_short, self._suspects = 0, frozenset()
            return []
        self._num_short += 1
        if self._num_short < SHORT_TIMES:
            return []
        lost = self._ledger.lost_jobs(now=self._clock.now())
        again = [job for job in lost if job.id in self._suspects]
        self._suspects = frozenset(job.id for job in lost) - {job.id for job in again}
        for job in again:
            self._publish(job)
        return [job.id for job in again]

    def _publish(self, job: LostJob) -> None:
        with logged_job(job.id), publishing_again(extract({"traceparent": job.traceparent})):
            logger.warning("the broker had lost this job; published again")
            self._publisher.publish(job.id, job.queue, enqueued_at_ns=int(self._clock.now() * 1e9))
        self._metrics.republished(job.queue)

    def _run(self) -> None:
        while not self._is_stopping.wait(TICK_SECONDS):
            try:
                while not self._schedule.advance(now=self._clock.now()).is_complete:
                    pass
                if self._ledger.take_turn(self._worker):
                    self.check()
            except StoreUnavailable as error:
                logger.warning("schedule and ledger were not looked at: %s", error)
