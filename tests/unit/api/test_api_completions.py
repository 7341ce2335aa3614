from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from jobs.model import JobId
from jobs.states import JobState

SEED_PAYLOAD = {
    "model": "house/bytes",
    "prompt": "San Francisco is a",
    "max_tokens": 10,
    "n": 3,
    "use_beam_search": "true",
    "temperature": 0.0,
}


async def test_completion_has_openais_shape_when_the_seeds_client_asks(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = answers

    reply = await api.client.post("/v1/completions", json=SEED_PAYLOAD)

    completion = reply.json()
    assert reply.status_code == 200
    assert set(completion) >= {"id", "object", "created", "model", "choices", "usage"}
    assert completion["object"] == "text_completion"
    assert completion["id"] == f"cmpl-{api.last}"
    assert completion["choices"][2] == {
        "index": 2,
        "text": " answer 2",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_logprobs": None,
    }
    assert api.backend.created[-1].request.sampling == {
        "max_tokens": 10,
        "n": 3,
        "use_beam_search": True,
        "temperature": 0.0,
    }
    assert api.backend.created[-1].queue == "house/bytes.interactive"


async def test_completion_has_the_prompts_logprobs_in_each_choice(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = answers
    body = {"model": SEED_PAYLOAD["model"], "prompt": ["ab", "c"], "n": 2, "prompt_logprobs": 0}

    reply = await api.client.post("/v1/completions", json=body)

    assert reply.status_code == 200
    found = [choice["prompt_logprobs"] for choice in reply.json()["choices"]]
    second = api.backend.created[-1].request.prompts[0].token_ids[1]
    place = {str(second): {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}
    assert found[:2] == [[None, place]] * 2
    assert found[2:] == [[None]] * 2


async def test_completion_carries_every_id_in_its_headers(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = answers

    reply = await api.complete(headers={"X-Request-Id": "mine-1"})

    assert reply.headers["x-job-id"] == api.last
    assert reply.headers["x-request-id"] == "mine-1"
    assert len(reply.headers["x-trace-id"]) == 32
    assert int(reply.headers["openai-processing-ms"]) >= 0
    assert "preference-applied" not in reply.headers


async def test_completion_answers_with_the_canonical_name_when_asked_by_alias(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = answers

    reply = await api.complete(model="bytes")

    assert reply.json()["model"] == "house/bytes"


async def test_completion_is_pushed_when_the_job_ends_later(api: Any) -> None:
    call = asyncio.create_task(api.complete())
    id = await api.published()
    await api.backend.settle_now(id)

    assert (await call).status_code == 200


async def test_completion_becomes_a_job_at_once_when_preferred(api: Any) -> None:
    reply = await api.complete(headers={"Prefer": "respond-async"})

    assert reply.status_code == 202
    assert reply.headers["preference-applied"] == "respond-async"
    assert reply.headers["location"] == f"/v1/jobs/{api.last}"
    assert reply.json()["object"] == "job"
    assert api.backend.created[-1].expires_at is None


async def test_completion_becomes_a_job_when_the_preferred_wait_ends_first(api: Any) -> None:
    reply = await api.complete(headers={"Prefer": "respond-async, wait=0.01"})

    assert reply.status_code == 202
    assert reply.headers["preference-applied"] == "respond-async, wait=0.01"
    assert reply.headers["retry-after"]
    assert await api.state(api.last) is JobState.QUEUED


async def test_completion_answers_200_when_done_within_the_preferred_wait(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = answers

    reply = await api.complete(headers={"Prefer": "wait=5"})

    assert reply.status_code == 200
    assert reply.headers["preference-applied"] == "wait=5"


async def test_completion_answers_504_and_cancels_when_the_wait_ends_first(
    backend: Any, start_api: Any
) -> None:
    async with start_api(backend, sync_wait_seconds=0.01) as api:
        reply = await api.complete()
        state = await api.state(api.last)

    assert reply.status_code == 504
    assert reply.headers["x-should-retry"] == "false"
    assert reply.headers["x-job-id"] == api.last
    assert reply.json()["error"]["code"] == "wait_timeout"
    assert reply.json()["error"]["job_id"] == api.last
    assert state is JobState.CANCELLED


async def test_completion_job_expires_soon_after_the_wait_in_case_this_process_dies(
    backend: Any, start_api: Any
) -> None:
    async with start_api(backend, sync_wait_seconds=0.01) as api:
        await api.complete()

    new = backend.created[-1]
    assert new.created_at < new.expires_at < new.created_at + 60


@pytest.mark.parametrize(
    ("retryable", "should_retry"), [(True, None), (False, "false")], ids=["retryable", "final"]
)
async def test_completion_answers_500_with_the_failures_reason_when_the_job_fails(
    api: Any, worker_fails: Any, retryable: bool, should_retry: str | None
) -> None:
    api.backend.settles_at_once = worker_fails("step_failed", retryable=retryable)

    reply = await api.complete()

    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "step_failed"
    assert reply.headers.get("x-should-retry") == should_retry
    assert reply.headers["x-job-id"] == api.last


async def test_completion_answers_504_not_to_be_repeated_when_the_job_expires(api: Any) -> None:
    call = asyncio.create_task(api.complete())
    id = await api.published()
    api.backend._records[id]["expires_at"] = "1.0"
    await api.backend.start(id)

    reply = await call
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "deadline_exceeded"
    assert reply.headers["x-should-retry"] == "false"


async def test_completion_answers_409_when_somebody_cancels_its_job(api: Any) -> None:
    call = asyncio.create_task(api.complete())
    id = await api.published()
    await api.client.post(f"/v1/jobs/{id}/cancel")

    reply = await call
    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "job_cancelled"
    assert reply.headers["x-should-retry"] == "false"


async def test_completion_answers_503_when_its_job_is_gone_from_the_store(api: Any) -> None:
    call = asyncio.create_task(api.complete())
    id = await api.published()
    record = api.backend._records.pop(id)
    api.backend._notify({**record, "state": "completed"})

    reply = await call
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "job_lost"


async def test_completion_is_answered_when_the_store_is_away_for_a_moment_at_the_end(api: Any) -> None:
    call = asyncio.create_task(api.complete())
    id = await api.published()
    get, num_failures = api.backend.get, 0

    async def get_at_the_third_try(id: JobId, *, with_result: bool = False) -> Any:
        nonlocal num_failures
        num_failures += 1
        api.backend.is_away = num_failures < 3
        return await get(id, with_result=with_result)

    api.backend.get = get_at_the_third_try
    await api.backend.settle_now(id)

    assert (await call).status_code == 200


class HangingUp:
    """A client over bare ASGI that sends its request and leaves when told."""

    def __init__(self, app: Any, headers: dict[str, str]) -> None:
        self._app = app
        self._headers = headers
        self._leave = asyncio.Event()
        self._has_sent = False
        self.sent: list[Any] = []

    async def run(self, body: bytes) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in self._headers.items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
            "scheme": "http",
            "http_version": "1.1",
            "server": ("api", 80),
            "client": ("client", 1),
        }

        async def receive() -> Any:
            if not self._has_sent:
                self._has_sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await self._leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)

        await self._app(scope, receive, send)

    def leave(self) -> None:
        self._leave.set()


@pytest.mark.parametrize(
    ("headers", "state"),
    [
        ({}, JobState.CANCELLED),
        ({"Prefer": "wait=30"}, JobState.QUEUED),
        ({"Idempotency-Key": "k1"}, JobState.QUEUED),
    ],
    ids=["plain", "prefer", "key"],
)
async def test_job_of_a_client_that_hung_up_ends_unless_it_can_come_back_for_it(
    api: Any, headers: dict[str, str], state: JobState
) -> None:
    client = HangingUp(api.app, headers)
    call = asyncio.create_task(client.run(httpx.Request("POST", "http://api", json=api.bodies).read()))
    id = await api.published()

    client.leave()
    await call

    assert await api.state(id) is state


async def test_job_is_cancelled_when_the_server_stops_while_its_client_waits(
    backend: Any, start_api: Any
) -> None:
    async with start_api(backend) as api:
        call = asyncio.create_task(api.complete())
        id = await api.published()
        call.cancel()
        reply = await call

    assert backend._records[id]["state"] == JobState.CANCELLED
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "stopping"


async def test_nobody_waits_any_more_when_a_completion_has_been_answered(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = answers

    await asyncio.gather(*(api.complete() for _ in range(20)))

    assert api.app.state.services.replies.num_waiters == 0
