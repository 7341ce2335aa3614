"""Links to the page of a trace, in jobs, completions and errors."""

from __future__ import annotations

from typing import Any

import pytest

from api.settings import ApiSettings
from api.trace_link import TraceLinks
from jobs.errors import SettingsError
from jobs.settings import read_settings

TEMPLATE = "https://jaeger.example:16686/trace/{trace_id}?uiFind=throughline"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def page_of(reply: Any) -> str:
    return TEMPLATE.replace("{trace_id}", str(reply.headers["x-trace-id"]))


async def test_job_and_its_result_link_to_the_page_of_the_trace_that_created_it(
    start_api: Any, backend: Any
) -> None:
    async with start_api(backend, trace_url_template=TEMPLATE) as api:
        submitted = await api.submit()
        await backend.settle_now(api.last)
        read = await api.client.get(f"/v1/jobs/{api.last}")
        result = await api.client.get(f"/v1/jobs/{api.last}/result")

    wanted = page_of(submitted)
    assert page_of(read) != wanted
    assert submitted.json()["links"]["trace"] == read.json()["links"]["trace"] == wanted
    assert read.json()["result"]["trace"] == result.json()["trace"] == wanted
    assert result.json()["trace_id"] == submitted.headers["x-trace-id"]


async def test_completion_links_to_its_trace(start_api: Any, backend: Any, answers: Any) -> None:
    backend.settles_at_once = answers
    async with start_api(backend, trace_url_template=TEMPLATE) as api:
        reply = await api.complete()

    assert (reply.json()["trace_id"], reply.json()["trace"]) == (reply.headers["x-trace-id"], page_of(reply))


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/jobs/job_1", b"", 404),
        ("POST", "/v1/jobs", b"{", 400),
        ("POST", "/v1/jobs", b" " * 2048, 413),
    ],
)
async def test_every_error_links_to_its_trace(
    start_api: Any, backend: Any, method: str, path: str, content: bytes, status: int
) -> None:
    async with start_api(backend, trace_url_template=TEMPLATE, max_body_bytes=1024) as api:
        headers = {"Content-Type": "application/json"}
        reply = await api.client.request(method, path, content=content, headers=headers)

    assert reply.status_code == status
    assert reply.json()["error"]["trace"] == page_of(reply)


async def test_failed_job_links_to_its_trace_in_its_error(
    start_api: Any, backend: Any, worker_fails: Any
) -> None:
    async with start_api(backend, trace_url_template=TEMPLATE) as api:
        submitted = await api.submit()
        await backend.settle_now(api.last, worker_fails("invalid_request", retryable=False))
        reply = await api.client.get(f"/v1/jobs/{api.last}")

    assert reply.json()["error"]["trace"] == page_of(submitted)


async def test_replies_link_to_nothing_when_no_template_is_set(api: Any) -> None:
    job = (await api.submit()).json()
    error = (await api.client.get("/nowhere")).json()["error"]

    assert job["links"]["trace"] is None
    assert "trace" not in error


@pytest.mark.parametrize(
    ("traceparent", "is_linked"),
    [
        (f"00-{TRACE_ID}-00f067aa0ba902b7-01", True),
        (f"00-{TRACE_ID}-00f067aa0ba902b7-03", True),
        (f"00-{TRACE_ID}-00f067aa0ba902b7-00", False),
        ("", False),
        (None, False),
    ],
)
def test_trace_has_a_page_only_when_it_is_sampled(traceparent: str | None, is_linked: bool) -> None:
    found = TraceLinks(TEMPLATE).to(traceparent)

    assert found == (TEMPLATE.replace("{trace_id}", TRACE_ID) if is_linked else None)


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("jaeger:16686/{trace_id}", "must be a URL that begins with http:// or https://"),
        ("javascript:alert({trace_id})", "must be a URL that begins with http:// or https://"),
        ("http://:16686/{trace_id}", "names a host"),
        ("http://h:99999/{trace_id}", "names a host"),
        ("http://h/trace/", "must hold {trace_id}"),
        ("http://h/trace/{traceid}", "must hold {trace_id}"),
    ],
)
def test_template_that_leads_nowhere_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, template: str, rule: str
) -> None:
    monkeypatch.setenv("THROUGHLINE_TRACE_URL_TEMPLATE", template)

    with pytest.raises(SettingsError, match="THROUGHLINE_TRACE_URL_TEMPLATE") as caught:
        read_settings(ApiSettings)

    assert rule in str(caught.value)
