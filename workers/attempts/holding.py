"""The jobs that this worker holds: their leases, deadlines and cancels.

One keeper thread renews all leases in one round trip while the engine is healthy; another hears cancels the
moment they are made. Both end an attempt by raising into its wait, never by touching its result.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from jobs.clock import Clock
from jobs.errors import StoreUnavailable
from jobs.model import JobId, LeaseToken, WorkerId
from jobs.store import AttemptStore, RenewOutcome
from workers.attempts.measure import SILENT, WorkerMetrics
from workers.errors import AttemptEnded, CancelWished, DeadlinePassed, LeaseLost

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""How finely deadlines are kept."""

CANCEL_WAIT_SECONDS = 2.0
"""How long one read of the cancel stream blocks; only shutdown waits for it."""


@dataclass(slots=True)
class HeldJob:
    id: JobId
    token: LeaseToken
    expires_at: float | None
    end: Callable[[AttemptEnded], None]
    """Makes the attempt's wait raise; the first call wins."""


class Holding:
    """Safe from any thread."""

    def __init__(
        self,
        store: AttemptStore,
        worker: WorkerId,
        clock: Clock,
        *,
        lease_seconds: float,
        renew_seconds: float,
        is_healthy: Callable[[], bool],
        keep_messages: Callable[[float], None] = lambda now: None,
        metrics: Callable[[], WorkerMetrics] = lambda: SILENT,
    ) -> None:
        """`keep_messages` is called with the time at each renewal, to renew the messages of the held jobs."""
        self._store = store
        self._worker = worker
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._is_healthy = is_healthy
        self._keep_messages = keep_messages
        self._metrics = metrics
        self._lock = threading.Lock()
        self._held: dict[LeaseToken, HeldJob] = {}
        self._is_stopping = threading.Event()

    def start(self) -> None:
        for target in (self._keep, self._hear_cancels):
            threading.Thread(target=target, name=f"holding-{target.__name__}", daemon=True).start()

    def stop(self) -> None:
        self._is_stopping.set()

    def hold(self, job: HeldJob) -> _Hold:
        """For the block."""
        return _Hold(self, job)

    def add(self, job: HeldJob) -> None:
        with self._lock:
            self._held[job.token] = job

    def remove(self, job: HeldJob) -> None:
        with self._lock:
            self._held.pop(job.token, None)

    def __len__(self) -> int:
        return len(self._held)

    def renew(self) -> None:
        """Renew every lease once and end the attempts that must not go on.

        Raises:
            StoreUnavailable: nothing changed; an overdue lease stays ours until another worker claims it.
        """
        self._keep_messages(self._clock.now())
        held = {job.id: job for job in self._snapshot()}
        outcomes = self._store.renew(
            {id: job.token for id, job in held.items()},
            now=self._clock.now(),
            lease_seconds=self._lease_seconds,
        )
        self._metrics().renewed(outcomes.values())
        for id, outcome in outcomes.items():
            match outcome:
                case RenewOutcome.LOST:
                    held[id].end(LeaseLost("the lease is another worker's"))
                case RenewOutcome.CANCELLING:
                    held[id].end(CancelWished("the client cancelled the job"))
                case RenewOutcome.RENEWED:
                    pass

    def end_overdue(self) -> None:
        now = self._clock.now()
        for job in self._snapshot():
            if job.expires_at is not None and job.expires_at <= now:
                job.end(DeadlinePassed("the job's deadline passed"))

    def _snapshot(self) -> list[HeldJob]:
        with self._lock:
            return list(self._held.values())

    def _keep(self) -> None:
        since_renewal = 0.0
        while not self._is_stopping.wait(TICK_SECONDS):
            self.end_overdue()
            since_renewal += TICK_SECONDS
            if since_renewal < self._renew_seconds or not self._is_healthy():
                continue
            try:
                self.renew()
                since_renewal = 0.0
            except StoreUnavailable as error:
                self._metrics().not_renewed(len(self))
                logger.warning("leases were not renewed, trying again: %s", error)

    def _hear_cancels(self) -> None:
        after = "0"
        while not self._is_stopping.is_set():
            try:
                told = self._store.read_cancels(self._worker, after, block_seconds=CANCEL_WAIT_SECONDS)
            except StoreUnavailable:
                self._is_stopping.wait(1.0)  # the renewal's warning says enough
                continue
            for position, id in told:
                after = position
                for job in self._snapshot():
                    if job.id == id:
                        job.end(CancelWished("the client cancelled the job"))


@dataclass(slots=True)
class _Hold:
    holding: Holding
    job: HeldJob

    def __enter__(self) -> None:
        self.holding.add(self.job)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.holding.remove(self.job)
