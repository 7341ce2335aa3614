"""Redis behind Sentinel: the primary dies in mid-work, its replica takes over, and every process follows."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from jobs.model import JobId
from jobs.states import JobState
from tests.support.api_process import running_api
from tests.support.model_folders import make_model_folder
from tests.support.processes import wait_until
from tests.support.queue_lab import MODEL, lab_on
from tests.support.sentinel import running_sentinel

pytestmark = pytest.mark.slow


def post(api: httpx.Client) -> httpx.Response:
    return api.post(
        "/v1/jobs", json={"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True}
    )


def test_jobs_go_on_when_the_primary_is_killed_and_its_replica_takes_over(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    make_model_folder("llama", folder)
    with running_sentinel() as cluster, lab_on(cluster.primary, cluster.url, folder, tmp_path) as lab:
        worker = lab.start_worker()
        with running_api(lab.environment, tmp_path / "api.log") as api:
            wait_until(
                lambda: api.get("/health/ready").is_success, timeout_seconds=20, what="the model is announced"
            )
            running = lab.submit(max_tokens=240, num_prompts=40)
            lab.wait_state(running, "in_progress")
            accepted = [JobId(post(api).json()["id"]) for _ in range(10)]
            assert lab.client.wait(1, 5000) == 1, "the replica has all of it: the rest would be lost"

            cluster.primary.kill()
            wait_until(
                lambda: post(api).status_code == 202, timeout_seconds=30, what="jobs are accepted again"
            )

            jobs = lab.wait_final([running, *accepted])
            assert {job.state for job in jobs} == {JobState.COMPLETED}
            wait_until(
                lambda: lab.num_held_by_broker() == 0 and lab.num_open() == 0,
                timeout_seconds=20,
                what="every message acknowledged and the ledger empty",
            )
        assert worker.process.poll() is None, worker.log()
