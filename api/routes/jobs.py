"""Jobs: submit, read, fetch the result, cancel."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from api.errors import JobLost, JobNotFound, NoResult, NotCancellable
from api.preferences import Preferences, read_preferences, read_wait
from api.presentation import as_submitted, completion_object, has_output, job_object
from api.replies import ERRORS, cacheable_job_reply, job_headers, job_reply, json_reply
from api.routes.direct import DirectRoute
from api.schemas import CompletionObject, JobBody, JobObject
from api.services import Ready, Services
from api.submission import Accepted
from api.waiting import wait_for
from jobs.model import Job, JobId, NewJob
from jobs.states import JobState
from jobs.store import CancelOutcome
from telemetry.spans import fetch_result, mark_job, wait_result

_JOB_ID = re.compile(r"job_[0-9a-f]{32}")

RawJobId = Annotated[str, Path(alias="id")]

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


async def submit(request: Request, services: Ready) -> Response:
    """Store and enqueue a job. 202 says that it will be run, whatever happens to this process."""
    preferences = read_preferences(request.headers)
    seconds = _granted(preferences.wait_seconds, services)
    new = await services.intake.read_job(request, watcher=services.replies.replica if seconds else None)
    mark_job(new.id)
    accepted = await _submit_and_wait(services, new, seconds or 0.0)
    headers = job_headers(accepted.id, replayed=accepted.replayed) | preferences.applied(seconds)
    if not (seconds or accepted.replayed):
        return job_reply(as_submitted(new), headers, services.trace_links)
    with fetch_result(accepted.id):
        job = await services.store.get(accepted.id, with_result=True)
    if job is None:
        raise JobLost(accepted.id)
    return job_reply(job, headers, services.trace_links)


router.add_api_route(
    "",
    submit,
    methods=["POST"],
    route_class_override=DirectRoute,
    status_code=202,
    response_model=JobObject,
    responses={200: {"model": JobObject, "description": "Done within the wait"}, **ERRORS},
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": JobBody.model_json_schema()}}}},
)


@router.get("/{id}", response_model=JobObject, responses={**ERRORS})
async def read(request: Request, id: RawJobId, services: Ready) -> Response:
    """The job as it is now, or as it is once it has ended or `wait` seconds have passed."""
    job_id = _job_id(id)
    asked = read_wait(request.query_params.get("wait"))
    preferences = Preferences(
        wait_seconds=asked if asked is not None else read_preferences(request.headers).wait_seconds
    )
    if seconds := _granted(preferences.wait_seconds, services):
        await services.replies.wait(job_id, seconds)
    job = await _existing(services, job_id)
    headers = {"X-Job-Id": job.id} | preferences.applied(seconds)
    return cacheable_job_reply(request, job, headers, services.trace_links)


@router.get(
    "/{id}/result",
    response_model=CompletionObject,
    responses={202: {"model": JobObject, "description": "Not done yet"}, **ERRORS},
)
async def read_result(id: RawJobId, services: Ready) -> Response:
    """The bare completion object of a job that has one: it completed, or some of its prompts did."""
    job = await _existing(services, _job_id(id))
    if not job.state.is_final:
        return job_reply(job, job_headers(job.id), services.trace_links)
    if job.result is None or not has_output(job):
        raise NoResult(job.id, job.state)
    return json_reply(completion_object(job, job.result, services.trace_links), 200, {"X-Job-Id": job.id})


@router.post("/{id}/cancel", response_model=JobObject, responses={**ERRORS})
async def cancel(id: RawJobId, services: Ready) -> Response:
    """Cancelled at once when queued, soon when running; saying it twice is the same as saying it once."""
    job_id = _job_id(id)
    outcome = await services.submission.cancel(job_id)
    job = await _existing(services, job_id)
    if outcome is CancelOutcome.FINAL and job.state is not JobState.CANCELLED:
        raise NotCancellable(job.id, job.state)
    return json_reply(job_object(job, services.trace_links), 200, {"X-Job-Id": job.id})


async def _submit_and_wait(services: Services, new: NewJob, seconds: float) -> Accepted:
    if not seconds:
        return await services.submission.submit(new)
    with services.replies.expect(new.id) as ending:
        accepted = await services.submission.submit(new)
        with wait_result(accepted.id):
            if accepted.replayed:
                await services.replies.wait(accepted.id, seconds)
            else:
                await wait_for(ending, seconds)
    return accepted


async def _existing(services: Services, id: JobId) -> Job:
    job = await services.store.get(id, with_result=True)
    if job is None:
        raise JobNotFound
    mark_job(job.id, created_by=job.traceparent)
    return job


def _job_id(raw: str) -> JobId:
    """Raises JobNotFound for what can be no id of ours, without asking the store."""
    if not _JOB_ID.fullmatch(raw):
        raise JobNotFound
    return JobId(raw)


def _granted(seconds: float | None, services: Services) -> float | None:
    return None if seconds is None else min(seconds, services.settings.long_poll_seconds)
