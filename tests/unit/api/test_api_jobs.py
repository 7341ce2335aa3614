from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import pytest

from jobs.model import JobId
from jobs.states import JobState


async def test_submit_answers_202_with_place_and_poll_hint_when_accepted(api: Any) -> None:
    reply = await api.submit(max_tokens=4)

    job = reply.json()
    assert reply.status_code == 202
    assert reply.headers["location"] == f"/v1/jobs/{job['id']}"
    assert reply.headers["x-job-id"] == job["id"]
    assert int(reply.headers["retry-after"]) >= 1
    assert (job["object"], job["status"], job["done"]) == ("job", "queued", False)
    assert api.backend.published == [(job["id"], "house/bytes.batch")]


async def test_submit_answers_202_also_when_the_job_is_done_by_then(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = answers

    reply = await api.submit()

    assert reply.status_code == 202
    assert reply.json()["status"] == "queued"


async def test_job_object_carries_the_trace_of_its_request(api: Any) -> None:
    reply = await api.submit()

    assert reply.json()["trace_id"] == reply.headers["x-trace-id"]
    assert reply.json()["traceparent"].split("-")[1] == reply.headers["x-trace-id"]


async def test_submit_keeps_priority_expiry_and_metadata(api: Any) -> None:
    reply = await api.submit(priority="interactive", expires_after=60, metadata={"run": "7"})

    job = reply.json()
    new = api.backend.created[-1]
    assert job["priority"] == "interactive"
    assert job["metadata"] == {"run": "7"}
    assert new.queue == "house/bytes.interactive"
    assert new.expires_at == pytest.approx(new.created_at + 60)


async def test_submit_keeps_a_start_time_and_shows_it(api: Any) -> None:
    reply = await api.submit(start_after=60, expires_after=90)

    job, new = reply.json(), api.backend.created[-1]
    read = (await api.client.get(f"/v1/jobs/{job['id']}")).json()
    assert new.start_at == pytest.approx(new.created_at + 60)
    assert job["next_attempt_at"] == read["next_attempt_at"] == int(new.start_at)
    assert job["status"] == "queued"


async def test_submit_without_a_wait_for_its_start_has_no_time_to_show(api: Any) -> None:
    reply = await api.submit(start_after=0)

    assert reply.json()["next_attempt_at"] is None


async def test_submit_answers_200_with_the_result_when_done_within_the_preferred_wait(
    api: Any, answers: Any
) -> None:
    api.backend.settles_at_once = answers

    reply = await api.client.post("/v1/jobs", json=api.bodies, headers={"Prefer": "wait=5"})

    assert reply.status_code == 200
    assert reply.headers["preference-applied"] == "wait=5"
    assert reply.json()["result"]["choices"][0]["text"] == " answer 0"


async def test_submit_answers_202_when_the_preferred_wait_ends_first(api: Any) -> None:
    reply = await api.client.post("/v1/jobs", json=api.bodies, headers={"Prefer": "wait=0.01"})

    assert reply.status_code == 202
    assert reply.headers["preference-applied"] == "wait=0.01"
    assert await api.state(api.last) is JobState.QUEUED


async def test_submit_waits_no_longer_than_the_cap_and_says_so(backend: Any, start_api: Any) -> None:
    async with start_api(backend, long_poll_seconds=0.02) as api:
        reply = await api.client.post("/v1/jobs", json=api.bodies, headers={"Prefer": "wait=3600"})

    assert reply.headers["preference-applied"] == "wait=0.02"


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [("respond-async", "respond-async"), ("handling=lenient", None), ("wait=soon", None), ("", None)],
)
async def test_submit_applies_what_it_knows_of_prefer(api: Any, prefer: str, applied: str | None) -> None:
    reply = await api.client.post("/v1/jobs", json=api.bodies, headers={"Prefer": prefer})

    assert reply.status_code == 202
    assert reply.headers.get("preference-applied") == applied


async def test_read_shows_the_result_and_the_times_once_completed(api: Any) -> None:
    id = (await api.submit(n=2, prompt=["ab", "cd"])).json()["id"]
    await api.backend.settle_now(JobId(id))

    reply = await api.client.get(f"/v1/jobs/{id}")

    job = reply.json()
    assert reply.status_code == 200
    assert (job["status"], job["done"], job["attempts"]) == ("completed", True, 1)
    assert job["completed_at"] >= job["created_at"]
    assert job["failed_at"] is job["cancelled_at"] is job["expired_at"] is None
    assert [choice["index"] for choice in job["result"]["choices"]] == [0, 1, 2, 3]
    assert job["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 8,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_read_shows_why_a_job_failed(api: Any, worker_fails: Any) -> None:
    id = (await api.submit()).json()["id"]
    await api.backend.settle_now(JobId(id), worker_fails("step_failed", retryable=True))

    job = (await api.client.get(f"/v1/jobs/{id}")).json()

    assert job["status"] == "failed"
    assert job["error"]["code"] == "step_failed"
    assert job["result"] is None


async def test_read_answers_304_until_the_job_changes(api: Any) -> None:
    id = (await api.submit()).json()["id"]
    tag = (await api.client.get(f"/v1/jobs/{id}")).headers["etag"]

    same = await api.client.get(f"/v1/jobs/{id}", headers={"If-None-Match": f'"other", W/{tag}'})
    await api.backend.settle_now(JobId(id))
    changed = await api.client.get(f"/v1/jobs/{id}", headers={"If-None-Match": tag})

    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


@pytest.mark.parametrize("how", ["query", "header"])
async def test_read_with_wait_answers_when_the_job_ends(api: Any, how: str) -> None:
    id = (await api.submit()).json()["id"]
    asked: dict[str, Any] = (
        {"params": {"wait": "30"}} if how == "query" else {"headers": {"Prefer": "wait=30"}}
    )
    poll = asyncio.create_task(api.client.get(f"/v1/jobs/{id}", **asked))
    await api.is_watched(JobId(id))

    token, _ = await api.backend.start(JobId(id))
    await api.client.post(f"/v1/jobs/{id}/cancel")
    assert not poll.done()
    await api.backend.release(JobId(id), token, now=0.0)

    reply = await poll
    assert reply.json()["status"] == "cancelled"
    assert reply.headers["preference-applied"] == "wait=30"


async def test_read_with_wait_answers_at_once_when_the_job_has_ended(api: Any) -> None:
    id = (await api.submit()).json()["id"]
    await api.backend.settle_now(JobId(id))
    started = monotonic()

    await api.client.get(f"/v1/jobs/{id}?wait=30")

    assert monotonic() - started < 5


async def test_read_refuses_a_wait_that_is_no_number(api: Any) -> None:
    id = (await api.submit()).json()["id"]

    reply = await api.client.get(f"/v1/jobs/{id}?wait=soon")

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "wait"


async def test_result_is_the_bare_completion_when_completed(api: Any) -> None:
    id = (await api.submit()).json()["id"]
    early = await api.client.get(f"/v1/jobs/{id}/result")
    await api.backend.settle_now(JobId(id))
    late = await api.client.get(f"/v1/jobs/{id}/result")

    assert (early.status_code, early.json()["object"]) == (202, "job")
    assert "retry-after" in early.headers
    assert (late.status_code, late.json()["object"]) == (200, "text_completion")
    assert id in late.json()["id"]


async def test_result_answers_409_not_to_be_repeated_when_the_job_has_none(
    api: Any, worker_fails: Any
) -> None:
    failed, cancelled = [(await api.submit()).json()["id"] for _ in range(2)]
    await api.backend.settle_now(JobId(failed), worker_fails("step_failed", retryable=True))
    await api.client.post(f"/v1/jobs/{cancelled}/cancel")

    for id, code in ((failed, "job_failed"), (cancelled, "job_cancelled")):
        reply = await api.client.get(f"/v1/jobs/{id}/result")
        assert reply.status_code == 409
        assert reply.headers["x-should-retry"] == "false"
        assert reply.json()["error"]["code"] == code


async def test_cancel_ends_a_queued_job_at_once_and_may_be_repeated(api: Any) -> None:
    id = (await api.submit()).json()["id"]

    replies = [await api.client.post(f"/v1/jobs/{id}/cancel") for _ in range(2)]

    assert [reply.status_code for reply in replies] == [200, 200]
    assert [reply.json()["status"] for reply in replies] == ["cancelled", "cancelled"]


async def test_cancel_marks_a_running_job_as_cancelling(api: Any) -> None:
    id = (await api.submit()).json()["id"]
    await api.backend.start(JobId(id))

    reply = await api.client.post(f"/v1/jobs/{id}/cancel")

    assert reply.json()["status"] == "cancelling"
    assert reply.json()["cancelling_at"] is not None


async def test_cancel_answers_409_when_the_job_had_ended(api: Any) -> None:
    id = (await api.submit()).json()["id"]
    await api.backend.settle_now(JobId(id))

    reply = await api.client.post(f"/v1/jobs/{id}/cancel")

    assert reply.status_code == 409
    assert reply.headers["x-should-retry"] == "false"
    assert reply.json()["error"]["code"] == "job_completed"


@pytest.mark.parametrize("id", ["job_" + "0" * 32, "nonsense", "job_" + "z" * 32])
@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/result"), ("POST", "/cancel")])
async def test_unknown_job_answers_404(api: Any, id: str, method: str, path: str) -> None:
    reply = await api.client.request(method, f"/v1/jobs/{id}{path}")

    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "job_not_found"


async def test_submit_answers_503_when_the_store_is_away(api: Any) -> None:
    api.backend.is_away = True

    reply = await api.submit()

    assert reply.status_code == 503
    assert reply.headers["retry-after"]
    assert reply.json()["error"]["code"] == "store_unavailable"
    assert api.backend.published == []


async def test_submit_answers_429_when_the_queue_is_full(backend: Any, start_api: Any) -> None:
    async with start_api(backend, max_open_jobs=2) as api:
        replies = [await api.submit() for _ in range(3)]
        other_class = await api.submit(priority="interactive")

    assert [reply.status_code for reply in replies] == [202, 202, 429]
    assert replies[-1].json()["error"]["code"] == "queue_full"
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 120
    assert other_class.status_code == 202
