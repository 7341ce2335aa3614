from __future__ import annotations

import json
from typing import Any

import pytest

PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"structured_outputs": {"json": PERSON}}, "json_schema", json.dumps(PERSON)),
        ({"structured_outputs": {"json": json.dumps(PERSON)}}, "json_schema", json.dumps(PERSON)),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", '["yes", "no"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
            "json_schema",
            json.dumps(PERSON),
        ),
    ],
)
async def test_structure_is_stored_in_one_form_whoever_names_it(
    api: Any, fields: dict[str, Any], kind: str, text: str
) -> None:
    reply = await api.submit(**fields)

    assert reply.status_code == 202, reply.text
    (job,) = api.backend.created
    assert job.request.sampling["structured_outputs"] == {"kind": kind, "text": text}


async def test_response_format_text_asks_for_nothing(api: Any) -> None:
    reply = await api.submit(response_format={"type": "text"})

    assert reply.status_code == 202
    assert "structured_outputs" not in api.backend.created[0].request.sampling


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"structured_outputs": {"json": {"type": "objekt"}}}, "structured_outputs", "objekt"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "json schema"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs", "unknown name"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", ""),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs", "65536"),
        ({"structured_outputs": {"json": {"enum": ["a" * 70_000]}}}, "structured_outputs", "65536"),
        ({"response_format": {"type": "xml"}}, "response_format", ""),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
            "left out",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "cannot be combined"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens", "cannot be combined"),
        ({"structured_outputs": {"regex": "a"}, "bad_words": ["b"]}, "bad_words", "cannot be combined"),
        (
            {"structured_outputs": {"regex": "a"}, "use_beam_search": True, "n": 2},
            "use_beam_search",
            "cannot be combined",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
async def test_structure_that_cannot_be_followed_is_refused_before_the_queue(
    api: Any, fields: dict[str, Any], param: str, said: str
) -> None:
    reply = await api.submit(**fields)

    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["param"] == param
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert api.backend.created == []


async def test_large_structure_is_tried_without_holding_up_others(api: Any) -> None:
    schema = {"type": "object", "properties": {f"field{i}": {"type": "integer"} for i in range(300)}}

    reply = await api.submit(structured_outputs={"json": schema})

    assert reply.status_code == 202, reply.text
