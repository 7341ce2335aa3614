"""What the API counts and times, and its watch over queues and workers.

    QueueWatch.run, every few seconds ──▶ Redis ──▶ a snapshot ◀── a scrape, or a push, reads it

Nobody who collects waits for Redis: while it is away there is no snapshot, and the gauges are absent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter

from opentelemetry.metrics import Meter, NoOpMeter, Observation
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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


_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT"})
_OTHER = "_OTHER"
"""The conventions' word for a method that is none: whoever sends it would choose a series' name."""


class ApiMetrics:
    """Safe from any thread."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._submitted = metrics.counter(meter, metrics.JOBS_SUBMITTED)
        self._http_duration = metrics.histogram(meter, metrics.HTTP_DURATION)

    def answered(self, scope: Scope, seconds: float, status: int | None) -> None:
        """Never a path: the route's pattern, and nothing where no route matched."""
        method = scope["method"]
        attributes: dict[str, AttributeValue] = {
            metrics.HTTP_METHOD: method if method in _METHODS else _OTHER,
            metrics.HTTP_SCHEME: scope["scheme"],
        }
        if (route := getattr(scope.get("route"), "path", None)) is not None:
            attributes[metrics.HTTP_ROUTE] = route
        if status is not None:
            attributes[metrics.HTTP_STATUS] = status
            if status >= 500:
                attributes[names.ERROR_TYPE] = str(status)
        self._http_duration.record(seconds, attributes)

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


class RequestTimes:
    """Times every request, streams to their end; inside the server span, which an exemplar then names."""

    def __init__(self, app: ASGIApp, *, counted: ApiMetrics) -> None:
        self._app = app
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started_at = perf_counter()
        try:
            await self._app(scope, receive, note_status)
        finally:
            self._counted.answered(scope, perf_counter() - started_at, status)


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
