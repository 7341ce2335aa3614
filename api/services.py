"""What the routes work with, and where it comes from: Redis in production, one process's memory in tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated
from uuid import uuid4

from fastapi import Depends, Request

from api import schedule
from api.catalog import Catalog
from api.intake import Intake, IntakeLimits
from api.measure import SILENT, ApiMetrics, QueueWatch
from api.prompts import Prompts
from api.settings import ApiSettings
from api.submission import Submission
from api.trace_link import TraceLinks
from api.waiting import READ_SECONDS, ReplyReader
from jobs.backlog import BacklogReader, RedisBacklog
from jobs.clock import Clock, SystemClock
from jobs.errors import StoreUnavailable
from jobs.message import MessageMaker
from jobs.model import ReplicaId
from jobs.queue import create_celery
from jobs.redis_connection import connect_async, connect_reader
from jobs.redis_registry import RedisModelDirectory
from jobs.redis_store import RedisReplyStream, RedisSubmissionStore
from jobs.registry import ModelDirectory
from jobs.schedule import AsyncSchedule, RedisAsyncSchedule
from jobs.settings import JobsSettings
from jobs.store import ReplyStream, SubmissionStore

FORGET_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Backends:
    """The outside world of the API."""

    store: SubmissionStore
    reply_stream: ReplyStream
    """Of the same store, over a connection of its own."""
    directory: ModelDirectory
    clock: Clock
    schedule: AsyncSchedule
    backlog: BacklogReader | None = None
    """For the queues' gauges; without it there are none."""


Connect = Callable[[], AbstractAsyncContextManager[Backends]]


@dataclass(frozen=True, slots=True)
class Services:
    settings: ApiSettings
    clock: Clock
    started_at: float
    """Unix seconds."""
    store: SubmissionStore
    catalog: Catalog
    intake: Intake
    submission: Submission
    replies: ReplyReader
    trace_links: TraceLinks


async def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Ready = Annotated[Services, Depends(get_services)]


def redis_backends(settings: JobsSettings) -> Connect:
    """Store, registry and broker in the settings' Redis."""

    @asynccontextmanager
    async def connect() -> AsyncIterator[Backends]:
        client = connect_async(settings)
        clock = SystemClock()
        messages = MessageMaker(create_celery(settings), clock)
        reading = connect_reader(settings, block_seconds=READ_SECONDS)
        try:
            yield Backends(
                store=RedisSubmissionStore(client, settings, messages),
                reply_stream=RedisReplyStream(reading, settings),
                directory=RedisModelDirectory(client, settings),
                clock=clock,
                schedule=RedisAsyncSchedule(client, settings),
                backlog=RedisBacklog(client, settings),
            )
        finally:
            await reading.aclose()
            await client.aclose()

    return connect


@asynccontextmanager
async def run_services(
    settings: ApiSettings, connect: Connect, metrics: ApiMetrics = SILENT
) -> AsyncIterator[Services]:
    """Services whose reply reader runs; at the end nothing of them is left, here or in the store."""
    async with connect() as backends:
        services = _build(settings, backends, metrics)
        tasks = {
            asyncio.create_task(services.replies.run(), name="reply-reader"),
            asyncio.create_task(schedule.keep(backends.schedule, backends.clock), name="schedule"),
        }
        if backends.backlog is not None and metrics is not SILENT:
            watch = QueueWatch(backends.backlog, services.catalog, backends.clock)
            watch.show(metrics.meter)
            tasks.add(asyncio.create_task(watch.run(), name="queue-watch"))
        try:
            yield services
        finally:
            await services.submission.close()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            with suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(FORGET_SECONDS):
                    await services.store.forget_replica(services.replies.replica)


def _build(settings: ApiSettings, backends: Backends, metrics: ApiMetrics) -> Services:
    catalog = Catalog(backends.directory, backends.clock, expected=settings.served_model_names)
    intake_limits = IntakeLimits(
        max_prompts=settings.max_prompts,
        max_sequences=settings.max_sequences,
        max_attempts=settings.max_attempts,
    )
    return Services(
        settings=settings,
        clock=backends.clock,
        started_at=backends.clock.now(),
        store=backends.store,
        catalog=catalog,
        intake=Intake(catalog, Prompts(backends.directory), backends.clock, intake_limits),
        submission=Submission(
            backends.store, backends.clock, max_open_jobs=settings.max_open_jobs, metrics=metrics
        ),
        replies=ReplyReader(backends.store, backends.reply_stream, ReplicaId(f"api-{uuid4().hex}")),
        trace_links=TraceLinks(settings.trace_url_template),
    )
