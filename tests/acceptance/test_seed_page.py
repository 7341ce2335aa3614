"""Every flow of vLLM's OpenTelemetry page, against the real stack: its client, protocols and launcher."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cli.demo import seed_client
from telemetry.receiver import Receiver
from telemetry.record import SpanRecord
from tests.support.stack import RunningStack
from tests.support.trace_invariants import check_trace_invariants
from tests.support.trace_losses import check_nothing_lost
from tests.support.valkey import free_port

PROMPT = "San Francisco is a"
PAYLOAD = {
    "model": "facebook/opt-125m",
    "prompt": PROMPT,
    "max_tokens": 10,
    "n": 3,
    "use_beam_search": "true",
    "temperature": 0.0,
}
"""The page's, with its loose typing."""

LAUNCHER = Path(sys.executable).parent / "opentelemetry-instrument"
OUR_SPANS = [
    "POST /v1/completions",
    "accept",
    "claim",
    "engine.decode",
    "engine.prefill",
    "engine.wait",
    "fetch result",
    "process throughline-tiny.interactive",
    "queue throughline-tiny.interactive",
    "receive output",
    "report",
    "send throughline-tiny.interactive",
    "store job",
    "store result",
    "text_completion throughline-tiny",
    "wait result",
]


@dataclass
class TracedStack:
    stack: RunningStack
    receiver: Receiver
    metrics_port: int | None
    """The worker's; none under the launcher, where the exporter is not ours to count."""

    def spans_of(self, trace_id: str, count: int) -> list[SpanRecord]:
        """The trace, once `count` spans of it have come."""
        self.receiver.wait_for(lambda _: len(self.receiver.trace(trace_id)) >= count, timeout_seconds=20)
        return self.receiver.trace(trace_id)


@pytest.fixture(scope="module", params=["grpc", "http/protobuf, under opentelemetry-instrument"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedStack]:
    with Receiver("127.0.0.1", 0, 0) as receiver:
        environ = {"OTEL_SERVICE_NAME": "vllm-server"}
        metrics_port: int | None = None
        grpc = receiver.grpc_endpoint.replace("http://", "grpc://")
        if request.param == "grpc":
            environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = grpc
            environ["OTEL_EXPORTER_OTLP_TRACES_INSECURE"] = "true"
            environ["THROUGHLINE_METRICS_PORT"] = str(metrics_port := free_port())
            launcher: tuple[str, ...] = ()
        else:
            environ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
            environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = receiver.http_endpoint
            environ |= {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
            environ["OTEL_BSP_SCHEDULE_DELAY"] = "1000"  # as ours is; the launcher's own is 5 s
            launcher = (str(LAUNCHER),)
        folder = tmp_path_factory.mktemp("traced")
        stack = RunningStack(folder, launcher=launcher, environ=environ)
        try:
            stack.wait_until_ready()
            yield TracedStack(stack, receiver, metrics_port)
        finally:
            stack.kill_everything()


def test_seed_client_gets_one_trace_from_client_to_generation(traced: TracedStack) -> None:
    endpoint = traced.receiver.grpc_endpoint.replace("http://", "grpc://")
    before = set(traced.receiver.trace_ids())

    seed_client.run(traced.stack.port, endpoint=endpoint, environ=os.environ, deadline=time.monotonic() + 60)

    assert traced.receiver.wait_for(
        lambda spans: len([span for span in spans if span.trace_id not in before]) >= len(OUR_SPANS) + 1,
        timeout_seconds=20,
    )
    (trace_id,) = set(traced.receiver.trace_ids()) - before
    spans = traced.receiver.trace(trace_id)
    check_trace_invariants(spans, foreign_services=["client-service"], canaries=[PROMPT], failed_job_ids=[])
    assert sorted(span.name for span in spans if span.service == "vllm-server") == OUR_SPANS
    root = next(span for span in spans if span.parent_id is None)
    assert (root.name, root.service, root.kind) == ("client-span", "client-service", "CLIENT")


def test_seed_payload_is_answered_with_three_beams_that_fit(traced: TracedStack) -> None:
    reply = httpx.post(f"{traced.stack.url}/v1/completions", json=PAYLOAD, timeout=60)

    assert reply.status_code == 200
    body = reply.json()
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 3
    assert all({"city", "place", "California"} & set(text.replace(".", "").split()) for text in texts), texts
    assert body["model"] == "throughline-tiny"
    assert body["usage"]["completion_tokens"] == 30


def test_spans_tell_the_usage_that_the_reply_tells(traced: TracedStack) -> None:
    reply = httpx.post(f"{traced.stack.url}/v1/completions", json=PAYLOAD, timeout=60)

    spans = traced.spans_of(reply.headers["X-Trace-Id"], len(OUR_SPANS))

    (generation,) = [span for span in spans if span.name.startswith("text_completion")]
    usage = reply.json()["usage"]
    assert generation.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert generation.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert generation.attributes["gen_ai.request.choice.count"] == 3
    assert generation.attributes["gen_ai.response.id"] == reply.json()["id"]
    told = {reply.headers["X-Job-Id"]: (usage["prompt_tokens"], usage["completion_tokens"])}
    check_trace_invariants(spans, canaries=[PROMPT], failed_job_ids=[], usage=told)


def test_job_and_its_polls_are_told_by_their_trace_ids(traced: TracedStack) -> None:
    submitted = httpx.post(
        f"{traced.stack.url}/v1/jobs",
        json={"model": "throughline-tiny", "prompt": ["Rome is", "Paris is"], "max_tokens": 5},
        headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        timeout=30,
    )

    assert submitted.status_code == 202
    assert submitted.headers["X-Trace-Id"] == "0af7651916cd43dd8448eb211c80319c"
    job = submitted.json()
    assert job["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    done = httpx.get(f"{traced.stack.url}{submitted.headers['Location']}?wait=30", timeout=60)
    assert done.json()["status"] == "completed"
    assert done.headers["X-Trace-Id"] != job["trace_id"]
    # server, accept, store job, send, queue, process, claim, receive output, store result, report, and for
    # each of the two prompts a generation with three phases
    spans = traced.spans_of(job["trace_id"], 10 + 2 * 4)
    check_trace_invariants(
        spans, external=["b7ad6b7169203331"], canaries=["Rome is", "Paris is"], failed_job_ids=[]
    )


def test_malformed_traceparent_starts_a_new_trace(traced: TracedStack) -> None:
    reply = httpx.get(f"{traced.stack.url}/v1/models", headers={"traceparent": "00-zz-1"}, timeout=10)

    assert reply.status_code == 200
    assert len(reply.headers["X-Trace-Id"]) == 32
    assert set(reply.headers["X-Trace-Id"]) != {"0"}
    check_trace_invariants(traced.spans_of(reply.headers["X-Trace-Id"], 1))


def test_refused_request_carries_its_trace_id_and_reaches_no_queue(traced: TracedStack) -> None:
    body = {"model": "throughline-tiny", "prompt": PROMPT, "temperature": -1}

    reply = httpx.post(f"{traced.stack.url}/v1/completions", json=body, timeout=10)

    assert reply.status_code == 400
    assert reply.json()["error"]["trace_id"] == reply.headers["X-Trace-Id"]
    spans = traced.spans_of(reply.headers["X-Trace-Id"], 2)
    assert sorted(span.name for span in spans) == ["POST /v1/completions", "accept"]
    check_trace_invariants(spans, canaries=[PROMPT])


def test_stop_loses_no_span_and_logs_no_prompt(traced: TracedStack) -> None:
    """The last of this module: it stops the stack in the moment after an answer."""
    if traced.metrics_port is not None:
        check_nothing_lost(f"127.0.0.1:{port}" for port in (traced.stack.port, traced.metrics_port))
    reply = httpx.post(f"{traced.stack.url}/v1/completions", json=PAYLOAD, timeout=60)

    code = traced.stack.stop()

    assert code == 0, traced.stack.log()
    spans = traced.receiver.trace(reply.headers["X-Trace-Id"])
    assert sorted(span.name for span in spans) == OUR_SPANS
    check_trace_invariants(spans, canaries=[PROMPT], failed_job_ids=[])
    said_by_parts = [line for line in traced.stack.log().splitlines() if not line.startswith("up ")]
    assert not [line for line in said_by_parts if PROMPT in line]  # the supervisor's own hint quotes it
    assert traced.stack.pids() == []
