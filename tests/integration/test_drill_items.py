"""Jobs of many prompts on real workers: what fails of them, and what is run again, is single prompts."""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.model import ItemCounts, Job
from jobs.states import JobState
from tests.support.processes import wait_until
from tests.support.queue_lab import ROOT, QueueLab, queue_lab
from tests.support.valkey import free_port

POISON_TOKEN = 211
TOO_LONG = 300
"""Tokens of a prompt that the model has no room for. The API refuses it; such a job came another way."""


@pytest.fixture(scope="module")
def steady(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueLab]:
    """One worker, whose engine fails the first request that begins with POISON_TOKEN, and no other."""
    with queue_lab(model_folder, tmp_path_factory.mktemp("steady")) as lab:
        lab.start_worker(
            PYTHONPATH=os.pathsep.join([str(ROOT / "tests/support/poisoned_engine"), str(ROOT)]),
            POISON_TOKEN=str(POISON_TOKEN),
            POISON_KILLS="request",
            THROUGHLINE_RETRY_PAUSE_SECONDS="0",
        )
        yield lab


def reasons(job: Job) -> list[str | None]:
    assert job.result is not None
    return [item.failure.reason if item.failure else None for item in job.result.items]


def output_tokens(port: int) -> int:
    """That the worker has counted since it began."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    found = re.findall(
        r"^gen_ai_client_inference_usage_output_tokens_total(?:{[^}]*})? (\S+)$", text, re.MULTILINE
    )
    return int(sum(map(float, found)))


def num_item_keys(lab: QueueLab) -> int:
    return sum(1 for _ in lab.client.scan_iter(match=f"{lab.keys.prefix}items:*"))


def test_broken_prompt_among_many_fails_alone(steady: QueueLab) -> None:
    job = steady.wait_final([steady.submit(num_prompts=20, lengths={7: TOO_LONG})])[0]

    assert (job.state, job.attempts) == (JobState.COMPLETED, 1)
    assert job.items == ItemCounts(total=20, completed=19, failed=1)
    assert reasons(job) == [None] * 7 + ["invalid_request"] + [None] * 12
    assert job.usage is not None
    assert job.usage.completion_tokens == 19 * 8


def test_job_of_which_every_prompt_is_broken_fails(steady: QueueLab) -> None:
    job = steady.wait_final([steady.submit(num_prompts=3, prompt_length=TOO_LONG)])[0]

    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert job.failure is not None
    assert (job.failure.reason, job.failure.retryable) == ("invalid_request", False)
    assert reasons(job) == ["invalid_request"] * 3


def test_prompt_that_may_be_tried_again_is_run_again_without_the_others(steady: QueueLab) -> None:
    job = steady.wait_final([steady.submit(num_prompts=4, first_token=POISON_TOKEN - 2)])[0]

    assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
    assert job.items == ItemCounts(total=4, completed=4, failed=0)
    assert job.usage is not None
    assert job.usage.completion_tokens == 4 * 8, "tokens of the failed try are not the job's"
    assert num_item_keys(steady) == 0


def test_next_attempt_runs_only_what_a_killed_worker_had_not_stored(
    model_folder: Path, tmp_path: Path
) -> None:
    num_prompts, max_tokens, port = 400, 60, free_port()
    with queue_lab(model_folder, tmp_path, lease_seconds=1.0) as lab:
        first = lab.start_worker(THROUGHLINE_MAX_NUM_SEQUENCES="4")
        id = lab.submit(num_prompts=num_prompts, max_tokens=max_tokens)
        wait_until(lambda: lab.read(id).items.completed > 0, timeout_seconds=30, what="some items are stored")

        first.kill()
        stored = lab.read(id).items.completed
        lab.start_worker(THROUGHLINE_METRICS_PORT=str(port))
        job = lab.wait_final([id])[0]

        assert 0 < stored < num_prompts
        assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
        assert job.items == ItemCounts(total=num_prompts, completed=num_prompts, failed=0)
        assert job.usage is not None
        assert job.usage.completion_tokens == num_prompts * max_tokens
        wait_until(
            lambda: output_tokens(port) == (num_prompts - stored) * max_tokens,
            timeout_seconds=10,
            what=f"the second worker counts what it ran: {num_prompts - stored} of {num_prompts} prompts",
        )
        assert num_item_keys(lab) == 0
