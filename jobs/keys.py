"""The only place where a Redis key of ours is spelt. Types and lifetimes: jobs/README.md."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.model import JobId, ReplicaId, WorkerId


@dataclass(frozen=True, slots=True)
class Keys:
    prefix: str

    def job(self, id: JobId) -> str:
        return f"{self.prefix}job:{id}"

    def items(self, id: JobId) -> str:
        """What an unfinished job of many prompts has finished of them."""
        return f"{self.prefix}items:{id}"

    def open(self, queue: str) -> str:
        """The ledger of a queue."""
        return f"{self.prefix}open:{queue}"

    @property
    def queues(self) -> str:
        return f"{self.prefix}queues"

    @property
    def due(self) -> str:
        """Jobs that wait for their time, by that time."""
        return f"{self.prefix}due"

    @property
    def deadlines(self) -> str:
        """Open jobs that have a deadline, by it."""
        return f"{self.prefix}deadlines"

    def idempotency(self, key: str) -> str:
        return f"{self.prefix}idempotency:{key}"

    def replies(self, replica: ReplicaId) -> str:
        return f"{self.prefix}replies:{replica}"

    def cancels(self, worker: WorkerId) -> str:
        return f"{self.prefix}cancels:{worker}"

    @property
    def models(self) -> str:
        return f"{self.prefix}models"

    def tokenizer(self, digest: str) -> str:
        return f"{self.prefix}tokenizer:{digest}"

    def beats(self, model: str) -> str:
        return f"{self.prefix}beats:{model}"

    @property
    def reconciler(self) -> str:
        """Held by the worker whose turn it is to compare the ledger with the broker."""
        return f"{self.prefix}reconciler"

    @property
    def broker_prefix(self) -> str:
        """Celery's global key prefix: queues and unacked messages live under it."""
        return f"{self.prefix}celery:"

    def broker_queue(self, queue: str) -> tuple[str, ...]:
        """The four lists that kombu keeps for one queue, one a priority step."""
        steps = ("", "\x06\x163", "\x06\x166", "\x06\x169")
        return tuple(f"{self.broker_prefix}{queue}{step}" for step in steps)

    @property
    def broker_unacked(self) -> str:
        return f"{self.broker_prefix}unacked"

    @property
    def broker_unacked_index(self) -> str:
        return f"{self.broker_prefix}unacked_index"
