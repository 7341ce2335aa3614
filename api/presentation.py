"""From stored documents to the objects that clients read."""

from __future__ import annotations

from api.schemas import (
    CompletionChoice,
    CompletionObject,
    ErrorFields,
    ItemError,
    JobLinks,
    JobObject,
    ModelObject,
    PromptTokensDetails,
    RequestCounts,
    UsageObject,
)
from api.trace_link import TraceLinks
from jobs.model import Choice, ItemResult, Job, JobResult, NewJob, Usage
from jobs.registry import ServedModel
from jobs.states import JobState


def job_object(job: Job, trace_links: TraceLinks) -> JobObject:
    path = f"/v1/jobs/{job.id}"
    trace = trace_links.to(job.traceparent)
    return JobObject(
        id=job.id,
        status=job.state,
        done=job.state.is_final,
        model=job.model,
        created_at=int(job.created_at),
        queued_at=int(job.queued_at),
        in_progress_at=_seconds(job.in_progress_at),
        completed_at=_ended_as(job, JobState.COMPLETED),
        failed_at=_ended_as(job, JobState.FAILED),
        cancelling_at=_seconds(job.cancelling_at),
        cancelled_at=_ended_as(job, JobState.CANCELLED),
        expired_at=_ended_as(job, JobState.EXPIRED),
        next_attempt_at=_seconds(job.next_attempt_at),
        expires_at=_seconds(job.expires_at),
        result_expires_at=_seconds(job.result_expires_at),
        priority=job.priority,
        num_prompts=job.num_prompts,
        request_counts=RequestCounts(**job.items.model_dump()),
        attempts=job.attempts,
        max_attempts=job.max_attempts,
        usage=usage_object(job.usage) if job.usage else None,
        timings=job.timings,
        trace_id=job.trace_id,
        traceparent=job.traceparent,
        error=_error(job, trace),
        errors=item_errors(job.result) if job.result else [],
        result=completion_object(job, job.result, trace_links) if job.result and has_output(job) else None,
        metadata=job.metadata,
        links=JobLinks(self=path, result=f"{path}/result", cancel=f"{path}/cancel", trace=trace),
    )


def as_submitted(new: NewJob) -> Job:
    """A job as it was when it was accepted, whatever has become of it since."""
    return Job(
        id=new.id,
        state=JobState.QUEUED,
        model=new.request.model,
        queue=new.queue,
        priority=new.priority,
        num_prompts=len(new.request.prompts),
        created_at=new.created_at,
        queued_at=new.created_at,
        next_attempt_at=new.start_at,
        expires_at=new.expires_at,
        max_attempts=new.max_attempts,
        metadata=new.metadata,
        traceparent=new.traceparent,
    )


def completion_object(job: Job, result: JobResult, trace_links: TraceLinks) -> CompletionObject:
    """OpenAI's shape, with the job's timings and trace; choices are numbered through all prompts.

    A failed prompt has the places of its choices all the same: clients find choices by their index.
    """
    return CompletionObject(
        id=f"cmpl-{job.id}",
        created=int(job.created_at),
        model=job.model,
        choices=_choices(result),
        usage=usage_object(result.usage),
        errors=item_errors(result),
        timings=job.timings,
        trace_id=job.trace_id,
        trace=trace_links.to(job.traceparent),
    )


def _choices(result: JobResult) -> list[CompletionChoice]:
    num_of_one = max(len(item.choices) for item in result.items)
    choices: list[CompletionChoice] = []
    for item in result.items:
        start = len(choices)
        if item.failure is None:
            choices += (_choice(start + place, choice, item) for place, choice in enumerate(item.choices))
        else:
            choices += map(_no_choice, range(start, start + num_of_one))
    return choices


def _choice(index: int, choice: Choice, item: ItemResult) -> CompletionChoice:
    return CompletionChoice(
        index=index,
        text=choice.text,
        logprobs=choice.logprobs,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        prompt_logprobs=item.prompt_logprobs,
    )


def _no_choice(index: int) -> CompletionChoice:
    return CompletionChoice(
        index=index, text="", logprobs=None, finish_reason="error", stop_reason=None, prompt_logprobs=None
    )


def has_output(job: Job) -> bool:
    """Whether the result of a job, once read, can be told as a completion."""
    return job.items.completed > 0


def item_errors(result: JobResult) -> list[ItemError]:
    """Of a job of many prompts; with one prompt the failure is the job's own."""
    return [
        ItemError(
            prompt=index,
            message=item.failure.message,
            code=item.failure.reason,
            retryable=item.failure.retryable,
        )
        for index, item in enumerate(result.items)
        if item.failure is not None
    ]


def usage_object(usage: Usage) -> UsageObject:
    return UsageObject(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def model_object(model: ServedModel, *, created: int) -> ModelObject:
    card = model.card
    return ModelObject(
        id=card.name,
        created=created,
        aliases=card.aliases,
        max_model_len=card.max_model_len,
        max_logprobs=card.max_logprobs,
        architecture=card.architecture,
        dtype=card.dtype,
        device=card.device,
        num_workers=model.num_workers,
    )


def _error(job: Job, trace: str | None) -> ErrorFields | None:
    """Only of a job that ended as failed: the failure of an attempt that is retried is not the job's."""
    if job.state is not JobState.FAILED or job.failure is None:
        return None
    return ErrorFields(
        message=job.failure.message,
        type="server_error",
        code=job.failure.reason,
        trace_id=job.trace_id,
        trace=trace,
        job_id=job.id,
    )


def _ended_as(job: Job, state: JobState) -> int | None:
    return _seconds(job.finished_at) if job.state is state else None


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
