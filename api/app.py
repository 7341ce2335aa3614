"""The HTTP process: `uvicorn --factory api.app:create_app`. Wiring and lifespan only."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from api.bodies import invalid_request
from api.errors import ApiError, error_body, error_response
from api.measure import SILENT, ApiMetrics, RequestTimes
from api.middleware import BodyLimit, RequestContext
from api.routes import completions, health, jobs, models
from api.services import Connect, redis_backends, run_services
from api.settings import ApiSettings
from api.trace_link import TraceLinks
from jobs.errors import JobsError
from jobs.garbage import collect_seldom
from jobs.settings import JobsSettings, read_settings
from telemetry import setup
from telemetry.celery import instrument_celery
from telemetry.http import instrument_api
from telemetry.log import LogFormat, configure_logging
from telemetry.meter import CONTENT_TYPE, Metrics, build_metrics, shut_down

SERVICE_NAME = "throughline-api"


def create_app() -> FastAPI:
    """The app of a process of its own, from the environment: settings, logs, tracing, Redis.

    Raises:
        SettingsError: of `jobs` or `telemetry`; names the variable, its value and the rule.
    """
    settings, jobs_settings = read_settings(ApiSettings), read_settings(JobsSettings)
    configure_logging(SERVICE_NAME, LogFormat.from_environment(os.environ))
    telemetry = setup.configure(SERVICE_NAME)
    instrument_celery(uses_links_only=telemetry.settings.uses_links_only)
    metrics = build_metrics(SERVICE_NAME, telemetry.settings, os.environ)
    telemetry.show_losses(metrics.meter)

    def flush() -> None:
        shut_down(telemetry, metrics)

    app = build_app(settings, redis_backends(jobs_settings), metrics=metrics, at_end=flush)
    collect_seldom()
    return app


def build_app(
    settings: ApiSettings,
    connect: Connect,
    *,
    metrics: Metrics | None = None,
    at_end: Callable[[], None] | None = None,
) -> FastAPI:
    """The app over any backends.

    Args:
        settings: limits.
        connect: opens the backends when the app starts and closes them when it ends.
        metrics: shown at `/metrics`; without it there is no such route.
        at_end: called in a thread once everything else has stopped.
    """
    counted = SILENT if metrics is None else ApiMetrics(metrics.meter)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with run_services(settings, connect, counted) as services:
                app.state.services = services
                yield
        finally:
            if at_end is not None:
                await asyncio.to_thread(at_end)

    app = FastAPI(
        title="Throughline",
        lifespan=lifespan,
        redirect_slashes=False,
        # Spans come from instrument_api alone.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    for module in (jobs, completions, models, health):
        app.include_router(module.router)
    if metrics is not None:
        _show_metrics(app, metrics)
    links = TraceLinks(settings.trace_url_template)
    _handle_errors(app, links)
    # Added last is outermost.
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, trace_links=links)
    app.add_middleware(RequestContext, trace_links=links)
    if metrics is not None:
        app.add_middleware(RequestTimes, counted=counted)
    instrument_api(app)
    return app


def _show_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", include_in_schema=False)
    def show() -> Response:
        """In a thread: what is collected is text to be made, not to be waited for."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)


def _handle_errors(app: FastAPI, links: TraceLinks) -> None:
    async def answer_own(request: Request, error: Any) -> JSONResponse:
        return error_response(error, links)

    async def answer_invalid(request: Request, error: Any) -> JSONResponse:
        faults = [{**fault, "loc": fault["loc"][1:]} for fault in error.errors()]
        return error_response(invalid_request(faults), links)

    async def answer_http(request: Request, error: Any) -> JSONResponse:
        return _http_response(request, error, links)

    app.add_exception_handler(ApiError, answer_own)
    app.add_exception_handler(JobsError, answer_own)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(RequestValidationError, answer_invalid)


def _http_response(request: Request, error: Any, links: TraceLinks) -> JSONResponse:
    """Starlette's own refusals: unknown routes, wrong methods."""
    code: str | None
    match error.status_code:
        case 404:
            message, code = f"unknown route: {request.method} {request.url.path}", "unknown_route"
        case 405:
            message, code = f"{request.url.path} does not take {request.method}", "method_not_allowed"
        case _:
            message, code = str(error.detail), None
    return JSONResponse(
        error_body(links, message, "invalid_request_error", code),
        status_code=error.status_code,
        headers=error.headers,
    )
