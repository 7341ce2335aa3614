"""Engine steps as spans, from real processes to a real receiver."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from telemetry import names
from telemetry.receiver import Receiver
from telemetry.record import SpanRecord
from tests.support.model_folders import make_model_folder
from tests.support.queue_lab import QueueLab, queue_lab
from tests.support.span_trees import ENGINE, PROMPT, Traced, traced_stack
from tests.support.trace_invariants import check_trace_invariants
from tests.support.valkey import free_port

SMALLEST_CACHE = str(1 << 20)  # 32 blocks of the built-in model: three sequences of 200 tokens
THRESHOLD_SECONDS = 0.005  # a bound of the histogram of step times, which counts the same steps


def steps_of(spans: Sequence[SpanRecord]) -> list[SpanRecord]:
    return [span for span in spans if span.name == names.SPAN_ENGINE_STEP]


def total(spans: Sequence[SpanRecord], key: str) -> int:
    return sum(int(str(span.attributes.get(key, 0))) for span in spans)


def linked(steps: Sequence[SpanRecord], role: str) -> Counter[str]:
    """How many of the steps link to each span."""
    return Counter(
        link.span_id for step in steps for link in step.links if link.attributes[names.LINK_ROLE] == role
    )


class Jobs:
    """A stack that draws every step, and the spans that began since."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self._since_ns = time.time_ns()

    def run(self, number: int, **fields: Any) -> list[str]:
        """Ids of jobs that have ended, the last step of each drawn."""
        ids = [self.traced.post(**fields).json()["id"] for _ in range(number)]
        self.wait_left(ids)
        return ids

    def spans(self) -> list[SpanRecord]:
        return [
            span
            for span in self.traced.receiver.spans()
            if span.start_ns >= self._since_ns and not span.name.startswith("GET ")
        ]

    def processes(self, ids: Sequence[str]) -> list[SpanRecord]:
        return [
            span
            for span in self.spans()
            if span.kind == "CONSUMER" and span.attributes.get(names.JOB_ID) in ids
        ]

    def wait_left(self, ids: Sequence[str]) -> None:
        def has_come(_: object) -> bool:
            completed = {
                span.span_id
                for span in self.processes(ids)
                if span.attributes.get(names.JOB_STATE) == "completed"
            }
            spans = self.spans()
            has_parents = {span.parent_id for span in spans} <= {None, *(span.span_id for span in spans)}
            has_left = completed <= set(linked(steps_of(spans), names.LINK_LEFT))
            return len(completed) == len(ids) and has_left and has_parents

        assert self.traced.receiver.wait_for(has_come, timeout_seconds=60)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    environ = {"THROUGHLINE_TRACE_STEPS": "1", "THROUGHLINE_KV_CACHE_BYTES": SMALLEST_CACHE}
    with traced_stack(tmp_path_factory.mktemp("stack"), environ) as traced:
        yield traced


@pytest.fixture
def jobs(stack: Traced) -> Jobs:
    return Jobs(stack)


def test_each_job_joins_one_step_and_leaves_one_and_the_tokens_add_up(jobs: Jobs) -> None:
    ids = jobs.run(4, max_tokens=8)

    spans = jobs.spans()
    steps, processes = steps_of(spans), jobs.processes(ids)
    wanted = Counter(span.span_id for span in processes)
    assert len(wanted) == 4
    assert linked(steps, names.LINK_JOINED) == linked(steps, names.LINK_LEFT) == wanted
    generations = [span for span in spans if span.name.startswith("text_completion ")]
    num_computed = total(generations, names.GEN_AI_USAGE_INPUT_TOKENS) - total(
        generations, names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS
    )
    assert total(steps, names.STEP_PREFILL_TOKENS) == num_computed
    assert total(steps, names.STEP_DECODE_TOKENS) == 4 * (8 - 1)  # the last token is never run
    assert total(steps, names.STEP_BATCH_SIZE) == total(generations, names.STEPS) == 4 * 8
    check_trace_invariants(spans, canaries=[PROMPT], failed_job_ids=())


def test_preempted_job_joins_again_and_each_of_its_prefills_knows_the_step(jobs: Jobs) -> None:
    ids = jobs.run(6, max_tokens=200)

    spans = jobs.spans()
    processes, steps = jobs.processes(ids), {step.span_id: step for step in steps_of(spans)}
    joined = linked([*steps.values()], names.LINK_JOINED)
    generations = {span.parent_id: span for span in spans if span.name.startswith("text_completion ")}
    assert total([*generations.values()], names.PREEMPTIONS) > 0
    for process in processes:
        generation = generations[process.span_id]
        prefills = [
            span
            for span in spans
            if span.parent_id == generation.span_id and span.name == names.SPAN_ENGINE_PREFILL
        ]
        admitted_by = [steps[link.span_id] for span in prefills for link in span.links]
        assert len({step.span_id for step in admitted_by}) == len(prefills) == joined[process.span_id]
        assert joined[process.span_id] == 1 + total([generation], names.PREEMPTIONS)
    assert linked([*steps.values()], names.LINK_LEFT) == Counter(span.span_id for span in processes)
    check_trace_invariants(spans, canaries=[PROMPT], failed_job_ids=())


def test_prompts_of_one_job_join_and_leave_as_one(jobs: Jobs) -> None:
    jobs.run(1, prompt=[PROMPT] * 5, max_tokens=4)

    steps = steps_of(jobs.spans())
    assert total(steps, names.STEP_JOINED) == total(steps, names.STEP_LEFT) == 5
    assert all(count <= len(steps) for count in linked(steps, names.LINK_JOINED).values())
    assert len(linked(steps, names.LINK_JOINED)) == 1
    check_trace_invariants(jobs.spans(), canaries=[PROMPT], failed_job_ids=())


def test_cancelled_job_is_seen_to_leave(jobs: Jobs) -> None:
    id = jobs.traced.post(max_tokens=400).json()["id"]
    jobs.traced.wait_status(id, "in_progress")
    jobs.traced.client.delete(f"/v1/jobs/{id}")

    def has_left(_: object) -> bool:
        processes = {span.span_id for span in jobs.processes([id])}
        return bool(processes) and processes == set(linked(steps_of(jobs.spans()), names.LINK_LEFT))

    assert jobs.traced.receiver.wait_for(has_left, timeout_seconds=30)


def test_job_whose_engine_dies_joins_the_next_engine_in_its_second_attempt(jobs: Jobs) -> None:
    id = jobs.traced.post(max_tokens=400).json()["id"]
    jobs.traced.wait_status(id, "in_progress")
    os.kill(jobs.traced.pid(ENGINE), signal.SIGKILL)

    jobs.wait_left([id])

    second = next(span for span in jobs.processes([id]) if span.attributes[names.JOB_STATE] == "completed")
    steps = steps_of(jobs.spans())
    assert linked(steps, names.LINK_JOINED)[second.span_id] == 1
    assert linked(steps, names.LINK_LEFT) == Counter({second.span_id: 1})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueLab]:
    folder = tmp_path_factory.mktemp("lab")
    make_model_folder("llama", folder / "llama")
    with queue_lab(folder / "llama", folder) as lab:
        yield lab


@contextmanager
def spans_of_worker(lab: QueueLab, **environment: Any) -> Iterator[Callable[[], list[SpanRecord]]]:
    """A worker of its own; asked for its spans it stops first, which sends the last of them."""
    with Receiver() as receiver:
        worker = lab.start_worker(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=receiver.grpc_endpoint, **environment)

        def spans() -> list[SpanRecord]:
            assert worker.stop() == 0
            return receiver.spans()

        try:
            yield spans
        finally:
            if worker.process.poll() is None:  # the next worker's jobs must not come to it
                worker.kill()


def step_counts(port: int) -> tuple[int, int]:
    """All steps, and those longer than the threshold, as Prometheus is told."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    name = "throughline_engine_step_duration_seconds"
    count = next(sample.value for sample in samples if sample.name == f"{name}_count")
    quick = next(
        sample.value
        for sample in samples
        if sample.name == f"{name}_bucket" and float(sample.labels["le"]) == THRESHOLD_SECONDS
    )
    return int(count), int(count - quick)


def test_slow_steps_alone_are_drawn_when_only_a_threshold_is_given(lab: QueueLab) -> None:
    port = free_port()
    settings = {
        "THROUGHLINE_TRACE_SLOW_STEPS_SECONDS": str(THRESHOLD_SECONDS),
        "THROUGHLINE_METRICS_PORT": str(port),
    }
    with spans_of_worker(lab, **settings) as spans:
        lab.wait_final([lab.submit(max_tokens=30, prompt_length=5)])
        lab.wait_final([lab.submit(num_prompts=16, prompt_length=200, max_tokens=8)])
        num_steps, num_slow = step_counts(port)
        steps = steps_of(spans())

    assert 0 < num_slow < num_steps
    assert len(steps) == num_slow
    assert all(step.attributes[names.STEP_SLOW] is True for step in steps)
    assert all(step.duration_seconds > THRESHOLD_SECONDS - 1e-6 for step in steps)


def test_no_step_is_drawn_unless_asked_for(lab: QueueLab) -> None:
    with spans_of_worker(lab) as spans:
        lab.wait_final([lab.submit()])
        received = spans()

    assert any(span.kind == "CONSUMER" for span in received)
    assert not steps_of(received)
    assert not any(span.links for span in received if span.name == names.SPAN_ENGINE_PREFILL)
