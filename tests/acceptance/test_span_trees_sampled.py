"""Head sampling on the real stack: a trace is whole or absent, and a job runs and is told of all the same.

The stack's own sampler keeps half of what begins here, its engine draws every step, and an item beyond the
first has a trace of its own, so whatever could be drawn against the decision would be.
"""

from __future__ import annotations

import time

import httpx
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from telemetry import names
from telemetry.record import LinkRecord, SpanRecord
from tests.support.span_trees import COMPLETION, PROMPT, Traced, drawn, module_stack
from tests.support.trace_invariants import check_trace_invariants

RATIO = 0.5
ENVIRON = {
    "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": str(RATIO),
    "THROUGHLINE_TRACE_STEPS": "1",
    "THROUGHLINE_TRACE_ITEM_SPANS": "1",
    "THROUGHLINE_TRACE_URL_TEMPLATE": "http://127.0.0.1:16686/trace/{trace_id}",
}
UNSAMPLED, SAMPLED, POLL = (digit * 32 for digit in "123")
CLIENT_SPAN = "00f067aa0ba902b7"
MAX_TRIES = 40


traced = module_stack(ENVIRON)


def test_client_that_is_not_sampled_has_no_span_and_its_job_all_the_same(traced: Traced) -> None:
    began_ns = time.time_ns()
    traced.client.headers["traceparent"] = client_header(UNSAMPLED, "00")
    reply = traced.post("/v1/completions", prompt=[PROMPT, "Rome is", "Oslo"])
    job = traced.client.get(f"/v1/jobs/{reply.headers['X-Job-Id']}").json()
    missing = traced.client.get("/v1/jobs/job_1")
    traced.client.headers["traceparent"] = client_header(POLL, "01")
    traced.client.get(f"/v1/jobs/{job['id']}")
    traced.client.headers["traceparent"] = client_header(SAMPLED, "01")
    last = traced.post("/v1/completions")
    del traced.client.headers["traceparent"]

    assert len(reply.json()["choices"]) == 3
    assert {reply.headers["X-Trace-Id"], reply.json()["trace_id"], job["trace_id"]} == {UNSAMPLED}
    assert reply.json()["trace"] is job["links"]["trace"] is None
    assert missing.json()["error"]["trace_id"] == UNSAMPLED
    assert "trace" not in missing.json()["error"]
    # Each process sends its spans in order: what came before these would be there.
    tree = wait_for_tree(traced, last)
    (poll,) = traced.trace(POLL, 1)
    assert poll.links == ()
    ended_ns = min(span.start_ns for span in tree)
    meanwhile = [span for span in traced.receiver.spans() if began_ns <= span.start_ns < ended_ns]
    assert meanwhile == [poll]


def test_trace_is_whole_or_absent_by_the_ratio(traced: Traced) -> None:
    replies: list[httpx.Response] = []
    while len({is_chosen(reply) for reply in replies}) < 2:
        assert len(replies) < MAX_TRIES
        replies.append(traced.post("/v1/completions"))
    kept = [reply for reply in replies if is_chosen(reply)]
    for reply in kept:
        wait_for_tree(traced, reply)

    links = [reply.json()["trace"] is not None for reply in replies]
    assert links == [is_chosen(reply) for reply in replies]
    chosen = {reply.headers["X-Trace-Id"] for reply in kept}
    absent = {reply.headers["X-Trace-Id"] for reply in replies} - chosen
    assert absent.isdisjoint(traced.receiver.trace_ids())
    jobs = {reply.headers["X-Job-Id"] for reply in replies if not is_chosen(reply)}
    assert [s.name for s in traced.receiver.spans() if s.attributes.get(names.JOB_ID) in jobs] == []


def test_client_that_is_sampled_has_the_whole_tree_whatever_the_ratio(traced: Traced) -> None:
    for number in range(1, 5):
        trace_id = f"{number:016x}{'f' * 16}"  # which the ratio alone would leave out
        traced.client.headers["traceparent"] = client_header(trace_id, "01")
        reply = traced.post("/v1/completions")
        del traced.client.headers["traceparent"]

        assert reply.headers["X-Trace-Id"] == trace_id
        spans = wait_for_tree(traced, reply)
        steps = {link.span_id for span in spans for link in span.links if is_to_step(link)}
        check_trace_invariants(spans, external={CLIENT_SPAN, *steps}, canaries=[PROMPT], failed_job_ids=())


def client_header(trace_id: str, flags: str) -> str:
    return f"00-{trace_id}-{CLIENT_SPAN}-{flags}"


def is_chosen(reply: httpx.Response) -> bool:
    """What the ratio says of the reply's trace, by its id alone."""
    sampler = TraceIdRatioBased(RATIO)
    result = sampler.should_sample(None, int(reply.headers["X-Trace-Id"], 16), "any")
    return result.decision is Decision.RECORD_AND_SAMPLE


def is_to_step(link: LinkRecord) -> bool:
    return link.attributes[names.LINK_ROLE] == names.LINK_STEP


def wait_for_tree(traced: Traced, reply: httpx.Response) -> list[SpanRecord]:
    """The trace of a reply, whole. Whether a prefill's step was drawn too is the ratio's affair."""

    def tree() -> str:
        return drawn(traced.receiver.trace(reply.headers["X-Trace-Id"])).replace(" -> nothing that came", "")

    traced.receiver.wait_for(lambda _: tree() == COMPLETION.strip(), timeout_seconds=20)
    assert tree() == COMPLETION.strip()
    return traced.receiver.trace(reply.headers["X-Trace-Id"])
