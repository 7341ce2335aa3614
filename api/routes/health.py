"""Live: this process answers. Ready: a job submitted now would be run."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response

from api.replies import json_reply
from api.schemas import Liveness, Readiness, VersionObject
from api.services import Ready, Services
from jobs.errors import StoreUnavailable

CHECK_SECONDS = 3.0

router = APIRouter(tags=["operations"])


@router.get("/health/live", response_model=Liveness)
async def live() -> Response:
    return json_reply(Liveness())


@router.get("/health/ready", response_model=Readiness, responses={503: {"model": Readiness}})
async def ready(services: Ready) -> Response:
    """503 with the reasons while the broker is away or no worker is alive."""
    readiness = await _check(services)
    if readiness.status == "ready":
        return json_reply(readiness)
    return json_reply(readiness, 503, {"Retry-After": "2"})


@router.get("/version", response_model=VersionObject)
async def read_version() -> Response:
    try:
        return json_reply(VersionObject(version=version("throughline")))
    except PackageNotFoundError:
        return json_reply(VersionObject(version="unknown"))  # run from a checkout that was never installed


async def _check(services: Services) -> Readiness:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await services.store.ping()
            models = await services.catalog.models()
            missing = await services.catalog.missing()
    except (StoreUnavailable, TimeoutError):
        return Readiness(status="not_ready", reasons=["the broker does not answer"], models={})
    workers = {model.card.name: model.num_workers for model in models}
    if any(workers.values()):
        return Readiness(status="ready", reasons=[], models=workers)
    reasons = [f"no worker serves {name}" for name in missing] or ["no worker is alive"]
    return Readiness(status="not_ready", reasons=reasons, models=workers)
