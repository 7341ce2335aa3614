from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cli.demo import seed_client
from cli.settings import PROJECT_FOLDER
from tests.support.processes import wait_until
from tests.support.stack import RunningStack, own_environment, running_stack
from tests.support.valkey import free_port

EXAMPLES = PROJECT_FOLDER / "examples"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as started:
        started.wait_until_ready()
        yield started


def throughline(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "cli", *arguments], stdin=stdin)


def run(command: list[str], *, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=PROJECT_FOLDER, env={**own_environment(), **variables}, input=stdin,
        capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip


def read(url: str) -> str:
    try:
        return httpx.get(url, timeout=10).text
    except httpx.TransportError:
        return ""


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_up_prints_a_command_that_works_when_ready(stack: RunningStack) -> None:
    stack.wait_for_log("Ctrl-C stops everything")
    lines = [line.partition("│ ")[2] for line in stack.log().splitlines()]
    start = next(index for index, line in enumerate(lines) if "curl" in line)

    answer = run(["sh", "-c", f"{lines[start]}\n{lines[start + 1]}"])

    assert json.loads(answer.stdout)["choices"][0]["text"].strip()
    assert "also as facebook/opt-125m" in stack.log()


def test_submit_prints_the_completion_when_given_a_prompt(stack: RunningStack) -> None:
    ended = throughline(
        "submit", "San Francisco is a", "--url", stack.url, "--max-tokens", "8", "--temperature", "0"
    )

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


def test_submit_prints_one_job_a_line_in_order_when_given_lines(stack: RunningStack) -> None:
    prompts = ["Paris is", "London is", "Rome is"]
    arguments = [
        "submit",
        "--url",
        stack.url,
        "--file",
        "-",
        "--json",
        "--max-tokens",
        "4",
        "--n",
        "2",
        "--stop",
        "X",
    ]

    ended = throughline(*arguments, stdin="\n\n".join(prompts) + "\n")

    jobs = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [job["status"] for job in jobs] == ["completed"] * 3
    assert [len(job["result"]["choices"]) for job in jobs] == [2, 2, 2]
    assert [job["created_at"] for job in jobs] == sorted(job["created_at"] for job in jobs)


def test_submit_leaves_the_job_running_when_told_not_to_wait(stack: RunningStack) -> None:
    ended = throughline("submit", "Once upon a time", "--url", stack.url, "--no-wait", "--max-tokens", "4")

    job = httpx.get(f"{stack.url}/v1/jobs/{ended.stdout.strip()}", params={"wait": 20}, timeout=30).json()
    assert job["status"] == "completed"


def test_submit_says_which_rule_is_broken_when_the_api_refuses(stack: RunningStack) -> None:
    ended = throughline("submit", "hello", "--url", stack.url, "--model", "no-such-model")

    assert ended.returncode == 1
    assert "HTTP 404" in ended.stderr
    assert "no-such-model" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_doctor_finds_the_running_stack(stack: RunningStack) -> None:
    ended = throughline("doctor", "--json", "--url", stack.url, "--redis-url", stack.redis_url)

    states = {finding["what"]: finding["state"] for finding in json.loads(ended.stdout)}
    assert ended.returncode == 0
    assert (states["api"], states["redis server"], states["model"]) == ("ok", "ok", "ok")


def test_flower_sees_the_worker_when_run_beside_the_stack(stack: RunningStack) -> None:
    port = free_port()
    command = [sys.executable, "-m", "cli", "flower", "--port", str(port), "--redis-url", stack.redis_url]
    variables = {**own_environment(), "FLOWER_UNAUTHENTICATED_API": "true"}
    with subprocess.Popen(command, cwd=PROJECT_FOLDER, env=variables, stderr=subprocess.DEVNULL) as flower:
        try:
            wait_until(
                lambda: f"worker-1-{stack.port}@" in read(f"http://127.0.0.1:{port}/api/workers?refresh=1"),
                timeout_seconds=30,
                what="Flower lists the worker",
            )
        finally:
            flower.terminate()


def test_worker_health_check_follows_the_beats_of_its_own_host(stack: RunningStack) -> None:
    command = [sys.executable, str(PROJECT_FOLDER / "infra/docker/worker_health.py")]
    variables = {"PYTHONPATH": str(PROJECT_FOLDER), "THROUGHLINE_REDIS_URL": stack.redis_url}

    assert run(command, **variables).returncode == 0
    assert run(command, **variables, THROUGHLINE_KEY_PREFIX="nobody:").returncode == 1


@pytest.mark.parametrize(
    "name", sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".sh"})
)
def test_example_runs_as_its_page_says(stack: RunningStack, name: str) -> None:
    by_name = {
        "dummy_client.py": ([sys.executable, "-c", seed_client.source(stack.url)], "client-span"),
        "many_prompts.py": ([sys.executable, str(EXAMPLES / name), stack.url], "A queue is "),
        "submit_and_poll.sh": (["sh", str(EXAMPLES / name), "Paris is"], ""),
        "traced_request.py": ([sys.executable, str(EXAMPLES / name), stack.url], "trace "),
    }
    command, expected = by_name[name]
    # An endpoint that refuses: the client's spans go nowhere, and it ends well all the same.
    nowhere = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "grpc://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "1",
    }
    nowhere["OTEL_EXPORTER_OTLP_TRACES_INSECURE"] = "true"

    ended = run(command, stdin="Paris is\nA queue is\n", URL=stack.url, **nowhere)

    assert ended.returncode == 0, ended.stderr
    assert expected in ended.stdout
    assert ended.stdout.strip()


def test_up_is_refused_in_one_line_when_the_port_is_taken(stack: RunningStack, tmp_path: Path) -> None:
    ended = throughline("up", "--port", str(stack.port), "--state-dir", str(tmp_path))

    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        f"Error: --port {stack.port}: 127.0.0.1:{stack.port} is in use by another process; "
        "choose another, or stop that one"
    )
    assert ended.stdout == ""


def test_up_is_refused_in_one_line_when_the_state_folder_is_held(stack: RunningStack) -> None:
    ended = throughline("up", "--port", "18999", "--state-dir", str(stack.state_folder))

    assert ended.returncode == 1
    assert f"a stack runs here already (pid {stack.process.pid}, {stack.url})" in ended.stderr


def test_up_serves_again_when_its_worker_was_killed(stack: RunningStack) -> None:
    engines = stack.pids_of("workers.engines.engine_process")
    (worker,) = [pid for pid in stack.pids_of("workers.main") if os.getpgid(pid) == pid]

    os.kill(worker, signal.SIGKILL)

    stack.wait_for_log("with signal 9 (SIGKILL); starting it again")
    wait_until(
        lambda: not set(engines) & set(stack.pids()), timeout_seconds=10, what="the old engine is gone"
    )
    body = {"model": "throughline-tiny", "prompt": "Paris is", "max_tokens": 4}
    job = httpx.post(f"{stack.url}/v1/jobs", json=body, timeout=30).json()
    stack.wait(lambda: httpx.get(f"{stack.url}/v1/jobs/{job['id']}").json()["done"], "the job is done", 90)


def test_up_leaves_nothing_when_interrupted_after_redis_was_killed(stack: RunningStack) -> None:
    (redis,) = stack.pids_of("valkey-server")
    os.kill(redis, signal.SIGKILL)

    status = stack.stop(signal.SIGINT)

    assert status == 0, stack.log()
    assert stack.pids() == []
    assert is_free(stack.port)
    assert "Traceback" not in stack.log()


def test_up_leaves_nothing_when_it_is_killed_itself(tmp_path: Path) -> None:
    with running_stack(tmp_path) as stack:
        stack.wait(lambda: stack.pids_of("workers.engines.engine_process") != [], "an engine process", 90)

        stack.process.kill()

        stack.process.wait()
        wait_until(lambda: stack.pids() == [], timeout_seconds=10, what="nothing is left")
        # A process that ends has no command line any more before its sockets are closed.
        wait_until(lambda: is_free(stack.port), timeout_seconds=10, what="the port is free")


def test_up_keeps_the_api_answering_503_when_the_model_folder_is_broken(tmp_path: Path) -> None:
    broken = tmp_path / "broken-model"
    broken.mkdir()
    with running_stack(tmp_path, "--model", str(broken), "--served-model-name", "mine") as stack:
        stack.wait_for_log("worker-1 ended with exit code 3 and is not started again", 90)
        blamed = [
            line for line in stack.log().splitlines() if line.startswith("worker-1") and "config.json" in line
        ]
        assert len(blamed) == 1
        assert str(broken) in blamed[0]

        stack.wait_for_log("Uvicorn running on")
        answer = httpx.post(
            f"{stack.url}/v1/completions", json={"model": "mine", "prompt": "hello"}, timeout=30
        )

        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        assert stack.stop() == 0


def test_demo_shows_completions_and_one_trace_and_leaves_nothing() -> None:
    started = time.monotonic()

    ended = throughline("demo")

    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - started < 90
    assert "San Francisco is a" in ended.stdout
    for name in ("client-span", "POST /v1/completions", "send throughline-tiny", "process throughline-tiny"):
        assert name in ended.stdout
    assert "Traceback" not in ended.stderr
