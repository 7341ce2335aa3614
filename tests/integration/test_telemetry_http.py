"""The server spans of a real uvicorn process, with and without `opentelemetry-instrument` around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from telemetry.receiver import Receiver, SpanRecord
from tests.support.processes import wait_until
from tests.support.trace_invariants import check_trace_invariants
from tests.support.valkey import free_port

ROOT = Path(__file__).parents[2]
PARENT_TRACE, PARENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Visit:
    """What a client saw, and what the collector had when the server was gone."""

    replies: dict[str, httpx.Response]
    spans: list[SpanRecord]

    def spans_of(self, reply: str) -> list[SpanRecord]:
        return [span for span in self.spans if span.trace_id == self.replies[reply].headers["X-Trace-Id"]]


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Visit]:
    folder = tmp_path_factory.mktemp("api")
    return {name: _visit(is_wrapped=name == "wrapped", folder=folder) for name in ("plain", "wrapped")}


@pytest.fixture(params=["plain", "wrapped"])
def visit(request: pytest.FixtureRequest, visits: dict[str, Visit]) -> Visit:
    return visits[request.param]


def _visit(*, is_wrapped: bool, folder: Path) -> Visit:
    """The exporter's delay is a minute: what arrives was flushed by the shutdown that SIGTERM begins."""
    port = free_port()
    wrapper = [str(Path(sys.executable).with_name("opentelemetry-instrument"))] if is_wrapped else []
    with Receiver() as receiver:
        environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("OTEL_")},
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.http_endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_SERVICE_NAME": "api-under-test",
            "OTEL_BSP_SCHEDULE_DELAY": "60000",
        }
        uvicorn = (
            f"uvicorn --factory tests.support.telemetry_api:create_app --port {port} --log-level warning"
        )
        with (folder / "api.log").open("wb") as log:
            server = subprocess.Popen(
                [*wrapper, sys.executable, "-m", *uvicorn.split()],
                env=environ,
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        try:
            replies = _requests(f"http://127.0.0.1:{port}", server)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(15)
        return Visit(replies, receiver.spans())


def _requests(url: str, server: subprocess.Popen[bytes]) -> dict[str, httpx.Response]:
    def send(method: str, path: str, traceparent: str = "") -> httpx.Response:
        headers = {"traceparent": traceparent} if traceparent else {}
        return httpx.request(method, url + path, headers=headers, timeout=10)

    def answers() -> bool:
        assert server.poll() is None, "the server ended"
        try:
            return send("GET", "/health/live").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, timeout_seconds=30, what="uvicorn answers")
    return {
        "health": send("GET", "/health/live"),
        "plain": send("POST", "/v1/echo/plain"),
        "child": send("POST", "/v1/echo/child", f"00-{PARENT_TRACE}-{PARENT_SPAN}-01"),
        "malformed": send("POST", "/v1/echo/malformed", f"00-{PARENT_TRACE}-nonsense-01"),
        "zero": send("POST", "/v1/echo/zero", f"00-{'0' * 32}-{'0' * 16}-01"),
        "unsampled": send("POST", "/v1/echo/unsampled", f"00-{'a' * 32}-{'b' * 16}-00"),
        "missing": send("GET", "/v1/nowhere"),
        "boom": send("GET", "/v1/boom"),
    }


def test_request_has_exactly_one_server_span_when_it_is_traced(visit: Visit) -> None:
    for name in ("plain", "child", "malformed", "zero", "missing"):
        assert [span.kind for span in visit.spans_of(name)] == ["SERVER"], name
    assert len(visit.spans) == 6  # those five and the one that failed


def test_request_spans_keep_all_invariants_when_the_server_is_stopped(visit: Visit) -> None:
    check_trace_invariants(visit.spans, external={PARENT_SPAN})


def test_request_joins_the_clients_trace_when_it_brings_a_traceparent(visit: Visit) -> None:
    [span] = visit.spans_of("child")

    assert (span.trace_id, span.parent_id) == (PARENT_TRACE, PARENT_SPAN)
    assert span.name == "POST /v1/echo/{name}"
    assert span.service == "api-under-test"
    assert visit.replies["child"].json()["traceparent"].split("-")[1:3] == [span.trace_id, span.span_id]


@pytest.mark.parametrize("name", ["malformed", "zero"])
def test_request_begins_a_new_trace_when_its_traceparent_is_broken(visit: Visit, name: str) -> None:
    [span] = visit.spans_of(name)

    assert span.parent_id is None
    assert span.trace_id not in (PARENT_TRACE, "0" * 32)
    assert visit.replies[name].status_code == 200


def test_request_is_not_recorded_but_has_its_trace_id_when_the_client_is_not_sampled(visit: Visit) -> None:
    assert visit.replies["unsampled"].headers["X-Trace-Id"] == "a" * 32
    assert visit.spans_of("unsampled") == []


def test_health_request_has_no_span_when_it_is_asked(visit: Visit) -> None:
    assert visit.replies["health"].json() == {"traceparent": ""}
    assert not [span for span in visit.spans if "health" in str(span.attributes)]


def test_server_span_is_an_error_when_the_handler_raises_but_not_for_a_404(visit: Visit) -> None:
    [missing] = visit.spans_of("missing")
    [boom] = [span for span in visit.spans if span.name == "GET /v1/boom"]

    assert (missing.status, missing.attributes["http.response.status_code"]) == ("UNSET", 404)
    assert (boom.status, boom.attributes["error.type"]) == ("ERROR", "500")


def test_server_spans_are_the_same_when_run_under_the_launcher(visits: dict[str, Visit]) -> None:
    def shapes(visit: Visit) -> list[tuple[str, str, str, list[str]]]:
        return sorted((s.name, s.kind, s.status, sorted(s.attributes)) for s in visit.spans)

    assert shapes(visits["plain"]) == shapes(visits["wrapped"])
