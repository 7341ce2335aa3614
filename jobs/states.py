"""The states of a job and the moves between them.

    queued ──claim──▶ in_progress ──settle──▶ completed | failed | expired
      ▲                  │   │
      └──release/retry───┘   └──cancel──▶ cancelling ──settle──▶ cancelled
    queued ──cancel──▶ cancelled            queued ──claim, too late──▶ expired
    queued ──claim, attempts used up──▶ failed

A retry is no state of its own: it is `queued` with `attempts` above zero. Every move is one atomic
script (`jobs/lua/`), guarded by the state it expects and, for a worker's moves, by the lease token.
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    QUEUED = "queued"
    """Stored and published; no worker holds it. The API sets it on creation, a worker on handing back."""
    IN_PROGRESS = "in_progress"
    """A worker holds the lease. Set by the worker that claims it."""
    CANCELLING = "cancelling"
    """Cancelled by the client while a worker held it; the worker has yet to let go."""
    COMPLETED = "completed"
    """The result is stored. Final."""
    FAILED = "failed"
    """Gave up, with a failure that says why. Final."""
    CANCELLED = "cancelled"
    """Ended at the client's wish. Final."""
    EXPIRED = "expired"
    """Its deadline passed first. Final."""

    @property
    def is_final(self) -> bool:
        return self in FINAL_STATES


FINAL_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.IN_PROGRESS, JobState.CANCELLED, JobState.EXPIRED, JobState.FAILED}),
    JobState.IN_PROGRESS: frozenset(
        {
            JobState.QUEUED,
            JobState.IN_PROGRESS,  # the lease ran out and another worker claimed it
            JobState.CANCELLING,
            JobState.COMPLETED,
            JobState.FAILED,
            JobState.EXPIRED,
        }
    ),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.EXPIRED: frozenset(),
}
"""The moves the scripts may make; the contract tests drive every store against this table."""
