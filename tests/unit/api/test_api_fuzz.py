from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.schemas import JobBody

FUZZ = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**64, -(2**64), 10**400, "9" * 5000, "\x00", "1e999", "True"])
)
values = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(sorted(JobBody.model_fields))
documents = st.dictionaries(fields | st.text(max_size=5), values, max_size=6)
names = st.sampled_from(["house/bytes", "bytes", "other"])


async def _post(api: Any, path: str, body: bytes, headers: dict[str, str] | None = None) -> Any:
    return await api.client.post(
        path, content=body, headers={"Content-Type": "application/json", **(headers or {})}
    )


def _check(reply: Any) -> None:
    assert reply.status_code < 500
    assert reply.headers["x-trace-id"]
    if reply.status_code >= 400:
        assert reply.json()["error"]["message"]
    json.loads(reply.content, parse_constant=pytest.fail)


@given(document=documents, model=names, prompt=st.text(max_size=30) | values)
@FUZZ
async def test_no_document_makes_a_job_submission_fail_on_our_side(
    api: Any, document: dict[str, Any], model: str, prompt: Any
) -> None:
    body = json.dumps({"model": model, "prompt": prompt, **document}, ensure_ascii=True)

    _check(await _post(api, "/v1/jobs", body.encode(), {"Idempotency-Key": body.encode()[:40].hex()}))


@given(document=documents)
@FUZZ
async def test_no_document_makes_a_completion_fail_on_our_side(
    api: Any, answers: Any, document: dict[str, Any]
) -> None:
    api.backend.settles_at_once = answers
    body = json.dumps({"model": "house/bytes", "prompt": "a", **document})

    _check(await _post(api, "/v1/completions", body.encode()))


@given(body=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: b'{"prompt": "' + text.encode()))
@FUZZ
async def test_no_bytes_make_a_submission_fail_on_our_side(api: Any, body: bytes) -> None:
    _check(await _post(api, "/v1/jobs", body))


@given(
    name=st.sampled_from(
        [
            "prefer",
            "idempotency-key",
            "x-request-id",
            "if-none-match",
            "content-type",
            "traceparent",
            "accept",
        ]
    ),
    value=st.binary(max_size=60).filter(lambda raw: not set(raw) & {0, 10, 13}),
)
@FUZZ
async def test_no_header_makes_a_request_fail_on_our_side(api: Any, name: str, value: bytes) -> None:
    if name == "prefer":
        value = b"respond-async, " + value
    reply = await api.client.post(
        "/v1/completions", json=api.bodies, headers={"Prefer": "respond-async", name: value}
    )

    _check(reply)


@given(wait=st.text(max_size=8) | st.sampled_from(["-1", "1e-3", "nan", "inf", "0"]))
@FUZZ
async def test_no_wait_makes_a_poll_fail_on_our_side(api: Any, wait: str) -> None:
    id = (await api.submit()).json()["id"]
    await api.backend.settle_now(id)

    _check(await api.client.get(f"/v1/jobs/{id}", params={"wait": wait}))
