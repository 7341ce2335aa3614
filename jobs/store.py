"""The two sides of the job store.

The API submits, reads, cancels and watches (`SubmissionStore`, async); a worker claims, renews and
settles (`AttemptStore`, blocking, called from many threads). Neither needs the other's half, so the
two share no code but the scripts. `jobs.redis_store` holds the real ones, `jobs.memory_store` one that lives
in a process and passes the same contract tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from jobs.model import (
    Failure,
    ItemResult,
    Job,
    JobId,
    JobRequest,
    JobResult,
    LeaseToken,
    NewJob,
    ReplicaId,
    Timings,
    WorkerId,
)
from jobs.states import JobState


@dataclass(frozen=True, slots=True)
class Created:
    id: JobId
    replayed: bool
    """True when the idempotency key had been used with the same body: `id` is the earlier job."""


class CancelOutcome(StrEnum):
    CANCELLED = "cancelled"
    """It was queued, and is now final."""
    CANCELLING = "cancelling"
    """A worker holds it and has been told."""
    FINAL = "final"
    """It had ended before; nothing changed."""
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Reply:
    """One move of a watched job, as read from the replica's reply stream."""

    position: str
    """Where to read on from."""
    id: JobId
    state: JobState


FORGIVEN_LIMIT = 10
"""Attempts of one job that may end in company without being counted: what kills workers before it can be
run alone must end too."""


class SubmissionStore(Protocol):
    """The API's half. Every method raises `StoreUnavailable` when the store does not answer."""

    async def create(self, job: NewJob, *, max_open: int) -> Created:
        """Write the job, its ledger entry and its message in the broker, or none of them.

        Safe to repeat with the same job: the second call changes nothing.

        Raises:
            QueueFull: the ledger of the job's queue holds `max_open` jobs.
            IdempotencyMismatch: the key came before with another fingerprint.
        """
        ...

    async def get(self, id: JobId, *, with_result: bool = False) -> Job | None: ...

    async def cancel(self, id: JobId, *, now: float) -> CancelOutcome: ...

    async def watch(self, id: JobId, replica: ReplicaId) -> JobState | None:
        """Tell `replica`'s reply stream of every later move; the state now, None when unknown.

        Read and subscription are one act, so no move falls between them.
        """
        ...

    async def forget_replica(self, replica: ReplicaId) -> None: ...

    async def ping(self) -> None: ...


class ReplyStream(Protocol):
    """What an API replica is told of the jobs that it watches; raises as `SubmissionStore`."""

    async def read_replies(self, replica: ReplicaId, after: str, *, block_seconds: float) -> list[Reply]:
        """The moves told to `replica` after a position ("0" is the start), waiting up to `block_seconds`."""
        ...


class ClaimOutcome(StrEnum):
    CLAIMED = "claimed"
    MISSING = "missing"
    """Unknown or past its retention: drop the message."""
    FINAL = "final"
    """It ended before (a second delivery, or cancelled while queued): drop the message."""
    HELD = "held"
    """Another worker's lease is still good: drop the message; the reconciler watches that lease."""
    WAITING = "waiting"
    """Its time has not come: drop the message; the job's own comes when it is due."""
    CANCELLED = "cancelled"
    """It was being cancelled when its worker died; this claim ended it."""
    EXPIRED = "expired"
    """Its deadline had passed; this claim ended it."""
    EXHAUSTED = "exhausted"
    """All its attempts are used up, the forgiven ones aside; now it has failed, of its last attempt's failure
    or of `worker_lost`. So have the items that had not ended; where others had completed, so is the job."""


@dataclass(frozen=True, slots=True)
class LostAttempt:
    """An attempt whose lease ran out: its worker died or was cut off, and told nothing of how it ended."""

    attempt: int
    started_at: float
    """Its claim, in Unix seconds."""


@dataclass(slots=True)
class Claim:
    outcome: ClaimOutcome
    attempt: int = 0
    """Which attempt this claim begins, from 1. Set when claimed."""
    request: JobRequest | None = None
    """Set when claimed."""
    queued_at: float = 0.0
    expires_at: float | None = None
    traceparent: str | None = None
    previous_traceparent: str | None = None
    """The span of the attempt before, however that one ended."""
    lost: LostAttempt | None = None
    """The attempt before, if its lease ran out. Set when claimed, cancelled, expired or exhausted, and once
    of a job whose deadline came then."""
    released_at: float | None = None
    """When an attempt last gave the job back, and its wait began anew. Unix seconds. As `lost`, or final."""
    forgiven: int = 0
    """Attempts before this one that ended with their engine or worker, others being in it: not counted."""
    items: Mapping[int, ItemResult] = field(default_factory=dict)
    """What attempts before this one stored of a job of many prompts, by its place in the request."""
    ended_as: JobState | None = None
    """Set when the job was final already, or exhausted: one that kept some completed items is completed."""
    ended_in_queue: bool = False
    """It ended, or was ended by this claim, while it waited; not while an attempt was at it."""
    published_at: float | None = None
    """When the job's last wait for its time was over, if it had one. Unix seconds. As `lost`, or final."""


class SettleOutcome(StrEnum):
    SETTLED = "settled"
    WAITING = "waiting"
    """Given back, and published again when its time comes."""
    CANCELLED = "cancelled"
    """The client had cancelled it meanwhile: it ended as cancelled, whatever was offered."""
    LOST = "lost"
    """Another attempt holds the lease, or the job was ended without this one; nothing changed."""
    MISSING = "missing"


class RenewOutcome(StrEnum):
    RENEWED = "renewed"
    CANCELLING = "cancelling"
    """Renewed, but the client wants it stopped."""
    LOST = "lost"
    """The lease is another's, or the job has ended: stop working on it."""


@dataclass(slots=True)
class Settlement:
    """The final word of an attempt: a result, a failure, or neither for a cancel and an expiry.

    Both for a job of many prompts that all failed: the result says what each failed of.
    """

    state: JobState
    result: JobResult | None = None
    failure: Failure | None = None
    timings: Timings | None = None


class AttemptStore(Protocol):
    """A worker's half. Raises `StoreUnavailable`.

    What attempts ask is awaited in one event loop; `renew` and `read_cancels` block, in their own threads.
    """

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
        """Take the lease on a job and count an attempt, or end it, or say why neither.

        `traceparent` is this attempt's span, kept for the attempt after it. Safe to repeat with the same
        token: the second call returns the same claim without counting again.
        """
        ...

    def renew(
        self, held: dict[JobId, LeaseToken], *, now: float, lease_seconds: float
    ) -> dict[JobId, RenewOutcome]: ...

    async def settle(
        self, id: JobId, token: LeaseToken, settlement: Settlement, *, now: float, message_tag: str = ""
    ) -> SettleOutcome:
        """Write the final state, tell the watchers and clear the ledger, once.

        Safe to repeat: the first final state wins, and the attempt that brought it is told the same again.

        `message_tag` is the delivery tag of the broker's message, which goes in the same act where the
        outcome is SETTLED or CANCELLED; otherwise, and without a tag, it is left to whoever holds it.
        """
        ...

    async def keep(
        self, id: JobId, token: LeaseToken, items: Mapping[int, ItemResult], *, completed: int, failed: int
    ) -> bool:
        """Store ended items of a running job of many prompts, for the next attempt or the job's end.

        `completed` and `failed` count all that the job has by now. Safe to repeat; an item stored before is
        replaced. False when the lease is another's: nothing was stored.
        """
        ...

    async def mark_alone(self, id: JobId, token: LeaseToken) -> bool:
        """Note that the attempt has its engine to itself: should it vanish, nothing else is to blame.

        False when the lease is another's.
        """
        ...

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
        """Give the job back as queued. SETTLED when done; the caller then requeues the message.

        With `next_attempt_at`, and an attempt left, the outcome is WAITING: the job is kept until then, and
        the broker's message of that delivery tag with it, in the same act. `Schedule.advance` publishes it.

        Without a failure (a worker that shuts down) the attempt is not counted. With one it is, and the
        failure becomes the job's own if no attempts are left at the next claim. `is_forgiven` keeps the
        attempt's number but does not count it against the job, up to FORGIVEN_LIMIT times.
        """
        ...

    def read_cancels(self, worker: WorkerId, after: str, *, block_seconds: float) -> list[tuple[str, JobId]]:
        """(position, job) of the cancels told to this worker, waiting up to `block_seconds`."""
        ...
