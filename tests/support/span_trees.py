"""What the tests of span trees share: a real stack that sends to a receiver, and a trace as text.

A line of a tree is: name, kind, service, attempt and job state where told, ERROR where it is one, links.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import redis

from jobs.keys import Keys
from jobs.model import JobId
from telemetry import names
from telemetry.receiver import Receiver
from telemetry.record import SpanRecord
from telemetry.tree import Node, tree
from tests.support.processes import of_each_thread, wait_until
from tests.support.stack import RunningStack
from tests.support.trace_invariants import check_trace_invariants
from tests.support.trace_losses import check_nothing_lost
from tests.support.valkey import free_port

PROMPT = "San Francisco is a"
ONE_SERVICE = "vllm-server"
"""Of all processes where OTEL_SERVICE_NAME is set, as on vLLM's page; the launcher needs it set."""
SERVICES = {
    "throughline-api": "api",
    "throughline-worker": "worker",
    "client-service": "client",
    ONE_SERVICE: "server",
}
Protocol = Literal["grpc", "http/protobuf"]
WORKER, ENGINE = "workers.main", "workers.engines.engine_process"
COMPLETION = """
POST /v1/completions SERVER api
 accept INTERNAL api
 fetch result INTERNAL api
 send throughline-tiny.interactive PRODUCER api
  process throughline-tiny.interactive CONSUMER worker 1 completed -> send
   claim INTERNAL worker
   receive output INTERNAL worker
   report INTERNAL worker
   store result INTERNAL worker
   text_completion throughline-tiny INTERNAL worker
    engine.decode INTERNAL worker
    engine.prefill INTERNAL worker
    engine.wait INTERNAL worker
  queue throughline-tiny.interactive INTERNAL worker
 store job INTERNAL api
 wait result INTERNAL api"""
COMPLETION_SPANS = 16


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
    has_one_service: bool = False

    def tree_of(self, wanted: str) -> str:
        """`wanted` as this stack draws it."""
        return re.sub(r" (api|worker)\b", " server", wanted) if self.has_one_service else wanted

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
        """The traces of the reply's job are `wanted`; those of `also` link to it; all keep the invariants."""
        id, wanted = reply.headers["X-Job-Id"], self.tree_of(wanted.strip())
        self.receiver.wait_for(lambda _: drawn(self.receiver.of_job(id)) == wanted, timeout_seconds=20)
        spans = self.receiver.of_job(id)
        assert drawn(spans) == wanted, f"drawn:\n{drawn(spans)}\n\nwanted:\n{wanted}"
        assert reply.headers["X-Trace-Id"] in {span.trace_id for span in spans}
        for other in also:
            (poll,) = self.trace(other.headers["X-Trace-Id"], 1)
            root = next(span for span in spans if span.kind == "SERVER")
            assert [(link.span_id, link.attributes[names.LINK_ROLE]) for link in poll.links] == [
                (root.span_id, names.LINK_CREATION)
            ]
            spans.append(poll)
        failed_ids = {str(span.attributes[names.JOB_ID]) for span in spans if span.kind == "CONSUMER"}
        check_trace_invariants(
            spans,
            canaries=[PROMPT],
            failed_job_ids=failed_ids if failed else set(),
            usage=usage_told(reply, *also),
        )

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


def usage_told(*replies: httpx.Response) -> dict[str, tuple[int, int]]:
    """Input and output tokens of each job whose end one of the replies tells."""
    bodies = [(reply.headers["X-Job-Id"], reply.json()) for reply in replies if "X-Job-Id" in reply.headers]
    usages = {id: body.get("usage") for id, body in bodies}
    return {id: (u["prompt_tokens"], u["completion_tokens"]) for id, u in usages.items() if u}


def is_stopped(pid: int) -> bool:
    """Its threads stand still, which is a moment after the signal."""
    return {told.rpartition(")")[2].split()[0] for told in of_each_thread(pid, "stat")} == {"T"}


@contextmanager
def traced_stack(
    directory: Path,
    environ: Mapping[str, str],
    *,
    protocol: Protocol = "grpc",
    launcher: Sequence[str] = (),
) -> Iterator[Traced]:
    """A whole stack that sends its spans to a receiver of its own, ready for jobs.

    When it is left, API and worker must say that they lost no span. Under a launcher the exporter is not ours
    to count.

    Args:
        directory: for its state and its log.
        environ: more of the processes' environment; goes before what is set here.
        protocol: in which they send.
        launcher: what starts all of them, `opentelemetry-instrument` say.
    """
    with Receiver("127.0.0.1", 0, 0) as receiver:
        told = {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": (
                receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
            ),
            "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
            "OTEL_METRICS_EXPORTER": "none",  # which the launcher would send where nobody listens
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "THROUGHLINE_LEASE_SECONDS": "3",
            "THROUGHLINE_METRICS_PORT": str(metrics_port := free_port()),
        }
        if launcher:
            told["OTEL_SERVICE_NAME"] = ONE_SERVICE
        stack = RunningStack(directory, launcher=launcher, environ=told | dict(environ))
        try:
            stack.wait_until_ready()
            store = redis.Redis.from_url(stack.redis_url, decode_responses=True)
            with httpx.Client(base_url=stack.url, timeout=60) as client, store:
                yield Traced(stack, receiver, client, store, has_one_service=bool(launcher))
            if not launcher:
                check_nothing_lost([f"127.0.0.1:{port}" for port in (stack.port, metrics_port)])
        finally:
            stack.kill_everything()


def module_stack(environ: Mapping[str, str]) -> Any:
    """The fixture `traced` of a test module: one stack for all its tests, sending over grpc."""

    @pytest.fixture(scope="module")
    def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
        with traced_stack(tmp_path_factory.mktemp("traced"), environ) as traced:
            yield traced

    return traced
