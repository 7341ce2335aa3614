from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from api.errors import TABLE, ApiError
from jobs.errors import JobsError, SettingsError

BODY = b'{"model": "house/bytes", "prompt": "PADDING"}'
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/jobs/", 404),
        ("DELETE", "/v1/completions", 405),
        ("POST", "/v1/completions", 400),
        ("GET", "/v1/jobs/job_1", 404),
    ],
)
async def test_every_reply_carries_ids_and_every_error_the_error_object(
    api: Any, method: str, path: str, status: int
) -> None:
    reply = await api.client.request(method, path)

    assert reply.status_code == status
    assert re.fullmatch(r"[0-9a-f]{32}", reply.headers["x-trace-id"])
    assert reply.headers["x-request-id"]
    if status >= 400:
        error = reply.json()["error"]
        assert set(error) >= {"message", "type", "param", "code", "trace_id"}
        assert error["trace_id"] == reply.headers["x-trace-id"]


async def test_wrong_method_is_told_which_ones_are_taken(api: Any) -> None:
    reply = await api.client.get("/v1/completions")

    assert reply.headers["allow"] == "POST"
    assert reply.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("given", ["a b", "x" * 129, "a\tb", ""])
async def test_request_id_that_could_forge_a_line_is_replaced(api: Any, given: str) -> None:
    reply = await api.client.get("/version", headers={"X-Request-Id": given})

    assert re.fullmatch(r"[0-9a-f]{32}", reply.headers["x-request-id"])


async def test_body_announced_too_large_answers_413_unread(backend: Any, start_api: Any) -> None:
    async def unreadable() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with start_api(backend, max_body_bytes=2048) as api:
        reply = await api.client.post(
            "/v1/jobs", content=unreadable(), headers={**JSON, "Content-Length": "2049"}
        )

    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    assert reply.headers["x-trace-id"]


async def test_chunked_body_answers_413_as_soon_as_it_is_too_large(backend: Any, start_api: Any) -> None:
    num_chunks = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_chunks
        while True:
            num_chunks += 1
            yield b"x" * 1000

    async with start_api(backend, max_body_bytes=2048) as api:
        reply = await api.client.post("/v1/completions", content=endless(), headers=JSON)

    assert reply.status_code == 413
    assert num_chunks == 3


@pytest.mark.parametrize(("size", "status"), [(2048, 202), (2049, 413)])
async def test_body_is_taken_up_to_the_limit_exactly(
    backend: Any, start_api: Any, size: int, status: int
) -> None:
    body = BODY.replace(b"PADDING", b"x").ljust(size)
    async with start_api(backend, max_body_bytes=2048) as api:
        reply = await api.client.post("/v1/jobs", content=body, headers=JSON)

    assert reply.status_code == status


async def test_unexpected_error_answers_500_and_tells_nothing(
    api: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(body: Any, *args: Any) -> None:
        raise ZeroDivisionError(body.prompt)

    monkeypatch.setattr("api.intake.to_sampling", broken)

    reply = await api.submit(prompt="a prompt about Ada")

    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert reply.headers["x-trace-id"]
    assert "Ada" not in reply.text + caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert reply.headers["x-request-id"] in caplog.text
    assert "to_sampling" in caplog.text


def _leaves(error: type[Exception]) -> set[type[Exception]]:
    below = error.__subclasses__()
    return {error} if not below else set().union(*map(_leaves, below))


def test_table_answers_every_error_that_a_request_can_raise() -> None:
    raised = (_leaves(ApiError) | _leaves(JobsError)) - {SettingsError}

    assert {error for error in raised if error.__module__ in ("api.errors", "jobs.errors")} == set(TABLE)


def test_table_asks_no_client_to_wait_longer_than_openais_obey() -> None:
    assert all((reply.retry_after_seconds or 0) <= 120 for reply in TABLE.values())


def test_table_never_lets_a_conflict_or_timeout_be_repeated() -> None:
    assert all(reply.should_retry is False for reply in TABLE.values() if reply.status in (408, 409, 504))
