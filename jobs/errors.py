"""What can go wrong between the API, the store and the workers.

JobsError
├── StoreUnavailable      the broker or the store did not answer; try again
├── QueueFull             the open jobs of a queue reached their limit; try again later
├── IdempotencyMismatch   the key was used before with another body
└── SettingsError         an environment variable holds a value its rule forbids
"""

from __future__ import annotations


class JobsError(Exception):
    """Base of the package. `retryable` says whether the same call may succeed later."""

    retryable = False
    reason = "jobs_error"


class StoreUnavailable(JobsError):
    retryable = True
    reason = "store_unavailable"


class QueueFull(JobsError):
    retryable = True
    reason = "queue_full"

    def __init__(self, queue: str, num_open: int, max_open: int) -> None:
        super().__init__(f"queue {queue!r} holds {num_open} open jobs, its limit is {max_open}")
        self.queue, self.num_open, self.max_open = queue, num_open, max_open


class IdempotencyMismatch(JobsError):
    reason = "idempotency_key_reuse"


class SettingsError(JobsError):
    reason = "settings"
