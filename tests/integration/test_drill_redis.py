"""Redis killed, full or read-only: what clients are told, and what becomes of their jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from jobs.model import JobId
from jobs.states import JobState
from tests.support.api_process import running_api
from tests.support.model_folders import make_model_folder
from tests.support.processes import wait_until
from tests.support.queue_lab import MODEL, QueueLab, WorkerProcess, queue_lab

pytestmark = pytest.mark.slow

AT_ONCE_SECONDS = 3.0
"""A refusal that a client waits for longer is no refusal; measured 0.1 to 0.3 s."""
LEASE_SECONDS = 3.0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueLab]:
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_model_folder("llama", folder)
    with queue_lab(folder, tmp_path_factory.mktemp("lab"), lease_seconds=LEASE_SECONDS) as lab:
        yield lab


@pytest.fixture(scope="module")
def worker(lab: QueueLab) -> WorkerProcess:
    return lab.start_worker()


@pytest.fixture(scope="module")
def api(lab: QueueLab, worker: WorkerProcess) -> Iterator[httpx.Client]:
    with running_api(lab.environment, lab.folder / "api.log") as client:
        wait_until(
            lambda: client.get("/health/ready").is_success, timeout_seconds=20, what="the model is announced"
        )
        yield client


def post(api: httpx.Client, *, key: str | None = None, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True, **fields}
    return api.post("/v1/jobs", json=body, headers={"Idempotency-Key": key} if key else {})


def assert_refused_at_once(api: httpx.Client, *, key: str | None = None) -> None:
    asked_at = time.monotonic()
    reply = post(api, key=key)
    assert time.monotonic() - asked_at < AT_ONCE_SECONDS
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_unavailable")
    assert int(reply.headers["Retry-After"]) > 0


def wait_completed(lab: QueueLab, reply: httpx.Response) -> None:
    assert reply.status_code == 202, reply.text
    assert lab.wait_final([JobId(reply.json()["id"])])[0].state is JobState.COMPLETED


def traces_of_jobs(lab: QueueLab) -> set[str]:
    """What a job that was refused must not add to."""
    kinds = ("job:*", "open:*", "idempotency:*", "celery:unacked*", f"celery:{MODEL}*")
    return {str(key) for kind in kinds for key in lab.client.scan_iter(match=f"{lab.keys.prefix}{kind}")}


def test_jobs_survive_a_redis_that_is_killed_in_mid_work(
    lab: QueueLab, api: httpx.Client, worker: WorkerProcess
) -> None:
    """The worker generates on and settles when Redis is back; the API refuses at once and recovers."""
    running = lab.submit(max_tokens=240, num_prompts=40)
    queued = [JobId(post(api, max_tokens=240).json()["id"]) for _ in range(20)]
    lab.wait_state(running, "in_progress")

    lab.server.kill()
    assert_refused_at_once(api)
    wait_until(lambda: worker.log().count("Trying again") >= 3, timeout_seconds=30, what="a long outage")
    lab.server.start()
    back_at = time.monotonic()

    wait_until(lambda: post(api).status_code == 202, timeout_seconds=5, what="the API takes jobs again")
    jobs = lab.wait_final([running, *queued])
    assert {job.state for job in jobs} == {JobState.COMPLETED}
    assert jobs[0].attempts == 1, "the first attempt was not thrown away"
    wait_until(
        lambda: lab.num_held_by_broker() == 0 and lab.num_open() == 0,
        timeout_seconds=LEASE_SECONDS * 3,
        what="every message acknowledged",
    )
    assert time.monotonic() - back_at < 30, "the worker must not wait for ever longer"


def test_full_redis_refuses_jobs_and_keeps_nothing_of_them(lab: QueueLab, api: httpx.Client) -> None:
    def limit_memory(size: str) -> None:
        lab.client.config_set("maxmemory", size)

    check_refusal(lab, api, lambda: limit_memory("1mb"), lambda: limit_memory("0"), key="full")


def test_read_only_redis_refuses_jobs_and_keeps_nothing_of_them(lab: QueueLab, api: httpx.Client) -> None:
    """As after a failover that left us on the old primary."""
    replicaof = lab.client.replicaof
    check_refusal(
        lab, api, lambda: replicaof("127.0.0.1", "1"), lambda: replicaof("NO", "ONE"), key="read-only"
    )


def test_broker_that_refuses_the_message_leaves_nothing_behind(lab: QueueLab, api: httpx.Client) -> None:
    """A script is not undone where it fails: the message must be its first word."""

    def allow(command: str) -> None:
        lab.client.acl_setuser("default", enabled=True, commands=[command], reset=False)

    check_refusal(lab, api, lambda: allow("-lpush"), lambda: allow("+lpush"))


def check_refusal(
    lab: QueueLab,
    api: httpx.Client,
    break_redis: Callable[[], object],
    mend_redis: Callable[[], object],
    *,
    key: str | None = None,
) -> None:
    """Broken, it refuses a job at once and keeps nothing of it; mended, it takes the same job."""
    before = traces_of_jobs(lab)

    break_redis()
    try:
        assert_refused_at_once(api, key=key)
        assert traces_of_jobs(lab) == before
    finally:
        mend_redis()

    wait_completed(lab, post(api, key=key))


def test_result_that_found_redis_full_is_stored_when_there_is_room(lab: QueueLab, api: httpx.Client) -> None:
    id = lab.submit(max_tokens=240, num_prompts=40)
    lab.wait_state(id, "in_progress")

    lab.client.config_set("maxmemory", "1mb")
    try:
        wait_until(
            lambda: "leases were not renewed" in lab.workers[0].log(), timeout_seconds=20, what="it is felt"
        )
    finally:
        lab.client.config_set("maxmemory", "0")

    job = lab.wait_final([id])[0]
    assert (job.state, job.attempts) == (JobState.COMPLETED, 1)
