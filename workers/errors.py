"""What ends an attempt, other than its result.

    WorkerError
    ├── AttemptEnded           raised in the task's thread by whoever stops it
    │   ├── EngineLost         the engine died or hung; the job may run again        retryable
    │   ├── EngineRefused      the engine found the request impossible               final
    │   ├── CancelWished       the client cancelled
    │   ├── DeadlinePassed     the job's own deadline came
    │   └── LeaseLost          another worker has the job; say nothing about it
    └── EngineStartError       the engine cannot start; the worker cannot serve

`JobStopped` (workers.pool) stands beside them: a BaseException, for Celery has already decided.
"""

from __future__ import annotations

from jobs.model import Failure


class WorkerError(Exception):
    """Base of the package."""


class AttemptEnded(WorkerError):
    """The attempt is over without a result."""


class EngineLost(AttemptEnded):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(reason=reason, message=message, retryable=True)


class EngineRefused(AttemptEnded):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(reason=reason, message=message, retryable=False)


class CancelWished(AttemptEnded):
    """The client cancelled the job."""


class DeadlinePassed(AttemptEnded):
    """The job's deadline passed while it ran."""


class LeaseLost(AttemptEnded):
    """The lease is another worker's."""


class EngineStartError(WorkerError):
    """One line for the operator: which file, and what is wrong with it."""

    def __init__(self, message: str, *, is_final: bool = True) -> None:
        """`is_final`: the next try would read the same; False for one that was killed or stood still."""
        super().__init__(message)
        self.is_final = is_final
