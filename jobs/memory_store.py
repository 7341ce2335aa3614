"""Both halves of the store, the registry and a publisher, in one process.

For tests of the API and the workers that need no Redis: it passes the same contract tests as the
real one, and nothing else is promised. Moves are made under one lock, as Redis makes them one at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic

from jobs.errors import IdempotencyMismatch, QueueFull
from jobs.model import Failure, ItemResult, Job, JobId, JobResult, LeaseToken, NewJob, ReplicaId, WorkerId
from jobs.record import (
    CLAIMED_FIELDS,
    JOB_FIELDS,
    item_fields,
    new_record,
    settlement_fields,
    to_claim,
    to_job,
    to_refusal,
    worker_lost_failure,
)
from jobs.registry import ALIVE_SECONDS, ModelCard, ServedModel
from jobs.schedule import Advance
from jobs.states import JobState
from jobs.store import (
    FORGIVEN_LIMIT,
    CancelOutcome,
    Claim,
    ClaimOutcome,
    Created,
    RenewOutcome,
    Reply,
    Settlement,
    SettleOutcome,
)

_POLL_SECONDS = 0.005

_UNENDED = {
    JobState.CANCELLED: Failure(
        reason="cancelled", message="the job was cancelled before this prompt was done", retryable=True
    ),
    JobState.EXPIRED: Failure(
        reason="expired", message="the deadline passed before this prompt was done", retryable=True
    ),
}
"""As in `lua/_common.lua`."""


@dataclass
class MemoryStore:
    """Both halves of the store, `ReplyStream`, `ModelDirectory`, `ModelAnnouncer` and `Publisher` in one."""

    result_ttl_seconds: int = 24 * 3600
    published: list[tuple[JobId, str]] = field(default_factory=list)
    """(job, queue) of every message, oldest first."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._records: dict[JobId, dict[str, str]] = {}
        self._items: dict[JobId, dict[str, str]] = {}
        self._open: dict[str, dict[JobId, float]] = {}
        self._idempotency: dict[str, tuple[JobId, str]] = {}
        self._streams: dict[str, list[tuple[int, JobId, str]]] = {}
        self._position = 0
        self._cards: dict[str, ModelCard] = {}
        self._tokenizers: dict[str, str] = {}
        self._beats: dict[str, dict[WorkerId, float]] = {}

    # The API's half

    async def create(self, job: NewJob, *, max_open: int) -> Created:
        with self._lock:
            if job.id in self._records:
                return Created(job.id, replayed=False)
            if job.idempotency_key and (earlier := self._idempotency.get(job.idempotency_key)):
                if earlier[1] != (job.fingerprint or ""):
                    raise IdempotencyMismatch(
                        f"the idempotency key was used for job {earlier[0]} with another body"
                    )
                return Created(earlier[0], replayed=True)
            ledger = self._open.setdefault(job.queue, {})
            if len(ledger) >= max_open:
                raise QueueFull(job.queue, len(ledger), max_open)
            self._records[job.id] = new_record(job)
            ledger[job.id] = job.created_at
            if job.idempotency_key:
                self._idempotency[job.idempotency_key] = (job.id, job.fingerprint or "")
            if job.start_at is None:
                self.published.append((job.id, job.queue))
            else:
                self._records[job.id]["next_attempt_at"] = repr(job.start_at)
            return Created(job.id, replayed=False)

    async def get(self, id: JobId, *, with_result: bool = False) -> Job | None:
        with self._lock:
            record = self._records.get(id)
            if record is None:
                return None
            names = [*JOB_FIELDS, "result"] if with_result else [*JOB_FIELDS]
            return to_job({name: record.get(name) for name in names})

    async def cancel(self, id: JobId, *, now: float) -> CancelOutcome:
        with self._lock:
            record = self._records.get(id)
            if record is None:
                return CancelOutcome.MISSING
            match JobState(record["state"]):
                case JobState.QUEUED:
                    self._finish(record, JobState.CANCELLED, now)
                    return CancelOutcome.CANCELLED
                case JobState.IN_PROGRESS:
                    record["state"] = JobState.CANCELLING.value
                    record["cancelling_at"] = repr(now)
                    self._append(f"cancels:{record['worker']}", id, "")
                    self._notify(record)
                    return CancelOutcome.CANCELLING
                case JobState.CANCELLING:
                    return CancelOutcome.CANCELLING
                case _:
                    return CancelOutcome.FINAL

    async def watch(self, id: JobId, replica: ReplicaId) -> JobState | None:
        with self._lock:
            record = self._records.get(id)
            if record is None:
                return None
            state = JobState(record["state"])
            watchers = record.get("watchers", "").split()
            if not state.is_final and replica not in watchers:
                record["watchers"] = " ".join([*watchers, replica])
            return state

    async def read_replies(self, replica: ReplicaId, after: str, *, block_seconds: float) -> list[Reply]:
        deadline = monotonic() + block_seconds
        while True:
            entries = self._read(f"replies:{replica}", after)
            if entries or monotonic() >= deadline:
                return [Reply(str(position), id, JobState(state)) for position, id, state in entries]
            await asyncio.sleep(_POLL_SECONDS)

    async def forget_replica(self, replica: ReplicaId) -> None:
        with self._lock:
            self._streams.pop(f"replies:{replica}", None)

    async def ping(self) -> None:
        return None

    # A worker's half

    async def claim(
        self,
        id: JobId,
        token: LeaseToken,
        worker: WorkerId,
        *,
        now: float,
        lease_seconds: float,
        traceparent: str | None = None,
    ) -> Claim:
        with self._lock:
            record = self._records.get(id)
            if record is None:
                return Claim(ClaimOutcome.MISSING)
            lost_since = "" if record["state"] == JobState.QUEUED else record.get("in_progress_at", "")
            if (ended := self._refuse_or_end(record, token, now)) is not None:
                if ended in (ClaimOutcome.HELD, ClaimOutcome.WAITING):
                    return Claim(ended)
                is_final = ended is ClaimOutcome.FINAL
                is_told = ended in (ClaimOutcome.FINAL, ClaimOutcome.EXHAUSTED)
                return to_refusal(
                    ended,
                    record["attempts"],
                    record.pop("vanished_since", "") if is_final else lost_since,
                    record["state"] if is_told else "",
                    record.get("released_at", ""),
                    "1" if _ended_in_queue(record) else "",
                    record.get("published_at", ""),
                )
            if record.get("lease_token") != token:
                record.update(
                    attempts=str(int(record["attempts"]) + 1),
                    state=JobState.IN_PROGRESS.value,
                    in_progress_at=repr(now),
                    worker=worker,
                    lease_token=token,
                    lease_expires_at=repr(now + lease_seconds),
                    previous_traceparent=record.get("attempt_traceparent", ""),
                    lost_since=lost_since,
                    attempt_traceparent=traceparent or "",
                )
                record.pop("failure", None)
                record.pop("alone", None)
                self._notify(record)
            items = [part for pair in self._items.get(id, {}).items() for part in pair]
            return to_claim(*(record.get(name, "") for name in CLAIMED_FIELDS), items=items)

    def _refuse_or_end(self, record: dict[str, str], token: LeaseToken, now: float) -> ClaimOutcome | None:
        """Why the job cannot be claimed, ending it where its time, its attempts or a cancel say so."""
        state = JobState(record["state"])
        if state.is_final:
            return ClaimOutcome.FINAL
        if "next_attempt_at" in record:
            return ClaimOutcome.WAITING
        if state is not JobState.QUEUED:
            if record["lease_token"] == token:
                return None
            if float(record["lease_expires_at"]) > now:
                return ClaimOutcome.HELD
        if state is JobState.CANCELLING:
            self._finish(record, JobState.CANCELLED, now)
            return ClaimOutcome.CANCELLED
        if state is JobState.IN_PROGRESS and "alone" not in record:
            _forgive(record)
        if "expires_at" in record and float(record["expires_at"]) <= now:
            self._finish(record, JobState.EXPIRED, now)
            return ClaimOutcome.EXPIRED
        if _num_counted(record) >= int(record["max_attempts"]):
            record.setdefault("failure", worker_lost_failure().model_dump_json())
            self._finish(record, JobState.FAILED, now)
            return ClaimOutcome.EXHAUSTED
        return None

    def renew(
        self, held: dict[JobId, LeaseToken], *, now: float, lease_seconds: float
    ) -> dict[JobId, RenewOutcome]:
        with self._lock:
            return {id: self._renew(id, token, now + lease_seconds) for id, token in held.items()}

    def _renew(self, id: JobId, token: LeaseToken, lease_expires_at: float) -> RenewOutcome:
        record = self._records.get(id, {})
        if record.get("lease_token") != token:
            return RenewOutcome.LOST
        record["lease_expires_at"] = repr(lease_expires_at)
        is_cancelling = record["state"] == JobState.CANCELLING
        return RenewOutcome.CANCELLING if is_cancelling else RenewOutcome.RENEWED

    async def settle(
        self, id: JobId, token: LeaseToken, settlement: Settlement, *, now: float, message_tag: str = ""
    ) -> SettleOutcome:
        with self._lock:
            record = self._records.get(id)
            if record is None:
                return SettleOutcome.MISSING
            if record.get("ended_by") != token:
                if record.get("lease_token") != token:
                    return SettleOutcome.LOST
                record["ended_by"] = token
                state = settlement.state
                if record["state"] == JobState.CANCELLING:
                    state = JobState.CANCELLED
                else:
                    record.update(settlement_fields(settlement))
                self._finish(record, state, now)
            is_wish = settlement.state is JobState.CANCELLED or record["state"] != JobState.CANCELLED
            return SettleOutcome.SETTLED if is_wish else SettleOutcome.CANCELLED

    async def keep(
        self, id: JobId, token: LeaseToken, items: Mapping[int, ItemResult], *, completed: int, failed: int
    ) -> bool:
        with self._lock:
            record = self._records.get(id, {})
            if record.get("lease_token") != token:
                return False
            self._items.setdefault(id, {}).update(item_fields(items))
            record.update(items_completed=str(completed), items_failed=str(failed))
            return True

    async def mark_alone(self, id: JobId, token: LeaseToken) -> bool:
        with self._lock:
            record = self._records.get(id, {})
            if record.get("lease_token") != token:
                return False
            record["alone"] = "1"
            return True

    async def release(
        self,
        id: JobId,
        token: LeaseToken,
        *,
        now: float,
        failure: Failure | None = None,
        is_forgiven: bool = False,
        next_attempt_at: float | None = None,
        message_tag: str = "",
    ) -> SettleOutcome:
        with self._lock:
            record = self._records.get(id)
            if record is None:
                return SettleOutcome.MISSING
            if record.get("ended_by") == token and record["state"] == JobState.CANCELLED:
                return SettleOutcome.CANCELLED
            if record.get("lease_token") != token:
                return SettleOutcome.LOST
            if record["state"] == JobState.CANCELLING:
                record["ended_by"] = token
                self._finish(record, JobState.CANCELLED, now)
                return SettleOutcome.CANCELLED
            if failure is None:
                record["attempts"] = str(int(record["attempts"]) - 1)
            else:
                record["failure"] = failure.model_dump_json()
                if is_forgiven:
                    _forgive(record)
            record["state"] = JobState.QUEUED.value
            record["released_at"] = repr(now)
            self._drop_lease(record)
            self._notify(record)
            if next_attempt_at is None or _num_counted(record) >= int(record["max_attempts"]):
                return SettleOutcome.SETTLED
            record["next_attempt_at"] = repr(next_attempt_at)
            return SettleOutcome.WAITING

    def advance(self, *, now: float) -> Advance:
        """As `jobs.schedule.Schedule`; waiting jobs that end are published too."""
        with self._lock:
            overdue = [id for id in self._ids_at("expires_at", now) if self._is_ended_by_time(id, now)]
            due = self._ids_at("next_attempt_at", now)
            for id in due:
                self._publish_due(self._records[id], now)
            return Advance(num_ended=len(overdue), num_published=len(due))

    def _ids_at(self, name: str, now: float) -> list[JobId]:
        return [
            id
            for id, record in self._records.items()
            if name in record and float(record[name]) <= now and not JobState(record["state"]).is_final
        ]

    def _is_ended_by_time(self, id: JobId, now: float) -> bool:
        record = self._records[id]
        if "lease_expires_at" in record:
            if float(record["lease_expires_at"]) > now:
                return False
            record["vanished_since"] = record["in_progress_at"]
        is_cancelling = record["state"] == JobState.CANCELLING
        self._finish(record, JobState.CANCELLED if is_cancelling else JobState.EXPIRED, now)
        return True

    def _publish_due(self, record: dict[str, str], now: float) -> None:
        del record["next_attempt_at"]
        record["published_at"] = repr(now)
        self.published.append((JobId(record["id"]), record["queue"]))

    def read_cancels(self, worker: WorkerId, after: str, *, block_seconds: float) -> list[tuple[str, JobId]]:
        deadline = monotonic() + block_seconds
        while not (entries := self._read(f"cancels:{worker}", after)) and monotonic() < deadline:
            threading.Event().wait(_POLL_SECONDS)
        return [(str(position), id) for position, id, _ in entries]

    # Registry and publisher

    async def list_models(self, *, now: float) -> list[ServedModel]:
        with self._lock:
            return [ServedModel(card, self._count_alive(card.name, now)) for card in self._cards.values()]

    def _count_alive(self, model: str, now: float) -> int:
        return sum(beat >= now - ALIVE_SECONDS for beat in self._beats.get(model, {}).values())

    async def tokenizer_json(self, digest: str) -> str | None:
        return self._tokenizers.get(digest)

    def announce(self, card: ModelCard, tokenizer_json: str) -> None:
        with self._lock:
            self._cards[card.name] = card
            self._tokenizers[card.tokenizer_digest] = tokenizer_json

    def beat(self, model: str, worker: WorkerId, *, now: float) -> None:
        with self._lock:
            self._beats.setdefault(model, {})[worker] = now

    def leave(self, model: str, worker: WorkerId) -> None:
        with self._lock:
            self._beats.get(model, {}).pop(worker, None)

    def publish(self, id: JobId, queue: str, *, enqueued_at_ns: int) -> None:
        with self._lock:
            self.published.append((id, queue))

    # Shared

    def _finish(self, record: dict[str, str], state: JobState, now: float) -> None:
        if "next_attempt_at" in record:
            self._publish_due(record, now)
        items = self._items.pop(JobId(record["id"]), {})
        if items and "result" not in record:
            result = _gathered(record, state, items)
            record.update(settlement_fields(Settlement(state, result=result)))
            if state is JobState.FAILED and result.failure is None:
                state = JobState.COMPLETED
        record.update(
            state=state.value, finished_at=repr(now), result_expires_at=repr(now + self.result_ttl_seconds)
        )
        self._drop_lease(record)
        if state is not JobState.FAILED:
            record.pop("request", None)
        self._open[record["queue"]].pop(JobId(record["id"]), None)
        self._notify(record)

    @staticmethod
    def _drop_lease(record: dict[str, str]) -> None:
        for name in ("lease_token", "lease_expires_at", "worker"):
            record.pop(name, None)

    def _notify(self, record: dict[str, str]) -> None:
        for replica in record.get("watchers", "").split():
            self._append(f"replies:{replica}", JobId(record["id"]), record["state"])

    def _append(self, stream: str, id: JobId, state: str) -> None:
        self._position += 1
        self._streams.setdefault(stream, []).append((self._position, id, state))

    def _read(self, stream: str, after: str) -> list[tuple[int, JobId, str]]:
        with self._lock:
            return [entry for entry in self._streams.get(stream, []) if entry[0] > int(after)]


@dataclass(frozen=True, slots=True)
class MemorySchedule:
    """`jobs.schedule.AsyncSchedule` over a store."""

    store: MemoryStore

    async def advance(self, *, now: float) -> Advance:
        return self.store.advance(now=now)


def _gathered(record: dict[str, str], state: JobState, items: Mapping[str, str]) -> JobResult:
    """The result of a job that ends before all its items did."""
    other = ItemResult(failure=_UNENDED.get(state) or Failure.model_validate_json(record["failure"]))
    stored = {int(index): ItemResult.model_validate_json(item) for index, item in items.items()}
    return JobResult(items=tuple(stored.get(index, other) for index in range(int(record["num_prompts"]))))


def _ended_in_queue(record: dict[str, str]) -> bool:
    claimed_at, released_at = record.get("in_progress_at", ""), record.get("released_at", "")
    return not claimed_at or (bool(released_at) and float(released_at) >= float(claimed_at))


def _num_forgiven(record: dict[str, str]) -> int:
    return int(record.get("forgiven", "0"))


def _num_counted(record: dict[str, str]) -> int:
    return int(record["attempts"]) - _num_forgiven(record)


def _forgive(record: dict[str, str]) -> None:
    if _num_forgiven(record) < FORGIVEN_LIMIT:
        record["forgiven"] = str(_num_forgiven(record) + 1)
