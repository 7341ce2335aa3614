"""What the demo does with a running stack: five steps, each of which fails with a reason.

ready ─▶ the seed's client ─▶ jobs, submitted and polled ─▶ a job with a list ─▶ a completion that waits
               └─▶ its trace, once every span of it has arrived
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from cli.client import ApiClient, Completion, JobView
from cli.demo import seed_client
from cli.errors import DemoError
from cli.settings import BUILTIN_MODEL
from cli.stack import readiness
from telemetry import names
from telemetry.receiver import Receiver
from telemetry.record import SpanRecord

PROMPTS = ("The capital of France is", "A queue is", "Once upon a time", "In the morning")
LISTED_PROMPTS = ("Paris is", "London is", "Rome is")
SYNCHRONOUS_PROMPT = "San Francisco is a"
MAX_TOKENS = 24
# A request's way through the stack; its trace is whole when a span of each kind has arrived.
KINDS = ("CLIENT", "SERVER", "PRODUCER", "CONSUMER")
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was asked, and the job that answered."""

    prompts: tuple[str, ...]
    job: JobView


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything the demo shows."""

    seed: Exchange
    seed_trace: tuple[SpanRecord, ...]
    jobs: tuple[Exchange, ...]
    listed: Exchange
    completion: Completion
    completion_seconds: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """The demo's steps; blocking, to be run in a thread.

    Attributes:
        tell: Shows what goes on for the length of a block.
        is_stopping: Whether the stack is being taken down, so that waiting is in vain.
        deadline: When to give up, of `time.monotonic`.
    """

    client: ApiClient
    port: int
    receiver: Receiver
    tell: Callable[[str], AbstractContextManager[object]]
    is_stopping: Callable[[], bool]
    deadline: float

    def run(self) -> Outcome:
        """Return what came of it.

        Raises:
            DemoError: A step did not end as it must; the message names it.
            CliError: The API refused, or stopped answering.
        """
        with self.tell("waiting until the API and a worker are ready"):
            self._wait_until_ready()
        with self.tell("running the seed's client: examples/dummy_client.py"):
            seed_client.run(
                self.port, endpoint=self.receiver.grpc_endpoint, environ=os.environ, deadline=self.deadline
            )
            trace = self._seed_trace()
        with self.tell(f"submitting {len(PROMPTS)} jobs and polling them"):
            jobs = self._submit_and_poll([(prompt,) for prompt in PROMPTS])
        with self.tell(f"submitting one job with {len(LISTED_PROMPTS)} prompts"):
            (listed,) = self._submit_and_poll([LISTED_PROMPTS])
        with self.tell("asking the synchronous endpoint"):
            started = time.monotonic()
            completion = self.client.complete(_body([SYNCHRONOUS_PROMPT]))
            seconds = time.monotonic() - started
        seed = Exchange((SYNCHRONOUS_PROMPT,), self._completed(self.client.read(job_id_of(trace))))
        return Outcome(seed, trace, jobs, listed, completion, seconds)

    def _wait_until_ready(self) -> None:
        while True:
            is_ready, said = readiness.readiness(self.client.url)
            if is_ready:
                return
            self._pause(f"the stack did not become ready: {said}")

    def _seed_trace(self) -> tuple[SpanRecord, ...]:
        """Return the spans of the seed client's request, all of them."""
        found = self.receiver.wait_for(
            lambda spans: is_whole(seed_spans(spans)),
            timeout_seconds=max(0.1, self.deadline - time.monotonic()),
        )
        spans = seed_spans(self.receiver.spans())
        if not found:
            missing = [kind for kind in KINDS if kind not in {span.kind for span in spans}]
            raise DemoError(
                f"the seed client's trace is not whole; no span of kind {', '.join(missing) or 'any'}"
            )
        return tuple(spans)

    def _submit_and_poll(self, groups: Sequence[tuple[str, ...]]) -> tuple[Exchange, ...]:
        job_ids = [self.client.submit(_body(prompts)).id for prompts in groups]
        return tuple(
            Exchange(prompts, self._poll(job_id)) for prompts, job_id in zip(groups, job_ids, strict=True)
        )

    def _poll(self, job_id: str) -> JobView:
        while not (job := self.client.read(job_id)).is_done:
            self._pause(f"job {job_id} is still {job.status}")
        return self._completed(job)

    @staticmethod
    def _completed(job: JobView) -> JobView:
        if job.status != "completed":
            raise DemoError(f"job {job.id} ended as {job.status}: {job.failure}")
        return job

    def _pause(self, reason: str) -> None:
        """Wait a moment; past the deadline, or when the stack is going down, fail with the reason instead."""
        if self.is_stopping() or time.monotonic() > self.deadline:
            raise DemoError(reason)
        time.sleep(_POLL_SECONDS)


def seed_spans(spans: Iterable[SpanRecord]) -> list[SpanRecord]:
    """Return the spans of the trace that the seed's client began."""
    spans = list(spans)
    root = next(
        (span for span in spans if (span.service, span.name) == (seed_client.SERVICE, seed_client.SPAN)), None
    )
    return [span for span in spans if root is not None and span.trace_id == root.trace_id]


def is_whole(spans: Sequence[SpanRecord]) -> bool:
    """Return whether every kind of span is there and every parent that is named."""
    ids = {span.span_id for span in spans}
    has_parents = all(span.parent_id is None or span.parent_id in ids for span in spans)
    has_generation = any(names.GEN_AI_USAGE_OUTPUT_TOKENS in span.attributes for span in spans)
    return has_parents and has_generation and set(KINDS) <= {span.kind for span in spans}


def job_id_of(spans: Sequence[SpanRecord]) -> str:
    """Return the job that the trace tells of.

    Raises:
        DemoError: No span names one.
    """
    for span in spans:
        if names.JOB_ID in span.attributes:
            return str(span.attributes[names.JOB_ID])
    raise DemoError("no span of the trace names its job")


def _body(prompts: Sequence[str]) -> dict[str, object]:
    prompt = prompts[0] if len(prompts) == 1 else list(prompts)
    return {"model": BUILTIN_MODEL, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0.0}
