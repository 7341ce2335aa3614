"""What the trace of a job becomes by the settings that shape it, on the real stack: `telemetry/README.md`."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest

from telemetry import names
from telemetry.record import SpanRecord
from tests.support.span_trees import ENGINE, PROMPT, WORKER, Traced, drawn, module_stack
from tests.support.trace_invariants import check_trace_invariants

NUM_ITEM_SPANS = 2
TEMPLATE = "http://127.0.0.1:16686/trace/{trace_id}"
PARTS = ("queue_ms", "engine_wait_ms", "prefill_ms", "decode_ms", "store_ms")
VLLM_KEYS = {attribute.key for attribute in names.ATTRIBUTES if attribute.source is names.Source.VLLM}
ENVIRON = {
    "THROUGHLINE_TRACE_VLLM_KEYS": "true",
    "THROUGHLINE_TRACE_URL_TEMPLATE": TEMPLATE,
    "THROUGHLINE_TRACE_ITEM_SPANS": str(NUM_ITEM_SPANS),
}


traced = module_stack(ENVIRON)


def test_items_beyond_the_limit_are_roots_that_link_to_their_job(traced: Traced) -> None:
    prompts = [PROMPT, "Rome is", "Paris is the capital", "Oslo", "Bern is a"]
    reply = traced.post("/v1/completions", prompt=prompts, n=2)
    job_id, trace_id = reply.headers["X-Job-Id"], reply.headers["X-Trace-Id"]

    spans = wait_for_generations(traced, job_id, trace_id, len(prompts))
    apart = [span for span in spans if span.trace_id != trace_id]
    inside = [span for span in spans if span.trace_id == trace_id]

    assert [line for line in drawn(spans).splitlines() if not line.startswith(" ")] == [
        "POST /v1/completions SERVER api",
        *["text_completion throughline-tiny INTERNAL worker -> send, process 1"] * 3,
    ]
    assert drawn(inside).count("text_completion") == drawn(inside).count("engine.prefill") == NUM_ITEM_SPANS
    assert sorted(span.attributes[names.ITEM_INDEX] for span in apart) == [2, 3, 4]  # type: ignore[type-var]
    assert len({span.trace_id for span in apart}) == len(apart)
    usage = reply.json()["usage"]
    told = (usage["prompt_tokens"], usage["completion_tokens"])
    check_trace_invariants(spans, canaries=prompts, failed_job_ids=(), usage={job_id: told})


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "Rome is", "Oslo"]])
def test_timings_of_a_completion_add_up_and_fit_into_its_request(
    traced: Traced, prompt: str | list[str]
) -> None:
    started = time.perf_counter()
    reply = traced.post("/v1/completions", prompt=prompt, max_tokens=40)
    waited_ms = (time.perf_counter() - started) * 1000

    timings = reply.json()["timings"]
    assert timings["total_ms"] == pytest.approx(sum(timings[part] for part in PARTS), abs=0.001)
    assert 0 < timings["decode_ms"] < timings["total_ms"] < waited_ms
    job = traced.client.get(f"/v1/jobs/{reply.headers['X-Job-Id']}").json()
    assert job["timings"] == timings == job["result"]["timings"]


def test_timings_agree_with_the_trace(traced: Traced) -> None:
    """The same stamps make both; what is between two spans, a hand-over, counts as engine wait."""
    reply = traced.post("/v1/completions", max_tokens=40)
    timings = reply.json()["timings"]
    spans = wait_for_generations(traced, reply.headers["X-Job-Id"], reply.headers["X-Trace-Id"], 1)
    lengths = {span.name.split()[0]: span.duration_seconds * 1000 for span in spans}

    assert lengths["engine.prefill"] == pytest.approx(timings["prefill_ms"], abs=0.1)
    assert lengths["engine.decode"] == pytest.approx(timings["decode_ms"], abs=0.1)
    assert timings["total_ms"] <= lengths["POST"]


def test_generation_carries_the_keys_of_vllm_when_they_are_switched_on(traced: Traced) -> None:
    reply = traced.post("/v1/completions", max_tokens=40)
    spans = wait_for_generations(traced, reply.headers["X-Job-Id"], reply.headers["X-Trace-Id"], 1)

    (carriers,) = [span for span in spans if VLLM_KEYS & span.attributes.keys()]
    told = {key: carriers.attributes[key] for key in VLLM_KEYS}
    assert told["gen_ai.request.id"] == f"{reply.json()['id']}-0"
    assert told["gen_ai.usage.completion_tokens"] == 40
    e2e, decode = (float(str(told[f"gen_ai.latency.{name}"])) for name in ("e2e", "time_in_model_decode"))
    assert 0 < decode < e2e == pytest.approx(carriers.duration_seconds, abs=1e-6)
    check_trace_invariants(spans, canaries=[PROMPT], failed_job_ids=())


def test_replies_and_errors_link_to_the_page_of_their_trace(traced: Traced) -> None:
    done = traced.post("/v1/completions")
    refused = traced.client.post("/v1/completions", json={"model": "throughline-tiny", "prompt": 7})

    assert done.json()["trace"] == page_of(done)
    assert refused.json()["error"]["trace"] == page_of(refused)
    job = traced.client.get(f"/v1/jobs/{done.headers['X-Job-Id']}").json()
    assert job["links"]["trace"] == page_of(done)


def test_attempt_that_a_stopping_worker_hands_back_is_marked_and_not_counted(traced: Traced) -> None:
    with traced.stopped(ENGINE):
        reply = traced.post()
        id = reply.json()["id"]
        traced.wait_status(id, "in_progress")
        os.kill(traced.pid(WORKER), signal.SIGTERM)
        traced.wait_status(id, "queued")
    job = traced.wait_status(id, "completed").json()

    def processed() -> list[SpanRecord]:
        return [span for span in traced.receiver.of_job(id) if span.kind == "CONSUMER"]

    traced.receiver.wait_for(
        lambda _: any(span.attributes.get(names.JOB_STATE) == "completed" for span in processed()), 20
    )
    first, second = sorted(processed(), key=lambda span: span.start_ns)
    told = (names.JOB_ATTEMPT, names.JOB_STATE, names.JOB_HANDED_BACK)
    assert [first.attributes.get(key) for key in told] == [1, "queued", True]
    assert [second.attributes.get(key) for key in told] == [1, "completed", None]
    assert first.status == "UNSET"
    assert first.span_id in {link.span_id for link in second.links}
    assert job["attempts"] == 1
    check_trace_invariants(traced.receiver.of_job(id), canaries=[PROMPT], failed_job_ids=())


def page_of(reply: httpx.Response) -> str:
    return TEMPLATE.replace("{trace_id}", reply.headers["X-Trace-Id"])


def wait_for_generations(traced: Traced, job_id: str, trace_id: str, count: int) -> list[SpanRecord]:
    """The job's trace, whole, and the items that have one of their own."""

    def mine() -> list[SpanRecord]:
        return [
            span
            for span in traced.receiver.spans()
            if span.trace_id == trace_id
            or (span.attributes.get(names.JOB_ID) == job_id and names.ITEM_INDEX in span.attributes)
        ]

    def is_whole(_: object) -> bool:
        spans = mine()
        num_generations = sum(span.name.startswith("text_completion") for span in spans)
        return num_generations == count and {"SERVER", "CONSUMER"} <= {span.kind for span in spans}

    assert traced.receiver.wait_for(is_whole, timeout_seconds=20)
    return mine()
