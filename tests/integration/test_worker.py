"""Real workers on a real broker: batching, acknowledging, cancelling, and losing parts on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import scripts
from jobs.model import JobId
from jobs.states import JobState
from tests.support.processes import wait_until
from tests.support.queue_lab import ROOT, QueueLab, get_json, queue_lab
from tests.support.valkey import free_port


@pytest.fixture(scope="module")
def steady(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueLab]:
    """A lab whose one worker is never hurt."""
    with queue_lab(model_folder, tmp_path_factory.mktemp("steady")) as lab:
        lab.start_worker()
        yield lab


@pytest.fixture
def lab(model_folder: Path, tmp_path: Path) -> Iterator[QueueLab]:
    with queue_lab(model_folder, tmp_path) as lab:
        yield lab


def cancel(lab: QueueLab, id: JobId) -> str:
    script = lab.client.register_script(scripts.source("cancel"))
    return str(script(keys=[lab.keys.job(id)], args=[lab.keys.prefix, id, "1.0", 600]))


def wait_nothing_left(lab: QueueLab) -> None:
    wait_until(
        lambda: lab.num_held_by_broker() == 0 and lab.num_open() == 0,
        timeout_seconds=10,
        what="every message acknowledged and the ledger empty",
    )


def test_worker_batches_jobs_that_were_queued_together(steady: QueueLab) -> None:
    ids = [steady.submit(max_tokens=200) for _ in range(64)]

    jobs = steady.wait_final(ids)

    assert {job.state for job in jobs} == {JobState.COMPLETED}
    assert all(job.usage is not None and job.usage.completion_tokens == 200 for job in jobs)
    sizes = [job.timings.mean_batch_size for job in jobs if job.timings]
    assert sum(sizes) / len(sizes) > 30
    wait_nothing_left(steady)


def test_timings_add_up_to_the_total(steady: QueueLab) -> None:
    job = steady.wait_final([steady.submit(max_tokens=30)])[0]

    assert job.timings is not None
    parts = job.timings.model_dump()
    named = ("queue_ms", "engine_wait_ms", "prefill_ms", "decode_ms", "store_ms")
    assert sum(parts[name] for name in named) == pytest.approx(parts["total_ms"], abs=0.01)
    assert job.finished_at is not None
    assert parts["total_ms"] == pytest.approx((job.finished_at - job.queued_at) * 1e3, abs=5)


def test_job_with_many_prompts_keeps_their_order(steady: QueueLab) -> None:
    many = steady.wait_final([steady.submit(num_prompts=5)])[0]
    single = steady.wait_final([steady.submit(num_prompts=1)])[0]

    assert many.result is not None
    assert single.result is not None
    assert len(many.result.items) == 5
    assert many.result.items[0] == single.result.items[0]
    assert many.result.usage.completion_tokens == 5 * 8


def test_impossible_parameters_fail_the_job_alone(steady: QueueLab) -> None:
    bad, good = steady.submit(temperature=-1.0), steady.submit()

    failed, completed = steady.wait_final([bad, good])

    assert failed.failure is not None
    assert failed.failure.reason == "invalid_request"
    assert not failed.failure.retryable
    assert completed.state is JobState.COMPLETED


def test_prompt_longer_than_the_context_fails_with_the_engines_reason(steady: QueueLab) -> None:
    """The API refuses it; a job that came another way must not hurt the engine."""
    job = steady.wait_final([steady.submit(prompt_length=300)])[0]

    assert job.failure is not None
    assert job.failure.reason == "invalid_request"


def test_cancelled_running_job_frees_its_place(steady: QueueLab) -> None:
    ids = [steady.submit(max_tokens=240) for _ in range(8)]
    steady.wait_state(ids[0], "in_progress")

    assert cancel(steady, ids[0]) == "cancelling"

    jobs = steady.wait_final(ids)
    assert [job.state for job in jobs] == [JobState.CANCELLED, *[JobState.COMPLETED] * 7]
    assert jobs[0].result is None
    wait_nothing_left(steady)


def test_deadline_ends_a_running_job(steady: QueueLab) -> None:
    late = steady.submit(num_prompts=200, max_tokens=240, expires_in=1.0)

    assert steady.wait_final([late])[0].state is JobState.EXPIRED


def test_lost_message_is_published_again(steady: QueueLab) -> None:
    """As when Redis handed the message to a worker that died in the same instant."""
    lost = steady.submit(publish=False)

    assert steady.wait_final([lost], timeout_seconds=20)[0].state is JobState.COMPLETED


def test_flower_sees_the_worker_and_its_tasks(steady: QueueLab) -> None:
    port = free_port()
    environment = {**os.environ, **steady.environment, "FLOWER_UNAUTHENTICATED_API": "true"}
    argv = [sys.executable, "-m", "celery", "-A", "workers.main", "flower", f"--port={port}"]
    flower = subprocess.Popen(
        [*argv, "--address=127.0.0.1"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: _answers(f"http://127.0.0.1:{port}/healthcheck"), timeout_seconds=60, what="Flower is up"
        )
        ids: list[JobId] = []

        def listed() -> set[str]:
            """Events are told once: what ran before Flower listened, it never hears of."""
            ids.append(steady.submit())
            steady.wait_final(ids[-1:])
            tasks = get_json(f"http://127.0.0.1:{port}/api/tasks")
            return {id for id in ids if "worker" in tasks.get(id, {})}  # publishers tell of tasks too

        wait_until(lambda: bool(listed()), timeout_seconds=40, what="Flower lists a worker's task")
        tasks = get_json(f"http://127.0.0.1:{port}/api/tasks")
        workers = get_json(f"http://127.0.0.1:{port}/api/workers?refresh=1")
    finally:
        os.killpg(flower.pid, signal.SIGKILL)
        flower.wait(10)

    assert {task.get("worker", "w0@lab") for id, task in tasks.items() if id in ids} == {"w0@lab"}
    assert "w0@lab" in workers


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_stopping_worker_finishes_what_it_holds(lab: QueueLab) -> None:
    worker = lab.start_worker()
    ids = [lab.submit(max_tokens=200) for _ in range(4)]
    lab.wait_state(ids[-1], "in_progress")

    code = worker.stop()

    assert code == 0, worker.log()
    assert {lab.read(id).state for id in ids} == {JobState.COMPLETED}
    wait_nothing_left(lab)


def test_stopping_worker_gives_back_what_it_cannot_finish(lab: QueueLab) -> None:
    worker = lab.start_worker(THROUGHLINE_SHUTDOWN_GRACE_SECONDS="0")
    ids = [lab.submit(max_tokens=240, num_prompts=40) for _ in range(4)]
    for id in ids:
        lab.wait_state(id, "in_progress")

    code = worker.stop()

    assert code == 0, worker.log()
    handed_back = [lab.read(id) for id in ids if not lab.read(id).state.is_final]
    assert handed_back, "all finished before the signal: the test asks for too little work"
    assert {(job.state, job.attempts) for job in handed_back} == {(JobState.QUEUED, 0)}
    assert lab.num_held_by_broker() == len(handed_back)
    lab.start_worker()
    assert {job.state for job in lab.wait_final(ids)} == {JobState.COMPLETED}


def test_engine_killed_in_mid_job_costs_one_attempt(lab: QueueLab) -> None:
    worker = lab.start_worker()
    id = lab.submit(max_tokens=240, num_prompts=40)
    lab.wait_state(id, "in_progress")

    os.kill(worker.engine_pid(), signal.SIGKILL)

    job = lab.wait_final([id])[0]
    assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
    assert worker.process.poll() is None
    wait_nothing_left(lab)


def test_hung_engine_is_replaced_and_its_job_runs_again(lab: QueueLab) -> None:
    worker = lab.start_worker(THROUGHLINE_ENGINE_STALL_SECONDS="2")
    id = lab.submit(max_tokens=240, num_prompts=40)
    lab.wait_state(id, "in_progress")

    os.kill(worker.engine_pid(), signal.SIGSTOP)

    job = lab.wait_final([id])[0]
    assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
    assert "silent for" in worker.log()


def test_killed_workers_jobs_go_to_another(lab: QueueLab) -> None:
    first, second = lab.start_worker(wait=False), lab.start_worker(wait=False)
    for worker in (first, second):
        worker.wait_ready()
    ids = [lab.submit(max_tokens=240, num_prompts=30) for _ in range(8)]
    for id in ids:
        lab.wait_state(id, "in_progress")
    engine = first.engine_pid()
    held_by_first = {
        id for id in ids if f":{first.process.pid}:" in lab.client.hget(lab.keys.job(id), "worker")
    }

    first.kill()

    jobs = lab.wait_final(ids)
    assert held_by_first
    assert {job.state for job in jobs} == {JobState.COMPLETED}
    assert {job.id for job in jobs if job.attempts == 2} == held_by_first
    wait_until(lambda: not Path(f"/proc/{engine}").exists(), timeout_seconds=10, what="its engine is gone")
    wait_nothing_left(lab)


def test_broken_connections_repeat_no_job(lab: QueueLab) -> None:
    lab.start_worker()
    ids = [lab.submit(max_tokens=240, num_prompts=40) for _ in range(3)]
    for id in ids:
        lab.wait_state(id, "in_progress")

    lab.client.client_kill_filter(skipme=True, _type="normal")

    jobs = lab.wait_final(ids)
    assert {(job.state, job.attempts) for job in jobs} == {(JobState.COMPLETED, 1)}
    wait_nothing_left(lab)


@pytest.mark.parametrize(
    ("damage", "said"),
    [("missing", "no-such-folder"), ("weights", "model.safetensors")],
)
def test_broken_model_folder_stops_the_worker_with_one_line(
    lab: QueueLab, model_folder: Path, tmp_path: Path, damage: str, said: str
) -> None:
    folder = tmp_path / "no-such-folder" if damage == "missing" else _damaged(model_folder, tmp_path)
    worker = lab.start_worker(wait=False, THROUGHLINE_MODEL=str(folder))

    assert worker.process.wait(120) == 3, worker.log()
    lines = [line for line in worker.log().splitlines() if line.startswith("throughline worker:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in worker.log()


def _damaged(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def test_bad_setting_stops_the_worker_with_its_name_value_and_rule(lab: QueueLab) -> None:
    worker = lab.start_worker(wait=False, THROUGHLINE_MAX_NUM_SEQUENCES="none")

    assert worker.process.wait(60) == 3
    assert "THROUGHLINE_MAX_NUM_SEQUENCES='none'" in worker.log()
