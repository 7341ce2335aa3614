"""What the API counts, and its watch over queues and workers.

    QueueWatch.run, every few seconds ──▶ Redis ──▶ a snapshot ◀── a scrape, or a push, reads it

Nobody who collects waits for Redis: while it is away there is no snapshot, and the gauges are absent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opentelemetry.metrics import Meter, NoOpMeter, Observation

from api.catalog import Catalog
from jobs.backlog import BacklogReader, QueueBacklog
from jobs.clock import Clock
from jobs.errors import JobsError
from jobs.model import NewJob
from jobs.registry import ServedModel
from telemetry import metrics, names

POLL_SECONDS = 2.0
READ_SECONDS = 1.0
"""What one look may take; a store that needs longer counts as away."""


class ApiMetrics:
    """Safe from any thread."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._submitted = metrics.counter(meter, metrics.JOBS_SUBMITTED)

    def accepted(self, job: NewJob, *, replayed: bool) -> None:
        self._count(job, "replayed" if replayed else "accepted")

    def refused(self, job: NewJob, reason: str) -> None:
        """A sound job that the store or the broker did not take."""
        self._count(job, "refused", reason)

    def _count(self, job: NewJob, outcome: str, error_type: str | None = None) -> None:
        attributes = {
            metrics.MODEL: job.request.model,
            metrics.PRIORITY: job.priority,
            metrics.OUTCOME: outcome,
        }
        if error_type is not None:
            attributes[names.ERROR_TYPE] = error_type
        self._submitted.add(1, attributes)


SILENT = ApiMetrics(NoOpMeter(metrics.METER))
"""Counts nothing; for an app that nobody collects from."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    queues: list[QueueBacklog]
    models: list[ServedModel]


class QueueWatch:
    """Gauges of the queues and the live workers, as of the last look."""

    def __init__(self, backlog: BacklogReader, catalog: Catalog, clock: Clock) -> None:
        self._backlog = backlog
        self._catalog = catalog
        self._clock = clock
        self._snapshot: _Snapshot | None = None

    def show(self, meter: Meter) -> None:
        metrics.watch(meter, metrics.QUEUE_DEPTH, self._reading(lambda queue: queue.num_waiting))
        metrics.watch(meter, metrics.QUEUE_OPEN, self._reading(lambda queue: queue.num_open))
        metrics.watch(meter, metrics.QUEUE_OLDEST_AGE, self._reading(self._age))
        metrics.watch(meter, metrics.WORKERS, self._workers)

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(POLL_SECONDS)

    async def look(self) -> None:
        try:
            async with asyncio.timeout(READ_SECONDS):
                self._snapshot = _Snapshot(await self._backlog.read(), await self._catalog.models())
        except (JobsError, TimeoutError):
            self._snapshot = None

    def _age(self, queue: QueueBacklog) -> float:
        if queue.oldest_created_at is None:
            return 0.0
        return max(0.0, self._clock.now() - queue.oldest_created_at)

    def _reading(self, value: Callable[[QueueBacklog], float]) -> metrics.Read:
        def read() -> Iterable[Observation]:
            snapshot = self._snapshot
            queues = snapshot.queues if snapshot is not None else []
            return [Observation(value(queue), _queue_attributes(queue.queue)) for queue in queues]

        return read

    def _workers(self) -> Iterable[Observation]:
        snapshot = self._snapshot
        models = snapshot.models if snapshot is not None else []
        return [Observation(model.num_workers, {metrics.MODEL: model.card.name}) for model in models]


def _queue_attributes(queue: str) -> dict[str, str]:
    """See `jobs.registry.queue_name`."""
    model, _, priority = queue.rpartition(".")
    return {metrics.MODEL: model, metrics.PRIORITY: priority}
