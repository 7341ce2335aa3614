"""A FastAPI application with nothing in it but tracing, served by uvicorn in a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response

from telemetry.http import current_trace_id, current_traceparent, instrument_api
from telemetry.setup import configure


def create_app() -> FastAPI:
    telemetry = configure("test-api")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        telemetry.shutdown()

    app = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False}, lifespan=lifespan)
    instrument_api(app)

    @app.middleware("http")
    async def add_trace_id(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["X-Trace-Id"] = current_trace_id()
        return response

    @app.post("/v1/echo/{name}")
    async def echo(name: str) -> dict[str, str]:
        return {"name": name, "traceparent": current_traceparent()}

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"traceparent": current_traceparent()}

    @app.get("/v1/boom")
    async def boom() -> None:
        raise RuntimeError("boom")

    return app
