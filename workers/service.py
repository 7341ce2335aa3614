"""One worker: its engine, its leases and its place in the registry, started and stopped in order.

start: engine (model loaded) ─▶ leases, cancels ─▶ reconciler ─▶ announce the model ─▶ Celery consumes
stop:  leave the registry ─▶ reconciler ─▶ leases ─▶ engine ─▶ spans flushed
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable

from celery import Celery

from engine.config import EngineConfig
from jobs.clock import SystemClock
from jobs.errors import StoreUnavailable
from jobs.garbage import collect_seldom
from jobs.keys import Keys
from jobs.ledger import Ledger
from jobs.model import PRIORITIES, WorkerId
from jobs.queue import CeleryPublisher
from jobs.redis_connection import connect
from jobs.redis_registry import RedisModelAnnouncer
from jobs.redis_store import RedisAttemptStore
from jobs.registry import BEAT_SECONDS, ModelCard, queue_name
from jobs.schedule import RedisSchedule
from jobs.settings import JobsSettings
from telemetry.celery import instrument_celery
from telemetry.meter import Metrics, build_metrics, shut_down
from telemetry.metrics_port import MetricsPort, open_port
from telemetry.setup import Telemetry, configure
from workers.attempts.attempt import AttemptRunner, Verdict
from workers.attempts.holding import Holding
from workers.attempts.measure import SILENT, WorkerMetrics
from workers.attempts.observe import AttemptObserver
from workers.attempts.pause import RetryPause
from workers.broker import channel
from workers.broker.message_lease import HeldMessages
from workers.broker.reconcile import Reconciler
from workers.delivery import Delivery
from workers.engines.child_runtime import ChildRuntime
from workers.engines.inline_runtime import InlineRuntime
from workers.engines.protocol import ModelFacts, StepTally
from workers.engines.runtime import Runtime
from workers.engines.steps import StepTracer
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

SERVICE_NAME = "throughline-worker"

CreateRuntime = Callable[[WorkerSettings, Callable[[str], None], Callable[[StepTally], None]], Runtime]
"""From the settings, what to call when the engine is gone for good, and what to call with its tallies."""


def engine_runtime(
    settings: WorkerSettings, on_fatal: Callable[[str], None], on_steps: Callable[[StepTally], None]
) -> Runtime:
    """The engine that the settings describe, not yet started."""
    config = EngineConfig(
        model=settings.model_source,
        dtype=settings.dtype,
        device=settings.device,
        tensor_parallel_size=settings.tensor_parallel_size,
        max_model_len=settings.max_model_len,
        max_num_sequences=settings.max_num_sequences,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_sequences),
        kv_cache_dtype=settings.kv_cache_dtype,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_memory_share=settings.gpu_memory_share,
        decode_graphs=settings.decode_graphs,
        async_steps=settings.async_steps,
        keeps_prefixes=settings.prefix_cache,
        num_speculative_tokens=settings.speculative_tokens,
        num_threads=settings.engine_threads,
        kernels=settings.kernels,
        is_batch_invariant=settings.batch_invariant,
    )
    steps = StepTracer(settings.step_sampling)
    if settings.engine == "inline":
        return InlineRuntime(config, on_steps=on_steps, steps=steps)
    return ChildRuntime(
        config,
        start_seconds=settings.engine_start_seconds,
        stall_seconds=settings.engine_stall_seconds,
        on_fatal=on_fatal,
        on_steps=on_steps,
        steps=steps,
    )


class WorkerService:
    def __init__(
        self,
        settings: WorkerSettings,
        jobs_settings: JobsSettings,
        app: Celery,
        create_runtime: CreateRuntime = engine_runtime,
    ) -> None:
        self.worker = WorkerId(f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}")
        self._settings = settings
        self._jobs_settings = jobs_settings
        self._app = app
        self._clock = SystemClock()
        self._client = connect(jobs_settings)
        self._store = RedisAttemptStore(self._client, jobs_settings)
        self._announcer = RedisModelAnnouncer(self._client, jobs_settings)
        self._ledger = Ledger(self._client, jobs_settings)
        self._schedule = RedisSchedule(self._client, jobs_settings)
        self._messages = HeldMessages()
        self._messages.install(app)
        self._message_settled = channel.install(self._client, Keys(jobs_settings.key_prefix))
        self._metrics = SILENT  # until start() has read the telemetry's settings
        self._runtime = create_runtime(settings, self._give_up, lambda tally: self._metrics.stepped(tally))
        self._is_stopping = threading.Event()
        self._holding = Holding(
            self._store,
            self.worker,
            self._clock,
            lease_seconds=jobs_settings.lease_seconds,
            renew_seconds=jobs_settings.renew_seconds,
            is_healthy=self._runtime.is_healthy,
            keep_messages=lambda now: self._ledger.keep_messages(self._messages.tags(), now=now),
            metrics=lambda: self._metrics,
        )
        self._reconciler: Reconciler | None = None
        self._telemetry: Telemetry | None = None
        self._meter: Metrics | None = None
        self._metrics_port: MetricsPort | None = None
        self._runner: AttemptRunner | None = None

    @property
    def queues(self) -> tuple[str, ...]:
        return tuple(queue_name(self._settings.names[0], priority) for priority in PRIORITIES)

    def start(self) -> None:
        """Block until the model is loaded and announced.

        Raises:
            EngineStartError: one line for the operator.
        """
        self._telemetry = configure(SERVICE_NAME)
        instrument_celery(uses_links_only=self._telemetry.settings.uses_links_only)
        self._start_metrics(self._telemetry)
        facts = self._runtime.start()
        self._runner = self._create_runner(self._telemetry)
        self._holding.start()
        self._reconciler = Reconciler(
            self._schedule,
            self._ledger,
            CeleryPublisher(self._app),
            self._clock,
            self.worker,
            self._metrics,
        )
        self._reconciler.start()
        collect_seldom()
        self._announce(facts)

    async def run(self, delivery: Delivery) -> Verdict:
        assert self._runner is not None, "start() comes first"
        return await self._runner.run(delivery)

    def stop(self) -> None:
        self._is_stopping.set()
        try:
            self._announcer.leave(self._settings.names[0], self.worker)
        except StoreUnavailable:
            logger.info("could not take leave; the registry will forget this worker by itself")
        if self._reconciler is not None:
            self._reconciler.stop()
        self._holding.stop()
        self._runtime.stop()
        if self._metrics_port is not None:
            self._metrics_port.close()
        if self._telemetry is not None and self._meter is not None:
            shut_down(self._telemetry, self._meter)

    def _start_metrics(self, telemetry: Telemetry) -> None:
        settings = self._settings
        self._meter = build_metrics(SERVICE_NAME, telemetry.settings, os.environ)
        self._metrics = WorkerMetrics(self._meter.meter, settings.names[0])
        self._metrics.watch_engine(self._runtime.last_stats)
        telemetry.show_losses(self._meter.meter)
        if settings.metrics_port:
            self._metrics_port = open_port(self._meter, settings.metrics_host, settings.metrics_port)

    def _create_runner(self, telemetry: Telemetry) -> AttemptRunner:
        return AttemptRunner(
            store=self._store,
            runtime=self._runtime,
            holding=self._holding,
            observer=AttemptObserver(
                self._settings.names[0],
                telemetry.settings.captures_content,
                self._metrics,
                max_item_spans=self._settings.trace_item_spans,
                uses_vllm_keys=telemetry.settings.uses_vllm_keys,
                uses_links_only=telemetry.settings.uses_links_only,
            ),
            clock=self._clock,
            worker=self.worker,
            lease_seconds=self._jobs_settings.lease_seconds,
            is_stopping=self._is_stopping,
            message_settled=self._message_settled,
            pause=RetryPause(self._settings.retry_pause_seconds, self._settings.retry_pause_max_seconds),
        )

    def _announce(self, facts: ModelFacts) -> None:
        card = ModelCard(
            name=self._settings.names[0],
            aliases=self._settings.names[1:],
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
            max_num_sequences=self._settings.max_num_sequences,
            architecture=facts.architecture,
            dtype=self._settings.dtype,
            device=facts.device,
            tokenizer_digest=hashlib.sha256(facts.tokenizer_json.encode()).hexdigest(),
        )
        threading.Thread(
            target=self._beat, args=(card, facts.tokenizer_json), name="registry-beat", daemon=True
        ).start()

    def _beat(self, card: ModelCard, tokenizer_json: str) -> None:
        """Announce, then say every BEAT_SECONDS that we live; announce again after a Redis that forgot."""
        is_announced = False
        while True:
            try:
                if not is_announced:
                    self._announcer.announce(card, tokenizer_json)
                    logger.info("serving %s", ", ".join((card.name, *card.aliases)))
                    is_announced = True
                if self._runtime.is_healthy():
                    self._announcer.beat(card.name, self.worker, now=self._clock.now())
            except StoreUnavailable:
                is_announced = False
            if self._is_stopping.wait(BEAT_SECONDS):
                return

    def _give_up(self, reason: str) -> None:
        """The engine is gone for good: stop as on SIGTERM, so that held jobs go back to the queue."""
        logger.critical("the engine cannot be brought back, the worker stops: %s", reason)
        os.kill(os.getpid(), signal.SIGTERM)
