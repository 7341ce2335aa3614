"""A wait for a retry outlives whoever began it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.states import JobState
from tests.support.model_folders import make_model_folder
from tests.support.processes import wait_until
from tests.support.queue_lab import QueueLab, queue_lab

pytestmark = pytest.mark.slow

PAUSE_SECONDS = 8
"""At least half of it passes, in which everything is killed and comes back."""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[QueueLab]:
    folder = tmp_path / "llama"
    make_model_folder("llama", folder)
    with queue_lab(folder, tmp_path) as lab:
        yield lab


def test_retry_comes_once_at_its_time_though_worker_and_redis_were_killed_while_it_waited(
    lab: QueueLab,
) -> None:
    worker = lab.start_worker(THROUGHLINE_RETRY_PAUSE_SECONDS=str(PAUSE_SECONDS))
    id = lab.submit(
        structured_outputs={"no": "such field"}
    )  # the attempt raises, and is one that may be repeated
    wait_until(
        lambda: lab.read(id).next_attempt_at is not None,
        timeout_seconds=20,
        what=f"the job waits for its retry; the worker said {worker.log()[-2000:]}",
    )
    due_at = lab.read(id).next_attempt_at
    assert lab.num_held_by_broker() == 0, "the message waits in the job store"

    worker.kill()
    lab.server.kill()
    lab.server.start()
    mend(lab, id)
    lab.start_worker()

    job = lab.wait_final([id])[0]
    assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
    assert job.in_progress_at is not None
    assert due_at is not None
    assert job.in_progress_at >= due_at
    wait_until(
        lambda: lab.num_held_by_broker() == 0 and lab.num_open() == 0,
        timeout_seconds=10,
        what="every message acknowledged and the ledger empty",
    )
    assert not lab.client.exists(lab.keys.due)


def mend(lab: QueueLab, id: str) -> None:
    """As if what made the first attempt raise were over."""
    key = lab.keys.job(id)  # type: ignore[arg-type]
    request = json.loads(lab.client.hget(key, "request"))
    del request["sampling"]["structured_outputs"]
    lab.client.hset(key, "request", json.dumps(request))
