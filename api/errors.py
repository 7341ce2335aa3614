"""What a request can be refused with, and the one table that turns it into a reply.

ApiError
├── MalformedBody            400  not JSON, not UTF-8, not an object
├── InvalidRequest           400  a field, its value and the rule it breaks
├── PromptTooLong            400  no room for even one token
├── ContextTooLong           400  prompt and max_tokens do not fit together
├── UnsupportedMediaType     415
├── BodyTooLarge             413
├── ModelNotFound            404
├── JobNotFound              404
├── NoWorker                 503  the model is known, nobody serves it now
├── NoResult                 409  the job ended without one
├── NotCancellable           409  the job had ended before
├── JobCancelled             409  while the client waited
├── JobFailed                500  code is the failure's reason
├── JobLost                  503  accepted, then gone from the store
├── DeadlineExceeded         504  the job expired
├── WaitTimeout              504  the wait ended before the job
├── Stopping                 503  this process ends before the reply was there
└── InternalError            500  ours; says nothing

The errors of `jobs` are in the same table. OpenAI's clients repeat 408, 409, 429 and 5xx by themselves,
so every reply after which a repeat would be wrong says `x-should-retry: false`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastapi.responses import JSONResponse

from api.described import describe
from api.trace_link import TraceLinks
from jobs.errors import IdempotencyMismatch, JobsError, QueueFull, StoreUnavailable
from jobs.model import Failure, JobId
from jobs.states import JobState
from telemetry.http import current_trace_id

NO_TRACE_ID = "0" * 32

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ApiError(Exception):
    """Base of the package. What is None here is taken from the table."""

    param: str | None = None
    code: str | None = None
    should_retry: bool | None = None
    job_id: JobId | None = None


class MalformedBody(ApiError):
    pass


class InvalidRequest(ApiError):
    def __init__(self, param: str, value: object, rule: str) -> None:
        super().__init__(f"{param}={describe(param, value)}: {rule}")
        self.param = param

    @classmethod
    def missing(cls, param: str) -> InvalidRequest:
        error = cls(param, None, "")
        error.args = (f"{param} is required",)
        return error


class PromptTooLong(ApiError):
    param = "prompt"

    def __init__(self, where: str, max_model_len: int, num_tokens: int, *, is_exact: bool = True) -> None:
        count = f"{num_tokens}" if is_exact else f"at least {num_tokens}"
        super().__init__(
            f"{where}: this model's maximum context length is {max_model_len} tokens, prompt and completion "
            f"together; the prompt alone has {count}"
        )


class ContextTooLong(ApiError):
    param = "max_tokens"

    def __init__(self, where: str, max_model_len: int, num_prompt_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"{where}: this model's maximum context length is {max_model_len} tokens, but "
            f"{num_prompt_tokens + max_tokens} were asked for: {num_prompt_tokens} in the prompt and "
            f"max_tokens={max_tokens} for the completion"
        )


class UnsupportedMediaType(ApiError):
    pass


class BodyTooLarge(ApiError):
    def __init__(self, max_body_bytes: int) -> None:
        super().__init__(f"the request body is larger than {max_body_bytes} bytes")


class ModelNotFound(ApiError):
    param = "model"

    def __init__(self, name: str) -> None:
        super().__init__(f"the model {describe('model', name)} does not exist")


class JobNotFound(ApiError):
    def __init__(self) -> None:
        super().__init__("no such job; it may have been removed after its retention time")


class NoWorker(ApiError):
    param = "model"

    def __init__(self, name: str) -> None:
        super().__init__(f"no worker serves the model {describe('model', name)} at the moment")


class NoResult(ApiError):
    def __init__(self, id: JobId, state: JobState) -> None:
        super().__init__(f"the job is {state.value} and has no result")
        self.job_id, self.code = id, f"job_{state.value}"


class NotCancellable(ApiError):
    def __init__(self, id: JobId, state: JobState) -> None:
        super().__init__(f"the job is {state.value} already")
        self.job_id, self.code = id, f"job_{state.value}"


class JobCancelled(ApiError):
    def __init__(self, id: JobId) -> None:
        super().__init__("the job was cancelled")
        self.job_id = id


class JobFailed(ApiError):
    def __init__(self, id: JobId, failure: Failure | None) -> None:
        super().__init__(failure.message if failure else "the job failed")
        self.job_id = id
        self.code = failure.reason if failure else None
        self.should_retry = None if failure and failure.retryable else False


class JobLost(ApiError):
    def __init__(self, id: JobId) -> None:
        super().__init__("the job is gone from the store; submit it again")
        self.job_id = id


class DeadlineExceeded(ApiError):
    def __init__(self, id: JobId) -> None:
        super().__init__("the job's deadline passed before it was done")
        self.job_id = id


class WaitTimeout(ApiError):
    def __init__(self, id: JobId, seconds: float, *, is_kept: bool) -> None:
        fate = "it goes on: read it at its Location" if is_kept else "it has been cancelled"
        super().__init__(f"the job was not done within {seconds:g} s; {fate}")
        self.job_id = id


class Stopping(ApiError):
    def __init__(self) -> None:
        super().__init__("the server is stopping; try again")


class InternalError(ApiError):
    def __init__(self) -> None:
        super().__init__("the server failed to handle the request")


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """How one kind of error is answered."""

    status: int
    type: ErrorType
    code: str | None = None
    retry_after_seconds: int | None = None
    should_retry: bool | None = None
    """The header `x-should-retry`; None leaves the client to its own rule."""


TABLE: Mapping[type[Exception], ErrorReply] = {
    MalformedBody: ErrorReply(400, "invalid_request_error", "malformed_body"),
    InvalidRequest: ErrorReply(400, "invalid_request_error", "invalid_value"),
    PromptTooLong: ErrorReply(400, "invalid_request_error", "context_length_exceeded"),
    ContextTooLong: ErrorReply(400, "invalid_request_error", "context_length_exceeded"),
    UnsupportedMediaType: ErrorReply(415, "invalid_request_error", "unsupported_media_type"),
    BodyTooLarge: ErrorReply(413, "invalid_request_error", "body_too_large"),
    ModelNotFound: ErrorReply(404, "invalid_request_error", "model_not_found"),
    JobNotFound: ErrorReply(404, "invalid_request_error", "job_not_found"),
    NoWorker: ErrorReply(503, "server_error", "no_worker", retry_after_seconds=5),
    NoResult: ErrorReply(409, "invalid_request_error", should_retry=False),
    NotCancellable: ErrorReply(409, "invalid_request_error", should_retry=False),
    JobCancelled: ErrorReply(409, "invalid_request_error", "job_cancelled", should_retry=False),
    JobFailed: ErrorReply(500, "server_error", "job_failed"),
    JobLost: ErrorReply(503, "server_error", "job_lost", retry_after_seconds=1),
    DeadlineExceeded: ErrorReply(504, "server_error", "deadline_exceeded", should_retry=False),
    WaitTimeout: ErrorReply(504, "server_error", "wait_timeout", should_retry=False),
    Stopping: ErrorReply(503, "server_error", "stopping", retry_after_seconds=1),
    InternalError: ErrorReply(500, "server_error", "internal_error"),
    StoreUnavailable: ErrorReply(503, "server_error", StoreUnavailable.reason, retry_after_seconds=2),
    QueueFull: ErrorReply(429, "rate_limit_error", QueueFull.reason, retry_after_seconds=10),
    IdempotencyMismatch: ErrorReply(422, "invalid_request_error", IdempotencyMismatch.reason),
}


def error_response(error: ApiError | JobsError, links: TraceLinks) -> JSONResponse:
    """The reply to an error that the table knows; an unknown one is answered as ours."""
    reply = TABLE.get(type(error))
    if reply is None:
        return error_response(InternalError(), links)
    own = error if isinstance(error, ApiError) else ApiError()
    should_retry = reply.should_retry if own.should_retry is None else own.should_retry
    headers: dict[str, str] = {}
    if should_retry is not None:
        headers["x-should-retry"] = str(should_retry).lower()
    if reply.retry_after_seconds is not None:
        headers["Retry-After"] = str(reply.retry_after_seconds)
    if own.job_id is not None:
        headers |= {"X-Job-Id": own.job_id, "Location": f"/v1/jobs/{own.job_id}"}
    return JSONResponse(
        error_body(links, str(error), reply.type, own.code or reply.code, param=own.param, job_id=own.job_id),
        status_code=reply.status,
        headers=headers,
    )


def error_body(
    links: TraceLinks,
    message: str,
    type: ErrorType,
    code: str | None,
    *,
    param: str | None = None,
    job_id: JobId | None = None,
) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object, with the trace to look at and the job it is about."""
    fields = {"message": message, "type": type, "param": param, "code": code}
    if (trace_id := current_trace_id()) != NO_TRACE_ID:
        fields["trace_id"] = trace_id
    if (page := links.to_current()) is not None:
        fields["trace"] = page
    if job_id is not None:
        fields["job_id"] = job_id
    return {"error": fields}
