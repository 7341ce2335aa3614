"""From an HTTP request to a job that may be stored: every check that needs no broker."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from api.bodies import check_content_type, fingerprint, parse_object, validate
from api.catalog import Catalog
from api.errors import InvalidRequest
from api.preferences import read_idempotency_key
from api.prompts import Prompts, read_prompts
from api.sampling import check_options, num_sequences, to_sampling
from api.schemas import CompletionBody, JobBody
from api.structured import check_structure
from jobs.clock import Clock
from jobs.model import JobRequest, NewJob, Priority, ReplicaId, new_job_id
from jobs.registry import ModelCard, queue_name
from telemetry.http import current_traceparent
from telemetry.spans import accept

EXPIRY_MARGIN_SECONDS = 5.0
"""A waiting client's job expires so long after the wait: for the case that this process dies meanwhile."""


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    max_prompts: int
    max_sequences: int
    max_attempts: int


@dataclass(frozen=True, slots=True)
class Intake:
    catalog: Catalog
    prompts: Prompts
    clock: Clock
    limits: IntakeLimits

    async def read_job(self, request: Request, *, watcher: ReplicaId | None) -> NewJob:
        """A job for POST /v1/jobs.

        Raises:
            ApiError: what is wrong with the request.
            StoreUnavailable: the models could not be looked up.
        """
        with accept():
            document = await _read_document(request)
            body = validate(JobBody, document)
            _check_times(body)
            new = await self._new_job(request, document, body, priority=body.priority or "batch")
        return new.model_copy(
            update={
                "watcher": watcher,
                "metadata": body.metadata or {},
                "expires_at": None if body.expires_after is None else new.created_at + body.expires_after,
                "start_at": new.created_at + body.start_after if body.start_after else None,
            }
        )

    async def read_completion(
        self, request: Request, *, watcher: ReplicaId, expires_after_wait: float | None
    ) -> NewJob:
        """A job for POST /v1/completions; raises as `read_job`.

        Args:
            request: not yet read.
            watcher: this replica, which waits for it.
            expires_after_wait: the wait's seconds when the job is of no use after it.
        """
        with accept():
            document = await _read_document(request)
            body = validate(CompletionBody, document)
            new = await self._new_job(request, document, body, priority="interactive")
        expires_at = (
            None
            if expires_after_wait is None
            else new.created_at + expires_after_wait + EXPIRY_MARGIN_SECONDS
        )
        return new.model_copy(update={"watcher": watcher, "expires_at": expires_at})

    async def _new_job(
        self, request: Request, document: dict[str, object], body: CompletionBody, *, priority: Priority
    ) -> NewJob:
        route = request.scope["path"]
        key = read_idempotency_key(request.headers)
        card = (await self.catalog.served(body.model)).card
        return NewJob(
            id=new_job_id(),
            request=await self._job_request(body, card),
            queue=queue_name(card.name, priority),
            priority=priority,
            created_at=self.clock.now(),
            max_attempts=self.limits.max_attempts,
            traceparent=current_traceparent() or None,
            idempotency_key=None if key is None else f"{route}:{key}",
            fingerprint=None if key is None else fingerprint(route, document),
        )

    async def _job_request(self, body: CompletionBody, card: ModelCard) -> JobRequest:
        check_options(body, card)
        raw = read_prompts(body.prompt, max_prompts=self.limits.max_prompts)
        if len(raw) * num_sequences(body) > self.limits.max_sequences:
            rule = f"prompts times sequences each (n or best_of) must be at most {self.limits.max_sequences}"
            raise InvalidRequest("n" if body.best_of is None else "best_of", num_sequences(body), rule)
        prompts = await self.prompts.prepare(raw, card, keep_text=bool(body.echo))
        sampling = to_sampling(body, card, prompts)
        await check_structure(sampling.get("structured_outputs"))
        return JobRequest(model=card.name, prompts=prompts, sampling=sampling)


def _check_times(body: JobBody) -> None:
    start, expiry = body.start_after, body.expires_after
    if start is not None and expiry is not None and start >= expiry:
        raise InvalidRequest("start_after", start, f"must be less than expires_after ({expiry:g})")


async def _read_document(request: Request) -> dict[str, object]:
    check_content_type(request.headers.get("content-type"))
    return parse_object(await request.body())
