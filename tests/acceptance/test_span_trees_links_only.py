"""The traces of a job where each service keeps its own: `THROUGHLINE_TRACE_LINKS_ONLY`, on the real stack.

The request's trace ends with `send`. Each attempt is the root of another, with its wait, and links to the
send and to the attempt before it. The cases that kill parts stand last.
"""

from __future__ import annotations

import os
import signal
import time

import httpx

from cli.client import JobView
from cli.viewer_client import ViewerClient
from telemetry import names
from tests.support.processes import wait_until
from tests.support.span_trees import ENGINE, WORKER, Traced, drawn, module_stack

REQUEST = """
POST /v1/jobs SERVER api
 accept INTERNAL api
 send throughline-tiny.batch PRODUCER api
 store job INTERNAL api"""
GENERATION = """
 receive output INTERNAL worker
 report INTERNAL worker
 store result INTERNAL worker
 text_completion throughline-tiny INTERNAL worker
  engine.decode INTERNAL worker
  engine.prefill INTERNAL worker
  engine.wait INTERNAL worker"""


traced = module_stack({"THROUGHLINE_TRACE_LINKS_ONLY": "true"})


def num_traces(traced: Traced, reply: httpx.Response) -> int:
    return len({span.trace_id for span in traced.receiver.of_job(reply.headers["X-Job-Id"])})


def test_attempt_is_the_root_of_a_trace_that_links_to_the_request_s(traced: Traced) -> None:
    reply = traced.post("/v1/completions")

    wanted = f"""
POST /v1/completions SERVER api
 accept INTERNAL api
 fetch result INTERNAL api
 send throughline-tiny.interactive PRODUCER api
 store job INTERNAL api
 wait result INTERNAL api
process throughline-tiny.interactive CONSUMER worker 1 completed -> send
 claim INTERNAL worker
 queue throughline-tiny.interactive INTERNAL worker{GENERATION}"""
    traced.check(reply, wanted)
    assert num_traces(traced, reply) == 2
    told = {key for span in traced.receiver.spans() for key in span.attributes}
    vllm = {attribute.key for attribute in names.ATTRIBUTES if attribute.source is names.Source.VLLM}
    assert told & vllm == set()  # nobody switched them on


def test_job_cancelled_in_its_queue_leaves_a_mark_in_a_trace_of_its_own(traced: Traced) -> None:
    with traced.stopped(WORKER):
        reply = traced.post()
        cancel = traced.client.post(f"/v1/jobs/{reply.json()['id']}/cancel")

    below = """
process throughline-tiny.batch CONSUMER worker cancelled -> send
 claim INTERNAL worker
 queue throughline-tiny.batch INTERNAL worker"""
    traced.check(reply, REQUEST + below, cancel)


def test_trace_command_finds_both_traces_by_the_job(traced: Traced) -> None:
    reply = traced.post()
    job = JobView(traced.wait_status(reply.json()["id"], "completed").json())

    with ViewerClient(traced.receiver.read_url) as viewer:
        found = viewer.of_job(job, deadline=time.monotonic() + 20)

    assert found.is_whole
    assert {span.service for span in found.spans} == {"throughline-api", "throughline-worker"}
    assert job.trace_id in {span.trace_id for span in found.spans}
    page = httpx.get(f"{traced.receiver.read_url}/trace/{job.trace_id}").text
    assert "POST /v1/jobs" in page
    assert "engine.decode" in page


def test_attempts_are_traces_in_a_row_when_the_engine_is_killed(traced: Traced) -> None:
    with traced.stopped(ENGINE) as engine:
        reply = traced.post()
        id = reply.json()["id"]
        traced.wait_status(id, "in_progress")
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: engine not in traced.stack.pids(), timeout_seconds=10, what="the engine is gone")
    traced.wait_status(id, "completed")

    below = f"""
process throughline-tiny.batch CONSUMER worker 1 queued ERROR engine_crashed -> send
 claim INTERNAL worker
 engine.interrupted INTERNAL worker
 give back INTERNAL worker
 queue throughline-tiny.batch INTERNAL worker
process throughline-tiny.batch CONSUMER worker 2 completed -> send, process 1
 claim INTERNAL worker
 queue throughline-tiny.batch INTERNAL worker{GENERATION}"""
    traced.check(reply, REQUEST + below)
    assert num_traces(traced, reply) == 3


def test_attempt_of_a_killed_worker_has_a_trace_that_the_next_one_drew(traced: Traced) -> None:
    with traced.stopped(ENGINE):
        reply = traced.post()
        id = reply.json()["id"]
        traced.wait_status(id, "in_progress")
        os.kill(traced.pid(WORKER), signal.SIGKILL)
        wait_until(lambda: not traced.stack.pids_of(ENGINE), timeout_seconds=10, what="its engine is gone")
    job = JobView(traced.wait_status(id, "completed").json())

    above = """
lost throughline-tiny.batch INTERNAL worker 1 ERROR worker_lost -> send
 queue throughline-tiny.batch INTERNAL worker
"""
    below = f"""
process throughline-tiny.batch CONSUMER worker 2 completed -> send, lost 1
 claim INTERNAL worker{GENERATION}"""
    traced.check(reply, REQUEST.strip() + above.rstrip() + below)
    assert num_traces(traced, reply) == 3
    with ViewerClient(traced.receiver.read_url) as viewer:
        found = viewer.of_job(job, deadline=time.monotonic() + 20)
    assert found.is_whole
    assert "lost throughline-tiny.batch" in drawn(list(found.spans))
