from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.client import JobView
from cli.settings import PROJECT_FOLDER
from cli.stack import viewer
from cli.viewer_client import ViewerClient
from tests.support.stack import RunningStack, own_environment, running_stack
from tests.support.trace_invariants import check_trace_invariants


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running_stack(tmp_path_factory.mktemp("stack"), "--trace-viewer") as started:
        started.wait_until_ready()
        yield started


@pytest.fixture(scope="module")
def job(stack: RunningStack) -> dict[str, Any]:
    body = {"model": "throughline-tiny", "prompt": "San Francisco is a", "max_tokens": 4}
    job_id = httpx.post(f"{stack.url}/v1/jobs", json=body, timeout=30).json()["id"]
    read: dict[str, Any] = httpx.get(f"{stack.url}/v1/jobs/{job_id}", params={"wait": 30}, timeout=60).json()
    assert read["status"] == "completed"
    return read


def trace(stack: RunningStack, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", "trace", "--state-dir", str(stack.state_folder), *arguments]
    return subprocess.run(
        command, cwd=PROJECT_FOLDER, env=own_environment(), capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def test_trace_shows_the_whole_tree_of_a_job_by_its_id_alone(
    stack: RunningStack, job: dict[str, Any]
) -> None:
    ended = trace(stack, job["id"], "--wait", "20")

    assert ended.returncode == 0, ended.stderr
    for shown in (
        job["trace_id"], "completed", "POST /v1/jobs", "send throughline-tiny", "process throughline-tiny",
        "engine.decode", "throughline-worker",
    ):  # fmt: skip
        assert shown in ended.stdout
    assert "so far" not in ended.stdout


def test_viewer_holds_spans_that_keep_every_rule(stack: RunningStack, job: dict[str, Any]) -> None:
    address = viewer.find(stack.state_folder)
    assert address is not None
    with ViewerClient(address.read_url) as client:
        found = client.of_job(JobView(job), deadline=time.monotonic() + 20)

    assert found.is_whole
    usage = job["usage"]
    check_trace_invariants(
        found.spans,
        canaries=["San Francisco"],
        failed_job_ids=(),
        usage={job["id"]: (usage["prompt_tokens"], usage["completion_tokens"])},
    )


def test_trace_writes_a_page_without_requests_when_asked_by_trace_id(
    stack: RunningStack, job: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "trace.html"

    ended = trace(stack, job["trace_id"], "--html", str(page))

    assert ended.returncode == 0, ended.stderr
    html = page.read_text(encoding="utf-8")
    assert "engine.decode" in html
    assert "San Francisco" not in html
    assert not re.search(r"https?://(?!127\.0\.0\.1)", html)


def test_job_links_to_the_page_of_the_stack_s_own_viewer(stack: RunningStack, job: dict[str, Any]) -> None:
    assert trace(stack, job["id"], "--wait", "20").returncode == 0  # its spans have come

    page = httpx.get(job["links"]["trace"])

    assert page.status_code == 200
    assert job["trace_id"] in page.text
    assert "engine.decode" in page.text


def test_trace_says_that_the_job_is_unknown_when_it_is(stack: RunningStack) -> None:
    ended = trace(stack, "job_nobody")

    assert ended.returncode == 1
    assert "job_nobody: " in ended.stderr
    assert "knows no such job" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_trace_says_that_there_are_no_spans_when_none_came(stack: RunningStack) -> None:
    ended = trace(stack, "0" * 31 + "1", "--wait", "0")

    assert ended.returncode == 1
    assert "holds no span of this trace" in ended.stderr


def test_viewer_is_private_to_this_machine_and_leaves_with_its_stack(tmp_path: Path) -> None:
    with running_stack(tmp_path, "--trace-viewer") as stack:
        stack.wait_for_log("Uvicorn running on", 90)
        address = viewer.find(stack.state_folder)
        assert address is not None
        assert address.read_url.startswith("http://127.0.0.1:")
        assert address.api_url == stack.url
        assert json.loads(httpx.get(f"{address.read_url}/jobs/job_1/trace").text)["spans"] == []

        assert stack.stop() == 0, stack.log()

        assert viewer.find(stack.state_folder) is None
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address.read_url}/traces/x")
        assert stack.pids() == []
