"""A job that kills what runs it: it ends as failed, and takes nobody with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.model import Job, JobId
from jobs.states import JobState
from tests.support.queue_lab import ROOT, QueueLab, WorkerProcess, queue_lab

pytestmark = pytest.mark.slow

POISON_TOKEN = 211
NUM_INNOCENT = 20
MAX_ATTEMPTS = 1
"""Of the poisonous job; each attempt costs an engine's start."""
TIMES_IN_COMPANY = 2
"""Once with everybody, once with seven others: see workers/attempts/company.py."""


def start_poisonable(lab: QueueLab, kills: str) -> WorkerProcess:
    path = os.pathsep.join([str(ROOT / "tests/support/poisoned_engine"), str(ROOT)])
    poison = {"PYTHONPATH": path, "POISON_TOKEN": str(POISON_TOKEN), "POISON_KILLS": kills}
    return lab.start_worker(wait=False, **poison)


def submit_poison_among_innocents(lab: QueueLab) -> tuple[JobId, list[JobId]]:
    """Queued before any worker is there, so that they meet in one engine."""
    innocent = [lab.submit(max_tokens=40) for _ in range(NUM_INNOCENT // 2)]
    poison = lab.submit(first_token=POISON_TOKEN, max_attempts=MAX_ATTEMPTS)
    return poison, innocent + [lab.submit(max_tokens=40) for _ in range(NUM_INNOCENT // 2)]


def check(poison: Job, innocent: list[Job]) -> None:
    assert {job.state for job in innocent} == {JobState.COMPLETED}
    assert max(job.attempts for job in innocent) <= TIMES_IN_COMPANY + MAX_ATTEMPTS + 1
    assert poison.state is JobState.FAILED
    assert poison.attempts == TIMES_IN_COMPANY + MAX_ATTEMPTS


def test_job_that_kills_its_engine_fails_alone(model_folder: Path, tmp_path: Path) -> None:
    with queue_lab(model_folder, tmp_path) as lab:
        poison, innocent = submit_poison_among_innocents(lab)

        worker = start_poisonable(lab, "engine")
        failed, *completed = lab.wait_final([poison, *innocent], timeout_seconds=120)

        check(failed, completed)
        assert failed.failure is not None
        assert (failed.failure.reason, failed.failure.retryable) == ("engine_crashed", True)
        assert worker.process.poll() is None, "the worker must not go with its engine"


def test_job_that_kills_its_worker_fails_alone(model_folder: Path, tmp_path: Path) -> None:
    with queue_lab(model_folder, tmp_path, lease_seconds=2.0) as lab:
        poison, innocent = submit_poison_among_innocents(lab)

        for _ in range(TIMES_IN_COMPANY + MAX_ATTEMPTS):
            start_poisonable(lab, "worker").process.wait(90)
        lab.start_worker()
        failed, *completed = lab.wait_final([poison, *innocent], timeout_seconds=60)

        check(failed, completed)
        assert failed.failure is not None
        assert failed.failure.reason == "worker_lost"
