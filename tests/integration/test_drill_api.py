"""The API or the supervisor killed at the worst moment: no accepted job is lost."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
import redis

from jobs.keys import Keys
from jobs.model import JobId
from jobs.states import JobState
from tests.support.api_process import running_api
from tests.support.model_folders import make_model_folder
from tests.support.processes import wait_until
from tests.support.queue_lab import MODEL, ROOT, queue_lab
from tests.support.stack import RunningStack

pytestmark = pytest.mark.slow


def test_job_of_an_api_that_died_before_it_answered_is_run(tmp_path: Path) -> None:
    """Its client was told nothing; the job's message is there with the job, so nobody has to find it."""
    folder = tmp_path / "llama"
    make_model_folder("llama", folder)
    with queue_lab(folder, tmp_path) as lab:
        worker = lab.start_worker()
        path = os.pathsep.join([str(ROOT / "tests/support/dying_api"), str(ROOT)])
        with running_api({**lab.environment, "PYTHONPATH": path}, tmp_path / "api.log") as api:
            wait_until(lambda: api.get("/health/ready").is_success, timeout_seconds=20, what="a worker is up")
            with pytest.raises(httpx.TransportError):
                api.post("/v1/jobs", json={"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4})

        (key,) = lab.client.scan_iter(match=lab.keys.job(JobId("*")))
        id = JobId(key.removeprefix(lab.keys.job(JobId(""))))
        assert lab.wait_final([id])[0].state is JobState.COMPLETED
        assert "published again" not in worker.log()


def test_jobs_survive_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """`throughline up` and with it its Redis, its API and its workers; then started again."""
    first = RunningStack(tmp_path)
    try:
        first.wait_until_ready()
        body = {"model": "throughline-tiny", "prompt": ["Paris is"] * 40, "max_tokens": 200}
        with httpx.Client(base_url=first.url, timeout=30) as client:
            ids = [client.post("/v1/jobs", json=body).json()["id"] for _ in range(10)]
        first.process.kill()
        first.process.wait(10)
        wait_until(lambda: not first.pids(), timeout_seconds=20, what="all of it is gone")
    finally:
        first.kill_everything()

    second = RunningStack(tmp_path)
    try:
        second.wait_until_ready()
        keys, store = Keys("tl:"), redis.Redis.from_url(second.redis_url, decode_responses=True)
        with store:

            def states() -> set[str]:
                return {str(store.hget(keys.job(id), "state")) for id in ids}

            second.wait(lambda: states() == {"completed"}, "every accepted job is completed", 60)
    finally:
        second.kill_everything()
