"""OpenAI's completions, through the queue: submit, wait by push, answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from api.errors import DeadlineExceeded, JobCancelled, JobFailed, JobLost, WaitTimeout
from api.preferences import Preferences, read_preferences
from api.presentation import completion_object
from api.replies import ERRORS, job_headers, job_reply, json_reply
from api.routes.direct import DirectRoute
from api.schemas import CompletionBody, CompletionObject, JobObject
from api.services import Ready, Services
from api.submission import Accepted
from api.waiting import Ending, WaitOutcome, wait_for
from jobs.errors import StoreUnavailable
from jobs.model import Job, JobId, NewJob
from jobs.states import JobState
from telemetry.spans import fetch_result, mark_job, wait_result

FETCH_TRIES = 4
"""A job that ended while the store went away is asked for so often, with pauses, before it is given up."""
FETCH_PAUSE_SECONDS = 0.25
CLIENT_CLOSED_REQUEST = 499
"""Read by nobody but logs and spans."""

router = APIRouter(prefix="/v1/completions", tags=["completions"], route_class=DirectRoute)


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, once it has been read."""

    new: NewJob
    preferences: Preferences
    wait_seconds: float
    client_gone: asyncio.Future[None]

    @property
    def is_kept(self) -> bool:
        """Whether the job goes on without its client, who then knows how to find it again."""
        return self.preferences.wants_job or self.new.idempotency_key is not None


@router.post(
    "",
    response_model=CompletionObject,
    responses={202: {"model": JobObject, "description": "Goes on as a job, as preferred"}, **ERRORS},
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": CompletionBody.model_json_schema()}}}
    },
)
async def complete(request: Request, services: Ready) -> Response:
    """Generate completions. An ordinary client waits; one that says `Prefer` may be given a job instead."""
    preferences = read_preferences(request.headers)
    seconds = _wait_seconds(preferences, services)
    new = await services.intake.read_completion(
        request,
        watcher=services.replies.replica,
        expires_after_wait=None if preferences.wants_job or "idempotency-key" in request.headers else seconds,
    )
    mark_job(new.id)
    async with _watch_client(request) as client_gone:
        return await _run(services, _Call(new, preferences, seconds, client_gone))


async def _run(services: Services, call: _Call) -> Response:
    with services.replies.expect(call.new.id) as ending:
        try:
            accepted = await services.submission.submit(call.new)
            outcome = await _wait(services, call, accepted, ending)
        except asyncio.CancelledError:  # the server stops and will wait no longer
            if not call.is_kept:
                services.submission.give_up_soon(call.new.id)
            raise
    is_ours = not (call.is_kept or accepted.replayed)
    match outcome:
        case WaitOutcome.ENDED:
            with fetch_result(accepted.id):
                job = await _fetch(services, accepted.id)
            return _answer(services, job, call, accepted)
        case WaitOutcome.CLIENT_GONE:
            if is_ours:
                await services.submission.give_up(accepted.id)
            return Response(status_code=CLIENT_CLOSED_REQUEST, headers=job_headers(accepted.id))
        case WaitOutcome.TIMED_OUT:
            return await _give_up(services, call, accepted, is_ours=is_ours)


async def _wait(services: Services, call: _Call, accepted: Accepted, ending: Ending) -> WaitOutcome:
    if call.wait_seconds == 0:
        return WaitOutcome.TIMED_OUT
    with wait_result(accepted.id):
        if accepted.replayed:
            return await services.replies.wait(accepted.id, call.wait_seconds, client_gone=call.client_gone)
        return await wait_for(ending, call.wait_seconds, client_gone=call.client_gone)


def _answer(services: Services, job: Job, call: _Call, accepted: Accepted) -> Response:
    match job.state:
        case JobState.COMPLETED if job.result is not None:
            headers = job_headers(job.id, replayed=accepted.replayed)
            return json_reply(
                completion_object(job, job.result, services.trace_links),
                200,
                headers | call.preferences.applied(call.wait_seconds),
            )
        case JobState.FAILED:
            raise JobFailed(job.id, job.failure)
        case JobState.EXPIRED:
            raise DeadlineExceeded(job.id)
        case JobState.CANCELLED:
            raise JobCancelled(job.id)
        case _:
            raise JobLost(job.id)


async def _give_up(services: Services, call: _Call, accepted: Accepted, *, is_ours: bool) -> Response:
    """The wait is over before the job: 202 for a client that knows jobs, else 504."""
    if call.preferences.wants_job:
        job = await _fetch(services, accepted.id)
        if job.state.is_final:
            return _answer(services, job, call, accepted)
        headers = job_headers(job.id, replayed=accepted.replayed)
        return job_reply(job, headers | call.preferences.applied(call.wait_seconds), services.trace_links)
    if is_ours:
        await services.submission.give_up(accepted.id)
    raise WaitTimeout(accepted.id, call.wait_seconds, is_kept=not is_ours)


async def _fetch(services: Services, id: JobId) -> Job:
    """The job with its result. A store that is away for a moment must not cost an answer it holds."""
    for remaining in reversed(range(FETCH_TRIES)):
        try:
            job = await services.store.get(id, with_result=True)
            break
        except StoreUnavailable:
            if not remaining:
                raise
            await asyncio.sleep(FETCH_PAUSE_SECONDS)
    if job is None:
        raise JobLost(id)
    return job


def _wait_seconds(preferences: Preferences, services: Services) -> float:
    limit = services.settings.sync_wait_seconds
    if preferences.wait_seconds is not None:
        return min(preferences.wait_seconds, limit)
    return 0.0 if preferences.respond_async else limit


@asynccontextmanager
async def _watch_client(request: Request) -> AsyncIterator[asyncio.Future[None]]:
    """A future that is done when the client hangs up. The body must have been read."""
    task = asyncio.get_running_loop().create_task(_hang_up(request))
    try:
        yield task
    finally:
        task.cancel()  # and not waited for: a turn of the loop for each request


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
