"""Success replies: a wire model as JSON, and the headers that belong to a job."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from api.presentation import job_object
from api.schemas import ErrorObject
from api.trace_link import TraceLinks
from jobs.model import Job, JobId

POLL_SECONDS = 1
"""The hint in Retry-After of a job that is not done."""


ERRORS: Mapping[int | str, dict[str, Any]] = {
    "default": {"model": ErrorObject, "description": "OpenAI's error object"}
}
"""For the OpenAPI document of every route."""


def json_reply(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        model.model_dump_json(), status_code=status, headers=headers, media_type="application/json"
    )


def job_headers(id: JobId, *, replayed: bool = False) -> dict[str, str]:
    headers = {"X-Job-Id": id, "Location": f"/v1/jobs/{id}"}
    return headers | {"Idempotent-Replayed": "true"} if replayed else headers


def job_reply(job: Job, headers: dict[str, str], trace_links: TraceLinks) -> Response:
    """200 for a job that is done, else 202 and when to ask again."""
    if job.state.is_final:
        return json_reply(job_object(job, trace_links), 200, headers)
    return json_reply(job_object(job, trace_links), 202, headers | {"Retry-After": str(POLL_SECONDS)})


def cacheable_job_reply(
    request: Request, job: Job, headers: dict[str, str], trace_links: TraceLinks
) -> Response:
    """200 with an ETag, or 304 when the client has this very state of the job."""
    content = job_object(job, trace_links).model_dump_json()
    tag = f'"{hashlib.sha256(content.encode()).hexdigest()[:32]}"'
    headers = headers | {"ETag": tag, "Cache-Control": "private, no-cache"}
    known = {part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    if not job.state.is_final:
        headers["Retry-After"] = str(POLL_SECONDS)
    return Response(content, headers=headers, media_type="application/json")
