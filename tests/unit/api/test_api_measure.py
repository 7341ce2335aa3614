"""How long requests took, by route."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from starlette.responses import Response, StreamingResponse

from api.measure import ApiMetrics, RequestTimes
from telemetry import metrics, names


class TimedApp:
    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        meter = MeterProvider([self._reader], shutdown_on_exit=False).get_meter("test")
        self.app = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})
        self.app.add_middleware(RequestTimes, counted=ApiMetrics(meter))
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://api"
        )

    def points(self) -> list[tuple[dict[str, object], float]]:
        """Attributes and sum of each series."""
        collected = self._reader.get_metrics_data()
        if collected is None:
            return []
        (metric,) = collected.resource_metrics[0].scope_metrics[0].metrics
        assert metric.name == metrics.HTTP_DURATION
        return [(dict(point.attributes or {}), point.sum) for point in metric.data.data_points]  # type: ignore[union-attr]  # a histogram's


@pytest.fixture
def timed() -> TimedApp:
    timed = TimedApp()

    @timed.app.get("/v1/jobs/{id}")
    async def read(id: str) -> Response:
        return Response(status_code=503 if id == "broken" else 200)

    return timed


async def test_request_is_told_by_its_route_and_never_its_path(timed: TimedApp) -> None:
    for id in ("a", "b"):
        await timed.client.get(f"/v1/jobs/{id}")

    ((attributes, _),) = timed.points()

    assert attributes == {
        metrics.HTTP_METHOD: "GET",
        metrics.HTTP_SCHEME: "http",
        metrics.HTTP_ROUTE: "/v1/jobs/{id}",
        metrics.HTTP_STATUS: 200,
    }


async def test_request_has_an_error_type_when_it_failed(timed: TimedApp) -> None:
    await timed.client.get("/v1/jobs/broken")

    ((attributes, _),) = timed.points()

    assert (attributes[metrics.HTTP_STATUS], attributes[names.ERROR_TYPE]) == (503, "503")


async def test_strangers_choose_no_series_when_they_invent_paths_and_methods(timed: TimedApp) -> None:
    for number in range(3):
        await timed.client.request(f"METHOD{number}", f"/path/{number}")

    ((attributes, _),) = timed.points()

    assert attributes == {
        metrics.HTTP_METHOD: "_OTHER",
        metrics.HTTP_SCHEME: "http",
        metrics.HTTP_STATUS: 404,
    }


async def test_stream_is_timed_to_its_end(timed: TimedApp) -> None:
    released = asyncio.Event()

    async def parts():  # type: ignore[no-untyped-def]  # an async generator of text
        yield "first"
        assert timed.points() == [], "told before its end"
        released.set()
        yield "last"

    @timed.app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(parts())

    await timed.client.get("/stream")

    assert released.is_set()
    assert [attributes[metrics.HTTP_ROUTE] for attributes, _ in timed.points()] == ["/stream"]
