"""The documents that cross the queue: what was asked, what came out, and why it failed.

Pydantic is used for what is stored as JSON, so that a document written by one version and read by
another is checked at the border. Nothing here knows HTTP or the engine.
"""

from __future__ import annotations

import random
import secrets
import time
from typing import Any, Literal, NewType

from pydantic import BaseModel, ConfigDict, Field

from jobs.states import JobState

JobId = NewType("JobId", str)
LeaseToken = NewType("LeaseToken", str)
WorkerId = NewType("WorkerId", str)
ReplicaId = NewType("ReplicaId", str)

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")


def new_job_id() -> JobId:
    """An id that sorts by time of creation (milliseconds) and cannot be guessed (80 random bits)."""
    return JobId(f"job_{int(time.time() * 1000):012x}{secrets.token_hex(10)}")


def new_lease_token() -> LeaseToken:
    """Unlike any other, and no secret: the kernel's randomness lets go of the interpreter for each."""
    return LeaseToken(f"{random.getrandbits(96):024x}")


class Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Prompt(Document):
    """One prompt, already tokenized: the engine takes ids only. `text` is kept for `echo`."""

    token_ids: tuple[int, ...]
    text: str | None = None


class JobRequest(Document):
    """What the client asked for, checked. `sampling` holds the engine's sampling parameters by name."""

    operation: Literal["text_completion"] = "text_completion"
    model: str
    """The canonical served name."""
    prompts: tuple[Prompt, ...] = Field(min_length=1)
    sampling: dict[str, Any]


class TokenLogprobs(Document):
    """OpenAI's legacy completion logprobs: four lists of equal length."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...] | None = None
    text_offset: tuple[int, ...]


class PromptLogprob(Document):
    """vLLM's: of one token in the place of a prompt's; rank 1 is the most probable one."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = tuple[dict[int, PromptLogprob] | None, ...]
"""For each token of a prompt: itself and the most probable ones by their ids; None for the first."""


class Choice(Document):
    index: int
    """Within its prompt, from 0."""
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    logprobs: TokenLogprobs | None = None


class Usage(Document):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Failure(Document):
    """Why an item, an attempt or a job failed; never holds prompt or output text."""

    reason: str
    """Stable and machine-readable; the same word in the API's error code, spans and metrics."""
    message: str
    retryable: bool = False


class ItemResult(Document):
    """The outcome of one prompt of the job: its choices, or its own failure."""

    choices: tuple[Choice, ...] = ()
    """None where it failed."""
    usage: Usage = Usage(prompt_tokens=0, completion_tokens=0)
    prompt_logprobs: PromptLogprobs | None = None
    failure: Failure | None = None


class ItemCounts(Document):
    """How far the items of a job are; those that are neither completed nor failed have yet to end."""

    total: int
    completed: int
    failed: int


class JobResult(Document):
    items: tuple[ItemResult, ...]
    """In the order of the request's prompts."""

    @property
    def num_failed(self) -> int:
        return sum(item.failure is not None for item in self.items)

    @property
    def failure(self) -> Failure | None:
        """Set when every item failed: what the job failed of."""
        failures = [item.failure for item in self.items if item.failure is not None]
        if len(failures) < len(self.items):
            return None
        first = failures[0]
        if len(failures) == 1:
            return first
        is_one_reason = all(failure.reason == first.reason for failure in failures)
        return Failure(
            reason=first.reason if is_one_reason else "items_failed",
            message=f"all {len(failures)} prompts failed; the first: {first.message}",
            retryable=any(failure.retryable for failure in failures),
        )

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(item.usage.prompt_tokens for item in self.items),
            completion_tokens=sum(item.usage.completion_tokens for item in self.items),
            cached_tokens=sum(item.usage.cached_tokens for item in self.items),
        )


class Timings(Document):
    """Where the job's time went, in milliseconds; the parts add up to `total_ms`."""

    queue_ms: float
    """From the store's acceptance to the claim of the last attempt; those before it count as queue too, as
    does a wait for the job's start or a retry."""
    engine_wait_ms: float
    """From the claim to the first prefill, and again after each preemption."""
    prefill_ms: float
    decode_ms: float
    store_ms: float
    """From the last token to the result's way into the store, which keeps these figures with it."""
    total_ms: float
    mean_batch_size: float
    """Sequences that shared this job's engine steps, on average."""
    max_batch_size: int


class NewJob(Document):
    """What the API hands to the store."""

    id: JobId
    request: JobRequest
    queue: str
    priority: Priority
    created_at: float
    """Unix seconds."""
    expires_at: float | None = None
    start_at: float | None = None
    """Until then it is kept out of its queue."""
    max_attempts: int = 3
    metadata: dict[str, str] = Field(default_factory=dict)
    traceparent: str | None = None
    """The span that created the job; links and redeliveries go back to it."""
    watcher: ReplicaId | None = None
    """The API replica that waits for it, if one does."""
    idempotency_key: str | None = None
    fingerprint: str | None = None
    """Hash of the request body, compared when the idempotency key comes again."""


class Job(Document):
    """A stored job as the API shows it. The request is left out: a poll must be cheap."""

    id: JobId
    state: JobState
    model: str
    queue: str
    priority: Priority
    num_prompts: int
    created_at: float
    queued_at: float
    in_progress_at: float | None = None
    cancelling_at: float | None = None
    finished_at: float | None = None
    """When it reached its final state, whichever that is."""
    next_attempt_at: float | None = None
    """When it goes into its queue, while it waits for that: before a retry, or for its start."""
    expires_at: float | None = None
    result_expires_at: float | None = None
    attempts: int = 0
    max_attempts: int = 3
    metadata: dict[str, str] = Field(default_factory=dict)
    traceparent: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    failure: Failure | None = None
    items_completed: int | None = None
    """Of a job of many prompts, once some of its items are stored; see `items`."""
    items_failed: int | None = None
    result: JobResult | None = None
    """Only when it was asked for. A job of many prompts that did not complete may have one too: what each of
    its items came to."""

    @property
    def items(self) -> ItemCounts:
        """What its items came to, or in an unfinished job of many prompts what is stored of them by now."""
        total = self.num_prompts
        if self.items_completed is not None:
            return ItemCounts(total=total, completed=self.items_completed, failed=self.items_failed or 0)
        return ItemCounts(
            total=total,
            completed=total if self.state is JobState.COMPLETED else 0,
            failed=total if self.state is JobState.FAILED else 0,
        )

    @property
    def trace_id(self) -> str | None:
        return self.traceparent.split("-")[1] if self.traceparent else None
