"""The Celery app around one worker service: its configuration, its task, its start and stop."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any

from celery import Celery, signals
from celery.exceptions import Reject

from engine.errors import ConfigError
from jobs.errors import SettingsError
from jobs.model import JobId
from jobs.queue import ENQUEUED_AT_HEADER, GENERATE, create_celery, declare_queue
from jobs.settings import JobsSettings, Settings, read_settings
from telemetry import log
from telemetry.celery import creation_context
from workers.attempts.attempt import Verdict
from workers.broker.connection import SteadyConnection
from workers.coroutine_task import CoroutineTask
from workers.delivery import Delivery
from workers.errors import EngineStartError
from workers.pool import EnginePool
from workers.service import SERVICE_NAME, CreateRuntime, WorkerService, engine_runtime
from workers.settings import WorkerSettings

EXIT_CANNOT_SERVE = 3
"""The configuration or the model is at fault: starting again will not help."""

EXIT_TRY_AGAIN = 1
"""The engine was killed or stood still while it loaded."""

SWITCH_INTERVAL_SECONDS = 0.002
"""How long a busy thread may keep others from the interpreter. The default of 5 ms costs latency here, 0.5 ms
twice the context switches and a fifth more CPU a job."""


def create_worker(create_runtime: CreateRuntime = engine_runtime) -> Celery:
    """The app of this process's one worker, from the environment; a fault of it ends the process."""
    settings = _settings_or_exit(WorkerSettings)
    jobs_settings = _settings_or_exit(JobsSettings)
    app = create_celery(jobs_settings)
    try:
        service = WorkerService(settings, jobs_settings, app, create_runtime)
    except ConfigError as error:
        raise _refuse(error) from None
    _configure(app, settings, service)
    _declare_task(app, service)
    _run_with_celery(settings, service)
    return app


def _refuse(reason: object, code: int = EXIT_CANNOT_SERVE) -> SystemExit:
    """End the worker with one line for the operator."""
    print(f"throughline worker: {reason}", file=sys.stderr, flush=True)
    return SystemExit(code)


def _settings_or_exit(settings_class: type[Settings]) -> Settings:
    try:
        return read_settings(settings_class)
    except SettingsError as error:
        raise _refuse(error) from None


def _configure(app: Celery, settings: WorkerSettings, service: WorkerService) -> None:
    app.amqp.Connection = SteadyConnection
    app.conf.update(
        worker_pool="workers.pool:EnginePool",
        worker_concurrency=settings.concurrency,
        worker_prefetch_multiplier=1,
        task_acks_late=True,
        task_queues=[declare_queue(name) for name in service.queues],
        worker_send_task_events=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_channel_error_retry=True,  # a Redis that is full or read-only must not end its workers
    )


def _declare_task(app: Celery, service: WorkerService) -> None:
    async def run(delivery: Delivery) -> None:
        if await service.run(delivery) is Verdict.REQUEUE:
            raise Reject("given back", requeue=True)

    @app.task(
        name=GENERATE, base=CoroutineTask, bind=True, ignore_result=True, acks_late=True, throws=(Reject,)
    )  # type: ignore[untyped-decorator]  # celery's
    def generate(self: Any, job_id: str) -> Coroutine[Any, Any, None]:
        return run(_delivery(JobId(job_id), self.request))


def _delivery(id: JobId, request: Any) -> Delivery:
    delivery_info = request.delivery_info or {}
    enqueued_at_ns = (request.headers or {}).get(ENQUEUED_AT_HEADER) or request.get(ENQUEUED_AT_HEADER)
    return Delivery(
        id=id,
        queue=delivery_info.get("routing_key", ""),
        enqueued_at_ns=enqueued_at_ns,
        is_redelivered=bool(delivery_info.get("redelivered")),
        creation=creation_context(request),
        tag=(request.properties or {}).get("delivery_tag", ""),
    )


def _run_with_celery(settings: WorkerSettings, service: WorkerService) -> None:
    """Celery's signals start and stop the service; it keeps no other hold on it."""

    @signals.setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]  # celery's
    def configure_logging(**_: Any) -> None:
        """Our own format; Celery's two lines a task go, for the attempt logs its outcome itself."""
        log.configure_logging(SERVICE_NAME, log.LogFormat.from_environment(os.environ))
        for chatty in ("celery.worker.strategy", "celery.app.trace"):
            logging.getLogger(chatty).setLevel(logging.WARNING)

    @signals.worker_init.connect(weak=False)  # type: ignore[untyped-decorator]  # celery's
    def start(**_: Any) -> None:
        EnginePool.grace_seconds = settings.shutdown_grace_seconds
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        try:
            service.start()
        except EngineStartError as error:
            service.stop()
            raise _refuse(error, EXIT_CANNOT_SERVE if error.is_final else EXIT_TRY_AGAIN) from None

    @signals.worker_shutdown.connect(weak=False)  # type: ignore[untyped-decorator]  # celery's
    def stop(**_: Any) -> None:
        service.stop()
