"""Bring the containers up as a user would, try every published link, print what was found, take all down.

    make compose-smoke
    make compose-smoke ARGS="--without jaeger,otel-collector,grafana"   where images cannot be had
    make compose-smoke ARGS="--keep"                                    leave the stack up

Needs docker with compose, the published ports free, and nothing but Python's standard library. The stack is a
project of its own, so queues and downloads of a stack that you use are left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "throughline-smoke"
DASHBOARD = ROOT / "infra" / "grafana" / "dashboards" / "throughline.json"
MODEL = "throughline-tiny"
API, FLOWER, JAEGER = "http://127.0.0.1:8000", "http://127.0.0.1:5555", "http://127.0.0.1:16686"
PROMETHEUS, GRAFANA = "http://127.0.0.1:9090", "http://127.0.0.1:3000"
PATIENCE_SECONDS = 60.0
UP_SECONDS = 420.0

MAY_BE_EMPTY = {"Attempts that did not complete", "Jobs recovered", "Spans dropped"}
"""Panels that have nothing to show as long as nothing goes wrong."""
FROM_COLLECTOR = "otlp_"


class CheckFailed(Exception):
    """What was expected and what was found, for the table."""


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    verdict: str
    """ok, FAILED or left out."""
    detail: str
    seconds: float


class Stack:
    """The compose project, with a password that exists nowhere else, so that a leak of it can be seen."""

    def __init__(self, left_out: frozenset[str]) -> None:
        self.left_out = left_out
        self.password = secrets.token_hex(12)
        self._environment = os.environ | {"REDIS_PASSWORD": self.password, "COMPOSE_PROJECT_NAME": PROJECT}
        named = self.compose("config", "--services").split()
        self.services = sorted(set(named) - left_out)
        if unknown := left_out - set(named):
            raise CheckFailed(f"compose.yaml has no service {', '.join(sorted(unknown))}")

    def compose(self, *arguments: str, timeout: float = UP_SECONDS) -> str:
        return self._run(["docker", "compose", *arguments], timeout)

    def docker(self, *arguments: str) -> str:
        return self._run(["docker", *arguments], PATIENCE_SECONDS)

    def containers(self) -> list[dict[str, Any]]:
        lines = self.compose("ps", "--all", "--format", "json").splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    def _run(self, command: Sequence[str], timeout: float) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise CheckFailed(
                f"{' '.join(command[:4])} … ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
            )
        return done.stdout


def ask(url: str, body: object = None) -> Any:
    """The JSON answer, or CheckFailed for anything else."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as reply:
            return json.load(reply)
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{url}: {error}") from error


def patiently(check: Callable[[], str]) -> str:
    """The check's answer once it passes; its last failure when patience ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return check()
        except CheckFailed:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def every_container_is_well(stack: Stack) -> str:
    states = {one["Service"]: one["Health"] or one["State"] for one in stack.containers()}
    bad = {name: state for name, state in states.items() if state not in ("healthy", "running")}
    if bad or set(states) != set(stack.services):
        raise CheckFailed(f"{states}, wanted {stack.services}")
    unchecked = sorted(name for name, state in states.items() if state == "running")
    return f"{len(states)} up" + (
        f"; no health check: {', '.join(unchecked)}" if unchecked else ", all healthy"
    )


def processes(stack: Stack) -> Iterator[tuple[str, str, str]]:
    """Service, user id and command line of each process in a container."""
    for one in stack.containers():
        for line in stack.docker("top", one["ID"], "-eo", "pid,uid,args").splitlines()[1:]:
            _, uid, arguments = line.split(maxsplit=2)
            yield one["Service"], uid, arguments


def nobody_is_root_and_no_password_shows(stack: Stack) -> str:
    running = list(processes(stack))
    if roots := sorted({service for service, uid, _ in running if uid == "0"}):
        raise CheckFailed(f"run as root: {', '.join(roots)}")
    if told := sorted({service for service, _, arguments in running if stack.password in arguments}):
        raise CheckFailed(f"the password stands in the process list of {', '.join(told)}")
    if stack.password in stack.compose("logs", "--no-color"):
        raise CheckFailed("the password stands in the logs")
    return f"{len(running)} processes, none root; the password is in no command line and no log line"


def redis_wants_its_password(stack: Stack) -> str:
    refused = stack.compose("exec", "-T", "-e", "REDISCLI_AUTH=", "redis", "redis-cli", "ping").strip()
    if "NOAUTH" not in refused:
        raise CheckFailed(f"without the password redis answers {refused}")
    appending = stack.compose("exec", "-T", "redis", "redis-cli", "config", "get", "appendonly").split()
    if appending != ["appendonly", "yes"]:
        raise CheckFailed(f"{appending}")
    return "refuses without it; appends to its file"


def the_api_knows_no_torch(stack: Stack) -> str:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    stack.compose("exec", "-T", "api", "python", "-c", probe)
    return "no torch in the image"


def the_worker_has_its_kernels(stack: Stack) -> str:
    probe = "from cuda_ops.native import native_levels; print(*native_levels())"
    return f"CPU kernels: {stack.compose('exec', '-T', 'worker', 'python', '-c', probe).strip()}"


def the_api_completes(_: Stack) -> str:
    answer = complete()
    usage = answer["usage"]
    return f"{usage['completion_tokens']} tokens for {usage['prompt_tokens']}"


def complete() -> Any:
    body = {"model": MODEL, "prompt": "San Francisco is a", "max_tokens": 16}
    return ask(f"{API}/v1/completions", body)


def flower_lists_the_worker(_: Stack) -> str:
    listed = ask(f"{FLOWER}/workers?json=1")["data"]
    alive = [row["hostname"] for row in listed if row["status"]]
    if not alive:
        raise CheckFailed(f"no live worker in {listed}")
    return f"{len(alive)} live"


def more_workers_are_found(stack: Stack) -> str:
    stack.compose("up", "--detach", "--no-recreate", "--wait", "--scale", "worker=3", "worker")
    found = patiently(lambda: _scraped_workers(3))
    stack.compose("up", "--detach", "--no-recreate", "--wait", "--scale", "worker=1", "worker")
    return f"{found} with --scale worker=3, {patiently(lambda: _scraped_workers(1))} again with 1"


def _scraped_workers(wanted: int) -> str:
    up = query('sum(up{job="throughline-worker"})')
    if not up or float(up[0]["value"][1]) != wanted:
        raise CheckFailed(f"{up}, wanted {wanted} workers")
    return f"{wanted} scraped"


def query(expression: str) -> list[Any]:
    answer = ask(f"{PROMETHEUS}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
    return [one for one in answer["data"]["result"] if one["value"][1] != "NaN"]


def prometheus_reaches_its_targets(stack: Stack) -> str:
    targets = ask(f"{PROMETHEUS}/api/v1/targets")["data"]["activeTargets"]
    health = {one["labels"]["job"]: one["health"] for one in targets}
    if "otel-collector" in stack.left_out:
        health = {job: state for job, state in health.items() if job.startswith("throughline")}
    if set(health.values()) != {"up"} or not {"throughline-api", "throughline-worker"} <= set(health):
        raise CheckFailed(f"{health}")
    rules = [rule for group in ask(f"{PROMETHEUS}/api/v1/rules")["data"]["groups"] for rule in group["rules"]]
    return f"{', '.join(sorted(health))} up; {len(rules)} alert rules"


def the_dashboard_has_figures(stack: Stack) -> str:
    return patiently(lambda: _dashboard(stack))


def submit_load() -> None:
    """Both priorities, and a job that is held for longer than a lease's renewal."""
    for _ in range(5):
        complete()
    job = {"model": MODEL, "prompt": ["Paris is"] * 32, "max_tokens": 400, "priority": "batch"}
    ask(f"{API}/v1/jobs/{ask(f'{API}/v1/jobs', job)['id']}?wait=30")


def _dashboard(stack: Stack) -> str:
    """A rate needs activity between two scrapes, so each look follows some."""
    submit_load()
    empty: list[str] = []
    num_queries = 0
    for title, expression in dashboard_queries():
        if FROM_COLLECTOR in expression and "otel-collector" in stack.left_out:
            continue
        num_queries += 1
        if not query(expression) and title not in MAY_BE_EMPTY:
            empty.append(title)
    if empty:
        raise CheckFailed(f"no figures for {', '.join(dict.fromkeys(empty))}")
    return f"{num_queries} queries of the dashboard answered"


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Title and expression, with Grafana's variables as it would put them."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m")
            yield panel["title"], expression.replace("$model", ".*").replace("$priority", ".*")


def jaeger_has_the_trace(_: Stack) -> str:
    job = ask(f"{API}/v1/jobs", {"model": MODEL, "prompt": "Berlin is", "max_tokens": 8})
    ask(f"{API}/v1/jobs/{job['id']}?wait=30")
    return patiently(lambda: _trace_of(job["id"]))


def _trace_of(job_id: str) -> str:
    names = set(ask(f"{JAEGER}/api/services")["data"] or ())
    if not {"throughline-api", "throughline-worker"} <= names:
        raise CheckFailed(f"services: {sorted(names)}")
    tags = urllib.parse.quote(json.dumps({"job.id": job_id}))
    traces = ask(f"{JAEGER}/api/traces?service=throughline-worker&limit=20&tags={tags}")["data"]
    served_by = {process["serviceName"] for trace in traces for process in trace["processes"].values()}
    if not {"throughline-api", "throughline-worker"} <= served_by:
        raise CheckFailed(f"a trace of {served_by}")
    return f"one trace over {' and '.join(sorted(served_by))}, {len(traces[0]['spans'])} spans"


def a_slow_bucket_leads_to_a_trace(_: Stack) -> str:
    return patiently(_exemplar)


def _exemplar() -> str:
    since = {"start": time.time() - 600, "end": time.time()}
    asked = {"query": "otlp_gen_ai_server_request_duration_seconds_bucket", **since}
    found = ask(f"{PROMETHEUS}/api/v1/query_exemplars?{urllib.parse.urlencode(asked)}")["data"]
    ids = {one["labels"].get("trace_id") for series in found for one in series["exemplars"]} - {None}
    if not ids:
        raise CheckFailed("no exemplar with a trace id")
    return f"{len(ids)} exemplars with a trace id"


def grafana_shows_the_dashboard(_: Stack) -> str:
    board = ask(f"{GRAFANA}/api/dashboards/uid/throughline")["dashboard"]
    up = ask(f"{GRAFANA}/api/datasources/proxy/uid/prometheus/api/v1/query?query=up")["data"]["result"]
    if not up:
        raise CheckFailed("its Prometheus has no figures")
    return f"{len(board['panels'])} panels, without a login; its Prometheus answers"


CHECKS: tuple[tuple[str, frozenset[str], Callable[[Stack], str]], ...] = (
    ("containers", frozenset(), every_container_is_well),
    ("redis", frozenset({"redis"}), redis_wants_its_password),
    ("api image", frozenset({"api"}), the_api_knows_no_torch),
    ("worker image", frozenset({"worker"}), the_worker_has_its_kernels),
    ("API :8000", frozenset({"api", "worker"}), the_api_completes),
    ("Flower :5555", frozenset({"flower"}), flower_lists_the_worker),
    ("Prometheus :9090", frozenset({"prometheus"}), prometheus_reaches_its_targets),
    ("dashboard", frozenset({"prometheus"}), the_dashboard_has_figures),
    ("scaling", frozenset({"prometheus", "worker"}), more_workers_are_found),
    ("Jaeger :16686", frozenset({"jaeger", "otel-collector"}), jaeger_has_the_trace),
    ("exemplars", frozenset({"prometheus", "otel-collector"}), a_slow_bucket_leads_to_a_trace),
    ("Grafana :3000", frozenset({"grafana", "prometheus"}), grafana_shows_the_dashboard),
    ("secrets, users", frozenset(), nobody_is_root_and_no_password_shows),
)


def find(stack: Stack) -> Iterator[Finding]:
    for name, needed, check in CHECKS:
        started = time.monotonic()
        if missing := needed & stack.left_out:
            yield Finding(name, "left out", f"without {', '.join(sorted(missing))}", 0.0)
            continue
        try:
            verdict, detail = "ok", check(stack)
        except (CheckFailed, KeyError, subprocess.TimeoutExpired) as error:
            verdict, detail = "FAILED", f"{error!r}" if isinstance(error, KeyError) else str(error)
        yield Finding(name, verdict, detail, time.monotonic() - started)


def timed(title: str, run: Callable[[], object]) -> None:
    started = time.monotonic()
    run()
    print(f"{title}: {time.monotonic() - started:.0f} s", flush=True)


def smoke(stack: Stack) -> bool:
    """Whether everything that was not left out is well."""
    timed("build", lambda: stack.compose("build", "--quiet", *stack.services, timeout=3600))
    timed("up and healthy", lambda: stack.compose("up", "--detach", "--wait", *stack.services))
    findings: list[Finding] = []
    for finding in find(stack):
        findings.append(finding)
        print(
            f"{finding.name:<17} {finding.verdict:<9} {finding.seconds:5.1f} s  {finding.detail}", flush=True
        )
    failed = [finding for finding in findings if finding.verdict == "FAILED"]
    if failed:
        print(stack.compose("logs", "--no-color", "--tail", "40").replace(stack.password, "***"))
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("COMPOSE_SMOKE_WITHOUT", "")
    parser.add_argument("--without", default=default, metavar="SERVICE,…", help="services to leave out")
    parser.add_argument("--keep", action="store_true", help="leave the stack up")
    options = parser.parse_args()
    try:
        stack = Stack(frozenset(filter(None, options.without.split(","))))
    except (CheckFailed, FileNotFoundError) as error:
        print(f"docker compose cannot be used: {error}", file=sys.stderr)
        return 2
    try:
        return 0 if smoke(stack) else 1
    except CheckFailed as error:
        print(f"FAILED  {error}", file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            stack.compose("down", "--volumes", "--timeout", "30")


if __name__ == "__main__":
    sys.exit(main())
