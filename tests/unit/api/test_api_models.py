from __future__ import annotations

from typing import Any

import pytest

from jobs.clock import SystemClock
from jobs.model import WorkerId
from jobs.registry import ModelCard

MODEL = "house/bytes"


def _card(backend: Any, **changes: Any) -> ModelCard:
    card: ModelCard = backend._cards[MODEL].model_copy(update=changes)
    return card


async def test_unknown_model_answers_404(api: Any) -> None:
    reply = await api.submit(model="gpt-9")

    error = reply.json()["error"]
    assert reply.status_code == 404
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-9" in error["message"]


async def test_known_model_answers_503_when_its_last_worker_has_left(backend: Any, start_api: Any) -> None:
    backend.leave(MODEL, WorkerId("worker-1"))
    async with start_api(backend) as api:
        reply = await api.submit()

    assert reply.status_code == 503
    assert reply.headers["retry-after"]
    assert reply.json()["error"]["code"] == "no_worker"
    assert backend.created == []


async def test_expected_model_answers_503_when_no_worker_ever_came(backend: Any, start_api: Any) -> None:
    async with start_api(backend, served_model_names="big-one, bytes") as api:
        reply = await api.submit(model="big-one")

    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "no_worker"


async def test_model_answers_503_when_its_tokenizer_is_missing(backend: Any, start_api: Any) -> None:
    backend._tokenizers.clear()
    async with start_api(backend) as api:
        text = await api.submit()
        ids = await api.submit(prompt=[1, 2])

    assert (text.status_code, ids.status_code) == (503, 202)


async def test_worker_that_comes_is_seen_within_the_time_the_list_is_kept(
    backend: Any, start_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.catalog.FRESH_SECONDS", 0.0)
    backend.leave(MODEL, WorkerId("worker-1"))
    async with start_api(backend) as api:
        before = await api.submit()
        backend.beat(MODEL, WorkerId("worker-2"), now=SystemClock().now())
        after = await api.submit()

    assert (before.status_code, after.status_code) == (503, 202)


async def test_canonical_name_wins_over_another_models_alias(backend: Any, start_api: Any) -> None:
    backend.announce(_card(backend, name="bytes", aliases=(MODEL,), tokenizer_digest="1" * 64), "{}")
    backend.beat("bytes", WorkerId("worker-2"), now=SystemClock().now())
    async with start_api(backend) as api:
        await api.submit(model=MODEL, prompt=[1])
        await api.submit(model="bytes", prompt=[1])

    assert [new.request.model for new in backend.created] == [MODEL, "bytes"]


async def test_many_requests_ask_the_directory_once(
    backend: Any, start_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_reads, list_models = 0, backend.list_models

    async def counted(*, now: float) -> Any:
        nonlocal num_reads
        num_reads += 1
        return await list_models(now=now)

    monkeypatch.setattr(backend, "list_models", counted)
    async with start_api(backend) as api:
        for _ in range(20):
            await api.submit()

    assert num_reads == 1


async def test_models_are_listed_with_what_a_client_can_ask_of_them(api: Any) -> None:
    listed = (await api.client.get("/v1/models")).json()

    assert listed["object"] == "list"
    assert listed["data"][0]["id"] == MODEL
    assert listed["data"][0]["object"] == "model"
    assert listed["data"][0]["max_model_len"] == 64
    assert listed["data"][0]["num_workers"] == 1


@pytest.mark.parametrize("name", ["house/bytes", "house%2Fbytes", "bytes"])
async def test_one_model_is_read_by_name_or_alias(api: Any, name: str) -> None:
    reply = await api.client.get(f"/v1/models/{name}")

    assert reply.status_code == 200
    assert reply.json()["id"] == MODEL


async def test_one_model_answers_404_when_unknown(api: Any) -> None:
    reply = await api.client.get("/v1/models/nothing")

    assert reply.json()["error"]["code"] == "model_not_found"


async def test_live_answers_while_everything_else_is_away(api: Any) -> None:
    api.backend.is_away = True

    reply = await api.client.get("/health/live")

    assert (reply.status_code, reply.json()) == (200, {"status": "live"})


async def test_ready_answers_200_with_a_worker(api: Any) -> None:
    reply = await api.client.get("/health/ready")

    assert reply.status_code == 200
    assert reply.json() == {"status": "ready", "reasons": [], "models": {MODEL: 1}}


async def test_ready_answers_503_with_the_reason_when_the_broker_is_away(api: Any) -> None:
    api.backend.is_away = True

    reply = await api.client.get("/health/ready")

    assert reply.status_code == 503
    assert reply.json()["reasons"] == ["the broker does not answer"]


async def test_ready_answers_503_naming_the_models_without_a_worker(backend: Any, start_api: Any) -> None:
    backend.leave(MODEL, WorkerId("worker-1"))
    async with start_api(backend, served_model_names=(MODEL, "big-one")) as api:
        reply = await api.client.get("/health/ready")

    assert reply.status_code == 503
    assert reply.json()["reasons"] == ["no worker serves big-one", f"no worker serves {MODEL}"]
    assert reply.headers["retry-after"]


async def test_version_is_told(api: Any) -> None:
    assert (await api.client.get("/version")).json()["version"]
