"""The whole span tree of every way a job can go, as the real stack sends it, against a written one.

A line of a tree is: name, kind, service, attempt and job state where told, ERROR where it is one, links.
Times are held by containment (`check_trace_invariants`). Stopped processes (SIGSTOP) hold a job where a case
needs it, so no case depends on speed. The cases that kill parts stand last.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.demo import seed_client
from telemetry.record import SpanRecord
from telemetry.tree import tree
from tests.support.processes import wait_until
from tests.support.span_trees import (
    COMPLETION,
    COMPLETION_SPANS,
    ENGINE,
    PROMPT,
    WORKER,
    Protocol,
    Traced,
    drawn,
    traced_stack,
)
from tests.support.stack import own_environment
from tests.support.trace_invariants import check_trace_invariants

HEAD = """
POST /v1/jobs SERVER api
 accept INTERNAL api
 send throughline-tiny.batch PRODUCER api"""
TAIL = """
 store job INTERNAL api"""
"""Before and after what hangs below the send of a job."""
HAND_OVER_SECONDS = 0.01
"""Between two named steps, in the best of ten completions. The median of all such time in one completion is
1.0 ms on two cores with a load of 7; the bound leaves a slower machine room, and still finds a generation
without a span."""
EXPORTS: dict[str, tuple[Protocol, tuple[str, ...]]] = {
    "grpc": ("grpc", ()),
    "http/protobuf": ("http/protobuf", ()),
    "under opentelemetry-instrument": (
        "grpc",
        (str(Path(sys.executable).parent / "opentelemetry-instrument"),),
    ),
}
both_protocols = pytest.mark.parametrize("traced", ["grpc", "http/protobuf"], indirect=True)
"""For what takes seconds and says nothing about who instruments the processes."""


@pytest.fixture(scope="module", params=EXPORTS)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    protocol, launcher = EXPORTS[request.param]
    with traced_stack(tmp_path_factory.mktemp("trees"), {}, protocol=protocol, launcher=launcher) as traced:
        yield traced


def test_waiting_client_sees_every_part_of_its_completion_named(traced: Traced) -> None:
    traced.post("/v1/completions")  # the first of a stack warms the engine and the connections

    reply = traced.post("/v1/completions")

    traced.check(reply, COMPLETION)


def test_seed_client_has_the_same_tree_below_its_span(traced: Traced) -> None:
    before = set(traced.receiver.trace_ids())

    seed_client.run(
        traced.stack.port,
        endpoint=traced.receiver.grpc_endpoint,
        environ=own_environment(),
        deadline=time.monotonic() + 60,
    )

    wanted = "client-span CLIENT client" + traced.tree_of(COMPLETION).replace("\n", "\n ")
    traced.receiver.wait_for(lambda _: wanted in map(drawn, traces_since(traced, before)), timeout_seconds=20)
    (spans,) = traces_since(traced, before)
    assert drawn(spans) == wanted
    check_trace_invariants(
        spans, foreign_services=[seed_client.SERVICE], canaries=[PROMPT], failed_job_ids=[]
    )


def traces_since(traced: Traced, before: set[str]) -> list[list[SpanRecord]]:
    return [traced.receiver.trace(id) for id in set(traced.receiver.trace_ids()) - before]


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
   receive output INTERNAL worker
   report INTERNAL worker
   store result INTERNAL worker"""
    queue = """
  queue throughline-tiny.batch INTERNAL worker"""
    traced.check(reply, HEAD + below + 2 * generation + queue + TAIL, done)


@both_protocols
def test_wait_for_a_start_has_a_name_of_its_own(traced: Traced) -> None:
    reply = traced.post(start_after=0.5)
    done = traced.wait_status(reply.json()["id"], "completed")

    below = """
  delay throughline-tiny.batch INTERNAL worker
  process throughline-tiny.batch CONSUMER worker 1 completed -> send
   claim INTERNAL worker
   receive output INTERNAL worker
   report INTERNAL worker
   store result INTERNAL worker
   text_completion throughline-tiny INTERNAL worker
    engine.decode INTERNAL worker
    engine.prefill INTERNAL worker
    engine.wait INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
    assert reply.json()["next_attempt_at"] is not None
    traced.check(reply, HEAD + below + TAIL, done)


def test_job_cancelled_before_its_start_leaves_its_wait_and_no_error(traced: Traced) -> None:
    reply = traced.post(start_after=600)
    cancel = traced.client.post(f"/v1/jobs/{reply.json()['id']}/cancel")

    below = """
  delay throughline-tiny.batch INTERNAL worker
  process throughline-tiny.batch CONSUMER worker cancelled -> send
   claim INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
    assert cancel.json()["status"] == "cancelled"
    traced.check(reply, HEAD + below + TAIL, cancel)


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
   claim INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
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
   claim INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
    traced.check(reply, HEAD + below + TAIL)


def test_job_that_expires_while_it_runs_ends_without_error(traced: Traced) -> None:
    with traced.stopped(ENGINE):
        reply = traced.post(expires_after=1.5)
        traced.wait_status(reply.json()["id"], "expired")

    traced.check(reply, HEAD + ended_while_running("expired") + TAIL)


@both_protocols
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
   give back INTERNAL worker
  process throughline-tiny.batch CONSUMER worker 2 completed -> send, process 1
   claim INTERNAL worker
   receive output INTERNAL worker
   report INTERNAL worker
   store result INTERNAL worker
   text_completion throughline-tiny INTERNAL worker
    engine.decode INTERNAL worker
    engine.prefill INTERNAL worker
    engine.wait INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker
  queue throughline-tiny.batch INTERNAL worker"""
    traced.check(reply, HEAD + below + TAIL)


@both_protocols
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
   receive output INTERNAL worker
   report INTERNAL worker
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
