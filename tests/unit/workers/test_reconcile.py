from __future__ import annotations

from dataclasses import dataclass, field

from jobs.ledger import LostJob
from jobs.memory_store import MemoryStore
from jobs.model import JobId, WorkerId
from workers.broker.reconcile import SHORT_TIMES, Reconciler

LOST = LostJob(JobId("job_lost"), "m.batch", None)


@dataclass
class ScriptedLedger:
    """Answers what the test wrote; the real one is proved by tests/integration/test_worker.py."""

    lost: list[list[LostJob]] = field(default_factory=list)
    short: bool = True

    def is_short(self) -> bool:
        return self.short

    def lost_jobs(self, *, now: float) -> list[LostJob]:
        return self.lost.pop(0) if self.lost else []


class FixedClock:
    def now(self) -> float:
        return 1.0


def reconciler(ledger: ScriptedLedger) -> tuple[Reconciler, MemoryStore]:
    publisher = MemoryStore()
    return Reconciler(publisher, ledger, publisher, FixedClock(), WorkerId("w")), publisher  # type: ignore[arg-type]


def check_times(subject: Reconciler, times: int) -> list[JobId]:
    return [id for _ in range(times) for id in subject.check()]


def test_job_lost_at_two_looks_is_published_once() -> None:
    subject, publisher = reconciler(ScriptedLedger(lost=[[LOST], [LOST], []]))

    again = check_times(subject, SHORT_TIMES + 2)

    assert again == [LOST.id]
    assert publisher.published == [(LOST.id, "m.batch")]


def test_job_seen_lost_only_once_is_left_alone() -> None:
    subject, publisher = reconciler(ScriptedLedger(lost=[[LOST], [], []]))

    check_times(subject, SHORT_TIMES + 2)

    assert publisher.published == []


def test_short_count_that_recovers_starts_over() -> None:
    ledger = ScriptedLedger(lost=[[LOST]] * 10)
    subject, publisher = reconciler(ledger)
    check_times(subject, SHORT_TIMES)

    ledger.short = False
    subject.check()
    ledger.short = True
    check_times(subject, SHORT_TIMES)

    assert publisher.published == []
