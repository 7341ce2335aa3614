from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs.model import JobId
from jobs.states import JobState

KEY = {"Idempotency-Key": "nightly-7"}


async def _submit(api: Any, headers: dict[str, str], **fields: Any) -> Any:
    return await api.client.post("/v1/jobs", json={**api.bodies, **fields}, headers=headers)


async def test_same_key_and_body_give_the_same_job(api: Any) -> None:
    first, again = [await _submit(api, KEY) for _ in range(2)]

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert len(api.backend.created) == 1


async def test_replay_answers_200_when_the_job_has_ended(api: Any) -> None:
    id = (await _submit(api, KEY)).json()["id"]
    await api.backend.settle_now(JobId(id))

    again = await _submit(api, KEY)

    assert again.status_code == 200
    assert again.json()["result"]["choices"]


async def test_key_may_be_quoted_or_bare(api: Any) -> None:
    bare, quoted = [await _submit(api, {"Idempotency-Key": key}) for key in ("abc", '"abc"')]

    assert bare.json()["id"] == quoted.json()["id"]


async def test_order_and_spacing_of_the_body_do_not_matter(api: Any) -> None:
    bodies = [
        b'{"model": "house/bytes", "prompt": "ab", "n": 2}',
        b'{"n":2,"prompt":"ab",  "model":"house/bytes"}',
    ]

    replies = [
        await api.client.post("/v1/jobs", content=body, headers={**KEY, "Content-Type": "application/json"})
        for body in bodies
    ]

    assert replies[0].json()["id"] == replies[1].json()["id"]


async def test_same_key_with_another_body_answers_422(api: Any) -> None:
    await _submit(api, KEY)

    reply = await _submit(api, KEY, max_tokens=3)

    assert reply.status_code == 422
    assert reply.json()["error"]["code"] == "idempotency_key_reuse"


async def test_key_counts_a_route(api: Any) -> None:
    job = await _submit(api, KEY)

    completion = await api.complete(headers={**KEY, "Prefer": "respond-async"})

    assert completion.json()["id"] != job.json()["id"]


@pytest.mark.parametrize("key", ["", '""', "k" * 256, "caf\u00e9", '"half'])
async def test_key_that_is_none_answers_400(api: Any, key: str) -> None:
    reply = await _submit(api, {"Idempotency-Key": key.encode("latin-1")})  # type: ignore[dict-item]

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "Idempotency-Key"


async def test_concurrent_repeats_make_one_job(api: Any) -> None:
    replies = await asyncio.gather(*(_submit(api, KEY) for _ in range(20)))

    assert {reply.status_code for reply in replies} == {202}
    assert len({reply.json()["id"] for reply in replies}) == 1


async def test_repeat_finds_the_job_when_only_the_first_answer_was_lost(api: Any) -> None:
    api.backend.loses_answers = True
    refused = await _submit(api, KEY)
    api.backend.loses_answers = False

    accepted = await _submit(api, KEY)

    assert (refused.status_code, accepted.status_code) == (503, 202)
    assert accepted.json()["id"] == api.last
    assert [id for id, _ in api.backend.published] == [api.last]


async def test_repeat_of_a_running_job_publishes_nothing(api: Any) -> None:
    id = (await _submit(api, KEY)).json()["id"]
    await api.backend.start(JobId(id))

    await _submit(api, KEY)

    assert len(api.backend.published) == 1


async def test_completion_with_a_key_gives_its_repeat_the_same_answer(api: Any, answers: Any) -> None:
    api.backend.settles_at_once = answers

    first, again = [await api.complete(headers=KEY) for _ in range(2)]

    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"


async def test_completion_with_a_key_goes_on_after_its_wait_and_answers_the_repeat(
    backend: Any, start_api: Any
) -> None:
    async with start_api(backend, sync_wait_seconds=0.02) as api:
        timed_out = await api.complete(headers=KEY)
        state = await api.state(api.last)
        await backend.settle_now(api.last)
        again = await api.complete(headers=KEY)

    assert timed_out.status_code == 504
    assert state is JobState.QUEUED
    assert again.status_code == 200
