from __future__ import annotations

import json
from typing import Any

import pytest

PROMPT_SECRET = "the patient is called Ada"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": "inf"}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 33}, "n"),
        ({"best_of": 33}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"use_beam_search": "perhaps"}, "use_beam_search"),
        ({"early_stopping": "never"}, "early_stopping"),
        ({"length_penalty": "inf"}, "length_penalty"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [1, 256]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"256": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stream": True}, "stream"),
        ({"suffix": "the end"}, "suffix"),
        ({"model": 7}, "model"),
        ({"model": ""}, "model"),
        ({"user": {"id": 1}}, "user"),
        ({"priority": "urgent"}, "priority"),
        ({"expires_after": 0}, "expires_after"),
        ({"start_after": -1}, "start_after"),
        ({"start_after": 2592001}, "start_after"),
        ({"start_after": "nan"}, "start_after"),
        ({"start_after": "2027-01-01T00:00:00Z"}, "start_after"),
        ({"start_after": 60, "expires_after": 60}, "start_after"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [[1], "a"]}, "prompt[1]"),
        ({"prompt": [1, 256]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [1, "2"]}, "prompt[1]"),
        ({"prompt": [1, 2.0]}, "prompt[1]"),
        ({"prompt": [[1], [10**30]]}, "prompt[1][0]"),
        ({"prompt": [True]}, "prompt"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
async def test_bad_field_answers_400_naming_it(api: Any, fields: dict[str, Any], param: str) -> None:
    reply = await api.submit(**fields)

    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert api.backend.created == []


async def test_bad_field_is_told_with_its_value_and_rule(api: Any) -> None:
    message = (await api.submit(temperature=-1)).json()["error"]["message"]

    assert message == "temperature=-1: must be greater than or equal to 0"


@pytest.mark.parametrize("missing", ["model", "prompt"])
async def test_missing_field_answers_400(api: Any, missing: str) -> None:
    body = {name: value for name, value in api.bodies.items() if name != missing}

    reply = await api.client.post("/v1/completions", json=body)

    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == f"{missing} is required"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": {"text": PROMPT_SECRET}},
        {"prompt": [PROMPT_SECRET, 1]},
        {"prompt": ["fine", [PROMPT_SECRET]]},
        {"prompt": PROMPT_SECRET * 10},
        {"stop": [PROMPT_SECRET, 1]},
        {"stop": [[PROMPT_SECRET]]},
        {"suffix": PROMPT_SECRET},
        {"user": [PROMPT_SECRET]},
        {"metadata": {PROMPT_SECRET: 1}},
        {"metadata": PROMPT_SECRET},
    ],
)
async def test_clients_text_is_never_in_an_error_or_a_log(
    api: Any, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    reply = await api.submit(**fields)

    assert reply.status_code == 400
    assert "Ada" not in reply.text
    assert "Ada" not in caplog.text


async def test_prompt_that_leaves_no_room_is_told_with_both_numbers(api: Any) -> None:
    reply = await api.submit(prompt="x" * 64)

    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert error["message"].count("64") == 2


async def test_prompt_far_too_long_is_refused_without_being_tokenized(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.prompts.LoadedTokenizer.encode", None)

    reply = await api.submit(prompt="x" * 1_000_000)

    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert "at least 1000000" in reply.json()["error"]["message"]


async def test_prompt_and_max_tokens_that_do_not_fit_are_told_with_all_numbers(api: Any) -> None:
    reply = await api.submit(prompt=["ab", "x" * 60], max_tokens=5)

    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert error["message"].startswith("prompt[1]: ")
    for number in ("64", "65", "60", "max_tokens=5"):
        assert number in error["message"]


@pytest.mark.parametrize(("length", "expected"), [(10, 16), (60, 4), (63, 1)])
async def test_default_max_tokens_is_cut_to_the_room_that_is_left(
    api: Any, length: int, expected: int
) -> None:
    await api.submit(prompt="x" * length)

    assert api.backend.created[-1].request.sampling["max_tokens"] == expected


async def test_max_tokens_0_is_taken_with_echo(api: Any) -> None:
    reply = await api.submit(max_tokens=0, echo=True)

    assert reply.status_code == 202
    assert api.backend.created[-1].request.prompts[0].text == "San Francisco is a"


async def test_text_of_the_prompt_is_not_kept_without_echo(api: Any) -> None:
    await api.submit()

    assert api.backend.created[-1].request.prompts[0].text is None


async def test_loose_types_are_taken_as_meant(api: Any) -> None:
    await api.submit(
        n="2", temperature="0.5", max_tokens=4.0, use_beam_search="false", ignore_eos=1, top_k=-1, stop="\n"
    )

    assert api.backend.created[-1].request.sampling == {
        "max_tokens": 4,
        "n": 2,
        "temperature": 0.5,
        "use_beam_search": False,
        "ignore_eos": True,
        "top_k": 0,
        "stop": ["\n"],
    }


async def test_null_and_unknown_fields_count_as_left_out(api: Any) -> None:
    reply = await api.submit(
        temperature=None, stop=None, priority=None, frobnicate=3, stream=False, suffix=""
    )

    assert reply.status_code == 202
    assert api.backend.created[-1].request.sampling == {"max_tokens": 16}


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [(66, 67)]),
        (["ab", "b"], [(66, 67), (67,)]),
        ([7, 8], [(7, 8)]),
        ([[7, 8], [9]], [(7, 8), (9,)]),
    ],
)
async def test_prompt_is_taken_in_each_of_its_forms(api: Any, prompt: Any, ids: Any) -> None:
    await api.submit(prompt=prompt)

    stored = [prompt.token_ids for prompt in api.backend.created[-1].request.prompts]
    assert [len(prompt) for prompt in stored] == [len(prompt) for prompt in ids]
    if not isinstance(prompt, str) and not isinstance(prompt[0], str):
        assert stored == ids


async def test_too_many_prompts_or_sequences_answer_400(backend: Any, start_api: Any) -> None:
    async with start_api(backend, max_prompts=3, max_sequences=4) as api:
        many_prompts = await api.submit(prompt=["a"] * 4)
        many_sequences = await api.submit(prompt=["a"] * 3, n=2)

    assert many_prompts.json()["error"]["param"] == "prompt"
    assert many_sequences.json()["error"]["param"] == "n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"a"',
        b"null",
        b'{"model": NaN}',
        b'{"model": "house/bytes", "prompt": "\xff\xfe"}',
        b'{"model": "house/bytes", "prompt": "\\ud800"}',
        b'{"model": "house/bytes", "prompt": "a"} {}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
    ids=["empty", "half", "list", "string", "null", "nan", "utf8", "surrogate", "two", "deep", "huge", "bom"],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/completions"])
async def test_body_that_is_no_json_object_answers_400(api: Any, path: str, body: bytes) -> None:
    reply = await api.client.post(path, content=body, headers={"Content-Type": "application/json"})

    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "malformed_body"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "nonsense"])
async def test_body_of_another_type_answers_415(api: Any, kind: str) -> None:
    reply = await api.client.post("/v1/jobs", content=json.dumps(api.bodies), headers={"Content-Type": kind})

    assert reply.status_code == 415
    assert reply.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", [None, "application/json; charset=utf-8", "APPLICATION/JSON"])
async def test_body_counts_as_json_when_unsaid(api: Any, kind: str | None) -> None:
    reply = await api.client.post(
        "/v1/jobs", content=json.dumps(api.bodies), headers={"Content-Type": kind} if kind else {}
    )

    assert reply.status_code == 202
