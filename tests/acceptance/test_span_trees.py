"""The whole span tree of every way a job can go, as the real stack sends it, against a written one.

A line of a tree is: name, kind, service, attempt and job state where told, ERROR where it is one, links.
Times are held by containment (`check_trace_invariants`). Stopped processes (SIGSTOP) hold a job where a case
needs it, so no case depends on speed. The cases that kill parts stand last.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from jobs.keys import Keys
from jobs.model import JobId
from telemetry import names
from telemetry.receiver import Receiver
from telemetry.record import SpanRecord
from telemetry.tree import Node, tree
from tests.support.processes import wait_until
from tests.support.stack import RunningStack
from tests.support.trace_invariants import check_trace_invariants

PROMPT = "San Francisco is a"
SERVICES = {"throughline-api": "api", "throughline-worker": "worker"}
HEAD = """
POST /v1/jobs SERVER api
 accept INTERNAL api
 send throughline-tiny.batch PRODUCER api"""
TAIL = """
 store job INTERNAL api"""
"""Before and after what hangs below the send of a job."""


def drawn(spans: list[SpanRecord]) -> str:
    """Children by name, then attempt: their order in time is the scheduler's affair."""
    by_id = {span.span_id: span for span in spans}
    return "\n".join(line for node in _sorted(tree(spans).roots) for line in _lines(node, 0, by_id))


def _lines(node: Node, depth: int, by_id: Mapping[str, SpanRecord]) -> Iterator[str]:
    span = node.span
    told = [
        _text(span.attributes[key]) for key in (names.JOB_ATTEMPT, names.JOB_STATE) if key in span.attributes
    ]
    error = [f"ERROR {_text(span.attributes.get(names.ERROR_TYPE))}"] if span.status == "ERROR" else []
    links = [_target(by_id.get(link.span_id)) for link in span.links]
    arrow = ["->", ", ".join(links)] if links else []
    yield " " * depth + " ".join([span.name, span.kind, SERVICES[span.service], *told, *error, *arrow])
    for child in _sorted(node.children):
        yield from _lines(child, depth + 1, by_id)


def _sorted(nodes: tuple[Node, ...]) -> list[Node]:
    return sorted(nodes, key=lambda node: (node.span.name, str(node.span.attributes.get(names.JOB_ATTEMPT))))


def _text(value: object) -> str:
    return str(value)


def _target(span: SpanRecord | None) -> str:
    if span is None:
        return "nothing that came"
    number = span.attributes.get(names.JOB_ATTEMPT)
    return span.name.split()[0] + (f" {_text(number)}" if number is not None else "")


@dataclass
class Traced:
    stack: RunningStack
    receiver: Receiver
    client: httpx.Client
    store: Any
    """A Redis client with decoded replies."""

    def post(self, path: str = "/v1/jobs", **fields: Any) -> httpx.Response:
        body = {"model": "throughline-tiny", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, **fields}
        reply = self.client.post(path, json=body)
        assert reply.status_code in (200, 202), reply.text
        return reply

    def wait_status(self, id: str, status: str) -> httpx.Response:
        self.stack.wait(
            lambda: self.client.get(f"/v1/jobs/{id}").json()["status"] == status, f"{id} is {status}", 60.0
        )
        return self.client.get(f"/v1/jobs/{id}")

    def check(self, reply: httpx.Response, wanted: str, *also: httpx.Response, failed: bool = False) -> None:
        """The trace of `reply` is `wanted`; those of `also` link to it; all keep the invariants."""
        trace_id = reply.headers["X-Trace-Id"]
        self.receiver.wait_for(
            lambda _: drawn(self.receiver.trace(trace_id)) == wanted.strip(), timeout_seconds=20
        )
        spans = self.receiver.trace(trace_id)
        assert drawn(spans) == wanted.strip()
        for other in also:
            (poll,) = self.trace(other.headers["X-Trace-Id"], 1)
            root = next(span for span in spans if span.parent_id is None)
            assert [(link.span_id, link.attributes[names.LINK_ROLE]) for link in poll.links] == [
                (root.span_id, names.LINK_CREATION)
            ]
            spans.append(poll)
        failed_ids = {str(span.attributes[names.JOB_ID]) for span in spans if span.kind == "CONSUMER"}
        check_trace_invariants(spans, canaries=[PROMPT], failed_job_ids=failed_ids if failed else set())

    def trace(self, trace_id: str, count: int) -> list[SpanRecord]:
        self.receiver.wait_for(lambda _: len(self.receiver.trace(trace_id)) >= count, timeout_seconds=20)
        return self.receiver.trace(trace_id)

    def pid(self, module: str) -> int:
        (pid,) = self.stack.pids_of(module)
        return pid

    @contextmanager
    def stopped(self, module: str) -> Iterator[int]:
        pid = self.pid(module)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(pid), timeout_seconds=5, what=f"{module} stands still")
        try:
            yield pid
        finally:
            with suppress(ProcessLookupError):  # the case killed it
                os.kill(pid, signal.SIGCONT)

    def change_request(self, id: str, **fields: Any) -> None:
        key = Keys("tl:").job(JobId(id))
        request = json.loads(str(self.store.hget(key, "request")))
        self.store.hset(key, "request", json.dumps(request | fields))


def is_stopped(pid: int) -> bool:
    """Its threads stand still, which is a moment after the signal."""
    states = [
        path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


COMPLETION_SPANS = 14
HAND_OVER_SECONDS = 0.025
"""Between two named steps. Measured 0.6 to 3.7 ms on two busy cores, mostly from the engine's process to the
waiting thread; the bound leaves a slower machine room and still finds a generation without a span."""
WORKER, ENGINE = "workers.main", "workers.engine_process"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    with Receiver("127.0.0.1", 0, 0) as receiver:
        environ = {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.grpc_endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "THROUGHLINE_LEASE_SECONDS": "3",
        }
        stack = RunningStack(tmp_path_factory.mktemp("trees"), environ=environ)
        try:
            stack.wait_until_ready()
            store = redis.Redis.from_url(stack.redis_url, decode_responses=True)
            with httpx.Client(base_url=stack.url, timeout=60) as client, store:
                yield Traced(stack, receiver, client, store)
        finally:
            stack.kill_everything()


def test_waiting_client_sees_every_part_of_its_completion_named(traced: Traced) -> None:
    traced.post("/v1/completions")  # the first of a stack warms the engine and the connections

    reply = traced.post("/v1/completions")

    wanted = """
POST /v1/completions SERVER api
 accept INTERNAL api
 fetch result INTERNAL api
 send throughline-tiny.interactive PRODUCER api
  process throughline-tiny.interactive CONSUMER worker 1 completed -> send
   claim INTERNAL worker
   store result INTERNAL worker
   text_completion throughline-tiny INTERNAL worker
    engine.decode INTERNAL worker
    engine.prefill INTERNAL worker
    engine.wait INTERNAL worker
  queue throughline-tiny.interactive INTERNAL worker
 store job INTERNAL api
 wait result INTERNAL api"""
    traced.check(reply, wanted)


def test_every_part_of_a_completion_has_a_name(traced: Traced) -> None:
    """No gap of HAND_OVER_SECONDS in the best of ten: else a step has no span."""
    replies = [traced.post("/v1/completions", max_tokens=40) for _ in range(10)]

    trees = [tree(traced.trace(reply.headers["X-Trace-Id"], COMPLETION_SPANS)) for reply in replies]
    gaps = [
        [
            f"{gap.duration_seconds:.4f} s in {gap.span.name}, between {gap.after} and {gap.before}"
            for gap in each.gaps
            if gap.duration_seconds > HAND_OVER_SECONDS
        ]
        for each in trees
    ]
    assert [] in gaps, gaps


def test_job_of_many_prompts_and_its_poll_are_two_traces_with_a_link(traced: Traced) -> None:
    reply = traced.post(prompt=[PROMPT, "Rome is"])
    done = traced.wait_status(reply.json()["id"], "completed")

    generation = """
   text_completion throughline-tiny INTERNAL worker
    engine.decode INTERNAL worker
    engine.prefill INTERNAL worker
    engine.wait INTERNAL worker"""
    below = """
  process throughline-tiny.batch CONSUMER worker 1 completed -> send
   claim INTERNAL worker
   store result INTERNAL worker"""
    queue = """
  queue throughline-tiny.batch INTERNAL worker"""
    traced.check(reply, HEAD + below + 2 * generation + queue + TAIL, done)


def test_job_that_the_engine_refuses_ends_in_error(traced: Traced) -> None:
    with traced.stopped(WORKER):
        reply = traced.post()
        id = reply.json()["id"]
        traced.change_request(id, prompts=[{"token_ids": [5] * 600}])  # the API would not let it pass
    traced.wait_status(id, "failed")

    below = """
  process throughline-tiny.batch CONSUMER worker 1 failed ERROR invalid_request -> send
   claim INTERNAL worker
   engine.interrupted INTERNAL worker
   store result INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
    traced.check(reply, HEAD + below + TAIL, failed=True)


def test_job_cancelled_in_its_queue_leaves_a_mark_and_no_error(traced: Traced) -> None:
    with traced.stopped(WORKER):
        reply = traced.post()
        cancel = traced.client.post(f"/v1/jobs/{reply.json()['id']}/cancel")

    below = """
  process throughline-tiny.batch CONSUMER worker cancelled -> send
   claim INTERNAL worker"""
    assert cancel.json()["status"] == "cancelled"
    traced.check(reply, HEAD + below + TAIL, cancel)


def test_job_cancelled_while_it_runs_ends_without_error(traced: Traced) -> None:
    with traced.stopped(ENGINE):
        reply = traced.post()
        id = reply.json()["id"]
        traced.wait_status(id, "in_progress")
        cancel = traced.client.post(f"/v1/jobs/{id}/cancel")
        traced.wait_status(id, "cancelled")

    traced.check(reply, HEAD + ended_while_running("cancelled") + TAIL, cancel)


def test_job_that_expires_in_its_queue_leaves_a_mark_and_no_error(traced: Traced) -> None:
    with traced.stopped(WORKER):
        reply = traced.post(expires_after=0.1)
        expires_at = time.time() + 0.1
        wait_until(lambda: time.time() > expires_at, timeout_seconds=5, what="the deadline has passed")

    below = """
  process throughline-tiny.batch CONSUMER worker expired -> send
   claim INTERNAL worker"""
    traced.check(reply, HEAD + below + TAIL)


def test_job_that_expires_while_it_runs_ends_without_error(traced: Traced) -> None:
    with traced.stopped(ENGINE):
        reply = traced.post(expires_after=1.5)
        traced.wait_status(reply.json()["id"], "expired")

    traced.check(reply, HEAD + ended_while_running("expired") + TAIL)


def test_attempts_are_siblings_in_a_row_when_the_engine_is_killed(traced: Traced) -> None:
    with traced.stopped(ENGINE) as engine:
        reply = traced.post()
        id = reply.json()["id"]
        traced.wait_status(id, "in_progress")
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: engine not in traced.stack.pids(), timeout_seconds=10, what="the engine is gone")
    traced.wait_status(id, "completed")

    below = """
  process throughline-tiny.batch CONSUMER worker 1 queued ERROR engine_crashed -> send
   claim INTERNAL worker
   engine.interrupted INTERNAL worker
  process throughline-tiny.batch CONSUMER worker 2 completed -> send, process 1
   claim INTERNAL worker
   store result INTERNAL worker
   text_completion throughline-tiny INTERNAL worker
    engine.decode INTERNAL worker
    engine.prefill INTERNAL worker
    engine.wait INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
    traced.check(reply, HEAD + below + TAIL)


def test_attempt_of_a_killed_worker_is_drawn_by_the_next(traced: Traced) -> None:
    with traced.stopped(ENGINE):
        reply = traced.post()
        id, trace_id = reply.json()["id"], reply.headers["X-Trace-Id"]
        traced.wait_status(id, "in_progress")
        # Its queue span has left; its process span never will.
        traced.trace(trace_id, 5)
        os.kill(traced.pid(WORKER), signal.SIGKILL)
        wait_until(lambda: not traced.stack.pids_of(ENGINE), timeout_seconds=10, what="its engine is gone")
    traced.wait_status(id, "completed")

    below = """
  lost throughline-tiny.batch INTERNAL worker 1 ERROR worker_lost
  process throughline-tiny.batch CONSUMER worker 2 completed -> send, lost 1
   claim INTERNAL worker
   store result INTERNAL worker
   text_completion throughline-tiny INTERNAL worker
    engine.decode INTERNAL worker
    engine.prefill INTERNAL worker
    engine.wait INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
    traced.check(reply, HEAD + below + TAIL)
    spans = {span.name.split()[0]: span for span in traced.receiver.trace(trace_id)}
    assert spans["lost"].duration_seconds > 3  # its lease
    assert spans["queue"].end_ns <= spans["lost"].start_ns + 1_000_000
    assert spans["lost"].end_ns <= spans["claim"].end_ns


def ended_while_running(state: str) -> str:
    return f"""
  process throughline-tiny.batch CONSUMER worker 1 {state} -> send
   claim INTERNAL worker
   engine.interrupted INTERNAL worker
   store result INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
