"""Jobs of several prompts of which some fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.model import Failure, ItemResult, JobId, JobRequest, JobResult
from jobs.states import JobState
from jobs.store import Settlement

TOO_LONG = Failure(reason="invalid_request", message="the prompt does not fit", retryable=False)
PASSING = Failure(reason="not_finite", message="the logits were not finite", retryable=True)
PROMPTS = ["ab", "cd", "ef"]

Answer = Callable[[JobRequest], Settlement]


def failing(answers: Answer, failures: dict[int, Failure]) -> Answer:
    """As a worker settles a job of which these prompts failed."""

    def settle(request: JobRequest) -> Settlement:
        whole = answers(request).result
        assert whole is not None
        items = tuple(
            ItemResult(failure=failures[index]) if index in failures else item
            for index, item in enumerate(whole.items)
        )
        result = JobResult(items=items)
        return Settlement(
            JobState.FAILED if result.failure else JobState.COMPLETED, result=result, failure=result.failure
        )

    return settle


async def test_completion_keeps_the_places_of_a_prompt_that_failed(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = failing(answers, {1: TOO_LONG})

    reply = await api.complete(prompt=PROMPTS, n=2)

    assert reply.status_code == 200
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3, 4, 5]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 2 + ["error"] * 2 + ["length"] * 2
    assert [choice["text"] for choice in choices[2:4]] == ["", ""]
    assert reply.json()["errors"] == [
        {
            "prompt": 1,
            "message": "the prompt does not fit",
            "type": "server_error",
            "code": "invalid_request",
            "retryable": False,
        }
    ]
    assert reply.json()["usage"]["completion_tokens"] == 8


async def test_completion_of_which_all_prompts_failed_is_an_error(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = failing(answers, dict.fromkeys(range(3), TOO_LONG))

    reply = await api.complete(prompt=PROMPTS)

    assert reply.status_code == 500
    assert reply.headers["x-should-retry"] == "false"
    error = reply.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["message"] == "all 3 prompts failed; the first: the prompt does not fit"


async def test_completion_of_which_all_prompts_failed_may_be_retried_when_one_of_them_may(
    api: Any, answers: Any
) -> None:
    api.backend.settles_at_once = failing(answers, {0: TOO_LONG, 1: PASSING, 2: TOO_LONG})

    reply = await api.complete(prompt=PROMPTS)

    assert reply.json()["error"]["code"] == "items_failed"
    assert "x-should-retry" not in reply.headers


async def test_job_counts_its_prompts_and_tells_each_that_failed(api: Any, answers: Any) -> None:
    id = (await api.submit(prompt=PROMPTS)).json()["id"]
    waiting = (await api.client.get(f"/v1/jobs/{id}")).json()
    await api.backend.settle_now(JobId(id), failing(answers, {0: TOO_LONG, 2: PASSING}))

    job = (await api.client.get(f"/v1/jobs/{id}")).json()
    result = await api.client.get(f"/v1/jobs/{id}/result")

    assert waiting["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    assert job["status"] == "completed"
    assert job["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    assert [(error["prompt"], error["code"]) for error in job["errors"]] == [
        (0, "invalid_request"),
        (2, "not_finite"),
    ]
    assert result.json()["errors"] == job["errors"]


async def test_failed_job_tells_why_each_prompt_failed(api: Any, answers: Any) -> None:
    id = (await api.submit(prompt=PROMPTS)).json()["id"]
    await api.backend.settle_now(JobId(id), failing(answers, {0: TOO_LONG, 1: PASSING, 2: TOO_LONG}))

    job = (await api.client.get(f"/v1/jobs/{id}")).json()
    result = await api.client.get(f"/v1/jobs/{id}/result")

    assert (job["status"], job["error"]["code"], job["result"]) == ("failed", "items_failed", None)
    assert job["request_counts"] == {"total": 3, "completed": 0, "failed": 3}
    assert [error["retryable"] for error in job["errors"]] == [False, True, False]
    assert (result.status_code, result.json()["error"]["code"]) == (409, "job_failed")


async def test_running_job_counts_the_prompts_that_have_ended(api: Any, answers: Any) -> None:
    id = JobId((await api.submit(prompt=PROMPTS)).json()["id"])
    token, request = await api.backend.start(id)
    await api.backend.keep(id, token, {1: answers(request).result.items[1]}, completed=1, failed=0)

    running = (await api.client.get(f"/v1/jobs/{id}")).json()
    await api.client.post(f"/v1/jobs/{id}/cancel")
    await api.backend.settle(id, token, Settlement(JobState.CANCELLED), now=1.0)
    cancelled = (await api.client.get(f"/v1/jobs/{id}")).json()

    assert running["request_counts"] == {"total": 3, "completed": 1, "failed": 0}
    assert running["result"] is None
    assert cancelled["status"] == "cancelled"
    assert cancelled["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    assert [choice["finish_reason"] for choice in cancelled["result"]["choices"]] == [
        "error",
        "length",
        "error",
    ]


async def test_prompt_that_fails_by_itself_is_the_jobs_own_error(api: Any, worker_fails: Any) -> None:
    id = (await api.submit()).json()["id"]
    await api.backend.settle_now(JobId(id), worker_fails("invalid_request", retryable=False))

    job = (await api.client.get(f"/v1/jobs/{id}")).json()

    assert (job["error"]["code"], job["errors"]) == ("invalid_request", [])
    assert job["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
