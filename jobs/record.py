"""A job as the hash that stores keep: field names and both directions of the translation."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence

from jobs.model import Failure, ItemResult, Job, JobRequest, NewJob
from jobs.states import JobState
from jobs.store import Claim, ClaimOutcome, LostAttempt, Settlement

JOB_FIELDS = (
    "id",
    "state",
    "model",
    "queue",
    "priority",
    "num_prompts",
    "created_at",
    "queued_at",
    "in_progress_at",
    "cancelling_at",
    "finished_at",
    "next_attempt_at",
    "expires_at",
    "result_expires_at",
    "attempts",
    "max_attempts",
    "metadata",
    "traceparent",
    "usage",
    "timings",
    "failure",
    "items_completed",
    "items_failed",
)
"""What a poll reads: all but the request and the result, which can be large."""

_JSON_FIELDS = frozenset({"metadata", "usage", "timings", "failure", "result"})


def new_record(job: NewJob) -> dict[str, str]:
    fields: dict[str, str | None] = {
        "id": job.id,
        "state": JobState.QUEUED.value,
        "model": job.request.model,
        "queue": job.queue,
        "priority": job.priority,
        "num_prompts": str(len(job.request.prompts)),
        "created_at": repr(job.created_at),
        "queued_at": repr(job.created_at),
        "expires_at": None if job.expires_at is None else repr(job.expires_at),
        "attempts": "0",
        "max_attempts": str(job.max_attempts),
        "metadata": json.dumps(job.metadata) if job.metadata else None,
        "traceparent": job.traceparent,
        "watchers": job.watcher,
        "idempotency_key": job.idempotency_key,
        "request": job.request.model_dump_json(),
    }
    return {name: value for name, value in fields.items() if value is not None}


def to_job(record: Mapping[str, str | None]) -> Job:
    """Absent and empty fields take the document's defaults."""
    present = {name: value for name, value in record.items() if value}
    return Job.model_validate(
        {name: json.loads(value) if name in _JSON_FIELDS else value for name, value in present.items()}
    )


def settlement_fields(settlement: Settlement) -> dict[str, str]:
    fields: dict[str, str] = {}
    if settlement.result is not None:
        fields["result"] = settlement.result.model_dump_json(exclude_none=True)
        fields["usage"] = settlement.result.usage.model_dump_json()
        if len(settlement.result.items) > 1:
            num_failed = settlement.result.num_failed
            fields["items_completed"] = str(len(settlement.result.items) - num_failed)
            fields["items_failed"] = str(num_failed)
    if settlement.timings is not None:
        fields["timings"] = settlement.timings.model_dump_json()
    if settlement.failure is not None:
        fields["failure"] = settlement.failure.model_dump_json()
    return fields


def item_fields(items: Mapping[int, ItemResult]) -> dict[str, str]:
    return {str(index): item.model_dump_json(exclude_none=True) for index, item in items.items()}


CLAIMED_FIELDS = (
    "attempts",
    "request",
    "queued_at",
    "expires_at",
    "traceparent",
    "previous_traceparent",
    "lost_since",
    "released_at",
    "forgiven",
    "published_at",
)
"""What a claim reads, in the order of `to_claim` and of `lua/claim.lua`."""


def to_claim(
    attempts: str,
    request: str,
    queued_at: str,
    expires_at: str,
    traceparent: str,
    previous_traceparent: str,
    lost_since: str,
    released_at: str,
    forgiven: str,
    published_at: str,
    *,
    items: Sequence[str],
) -> Claim:
    """`items` holds indices and documents in turns."""
    attempt = int(attempts)
    return Claim(
        outcome=ClaimOutcome.CLAIMED,
        attempt=attempt,
        request=JobRequest.model_validate_json(request),
        queued_at=float(queued_at),
        expires_at=_time(expires_at),
        traceparent=traceparent or None,
        previous_traceparent=previous_traceparent or None,
        lost=_lost_attempt(attempt - 1, lost_since),
        released_at=_time(released_at),
        forgiven=int(forgiven or 0),
        published_at=_time(published_at),
        items={
            int(index): ItemResult.model_validate_json(document)
            for index, document in zip(items[::2], items[1::2], strict=True)
        },
    )


def to_refusal(
    outcome: str,
    attempts: str = "0",
    lost_since: str = "",
    state: str = "",
    released_at: str = "",
    in_queue: str = "",
    published_at: str = "",
) -> Claim:
    """A claim that was not given, or that ended the job."""
    return Claim(
        ClaimOutcome(outcome),
        lost=_lost_attempt(int(attempts), lost_since),
        released_at=_time(released_at),
        ended_as=JobState(state) if state else None,
        ended_in_queue=bool(in_queue),
        published_at=_time(published_at),
    )


def _time(stored: str) -> float | None:
    return float(stored) if stored else None


def _lost_attempt(attempt: int, started_at: str) -> LostAttempt | None:
    return LostAttempt(attempt, float(started_at)) if started_at else None


@functools.cache
def worker_lost_failure_json() -> str:
    """As every claim gives it to its script."""
    return worker_lost_failure().model_dump_json()


def worker_lost_failure() -> Failure:
    """The failure of a job whose attempts all ended without a word."""
    return Failure(
        reason="worker_lost",
        message="every attempt ended without a word from its worker; the job may be what kills it",
        retryable=False,
    )
