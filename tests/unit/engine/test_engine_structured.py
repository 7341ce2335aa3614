"""Random weights say anything; whatever comes out must follow the structure all the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.core import Engine
from engine.errors import InvalidRequestError
from engine.outputs import Completion
from engine.sampling import SamplingParams, StructuredOutput
from tests.unit.engine.engine_factory import Run, generate, make_engine, random_prompt, run_to_end

FREE = SamplingParams(max_tokens=200, temperature=1.0, seed=1)
PROMPT = random_prompt(9)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def follow(kind: Any, text: str, **fields: Any) -> SamplingParams:
    return replace(FREE, structured_outputs=StructuredOutput(kind, text), **fields)


def completions(engine: Engine, params: SamplingParams) -> tuple[Completion, ...]:
    output = generate(engine, {"r": (PROMPT, params)}).outputs["r"]
    assert output.failure is None
    return output.completions


@pytest.fixture(scope="module")
def engine(opt_folder: Path) -> Engine:
    return make_engine(opt_folder, num_blocks=2000)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_follows_its_schema(engine: Engine, temperature: float) -> None:
    for seed in range(4):
        params = follow("json_schema", json.dumps(PERSON), temperature=temperature, seed=seed)
        (completion,) = completions(engine, params)

        assert completion.finish_reason == "stop", completion.text
        jsonschema.validate(json.loads(completion.text), PERSON)


@pytest.mark.parametrize("expression", [r"[a-f]{3}-\d{2,4}", r"(yes|no)!", r"\d+(\.\d{1,2})? EUR"])
def test_text_matches_its_expression(engine: Engine, expression: str) -> None:
    for seed in range(4):
        (completion,) = completions(engine, follow("regex", expression, seed=seed))

        assert completion.finish_reason == "stop", completion.text
        assert re.fullmatch(expression, completion.text)


def test_text_is_one_of_the_choices_and_each_can_come(engine: Engine) -> None:
    choices = ["red", "grün", "blue", 'blue "ish"']
    params = follow("choice", json.dumps(choices), temperature=3.0, n=16)

    texts = [completion.text for completion in completions(engine, params)]

    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1


def test_text_follows_a_grammar(engine: Engine) -> None:
    params = follow("grammar", 'start: "(" start ")" | "x"', temperature=2.0, n=8)

    for completion in completions(engine, params):
        assert re.fullmatch(r"\(*x\)*", completion.text)
        assert completion.finish_reason == "length" or completion.text.count("(") == completion.text.count(
            ")"
        )


def test_output_ends_with_its_structure_and_spends_no_token_on_the_end(engine: Engine) -> None:
    (completion,) = completions(engine, follow("regex", "ab"))

    assert completion.text == "ab"
    assert engine.model_info.tokenizer.decode(completion.token_ids, skip_special_tokens=False) == "ab"
    assert completion.finish_reason == "stop"


def test_structured_and_free_requests_share_a_batch_and_neither_changes_the_other(opt_folder: Path) -> None:
    both = generate(
        make_engine(opt_folder), {"free": (PROMPT, FREE), "held": (PROMPT, follow("regex", "[a-z]{30}"))}
    )
    alone = generate(make_engine(opt_folder), {"free": (PROMPT, FREE)})
    held = generate(make_engine(opt_folder), {"held": (PROMPT, follow("regex", "[a-z]{30}"))})

    assert both.tokens("free") == alone.tokens("free")
    assert both.tokens("held") == held.tokens("held")
    assert max(step.stats.batch_size for step in both.steps) == 2


def test_a_preempted_request_goes_on_in_its_structure(opt_folder: Path) -> None:
    params = follow("regex", "[a-z ]{60,80}", n=2, max_tokens=100)
    calm = generate(make_engine(opt_folder), {"r": (PROMPT, params)})
    tight = make_engine(opt_folder, num_blocks=56)
    run = Run()
    for name in "rstuvw":
        tight.add_request(name, PROMPT, params)
    run_to_end(tight, run)

    assert sum(output.phases.num_preemptions for output in run.outputs.values()) > 0
    assert {tuple(run.tokens(name)) for name in "rstuvw"} == {tuple(calm.tokens("r"))}


def test_a_model_with_a_larger_vocabulary_than_its_tokenizer_follows_too(tmp_path: Path) -> None:
    from tests.support.model_folders import make_model_folder

    folder = make_model_folder("opt", tmp_path / "model", vocab_size=411)
    (completion,) = completions(make_engine(folder), follow("regex", r"\d{5}"))

    assert re.fullmatch(r"\d{5}", completion.text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("json_schema", '{"type": "objekt"}'), ("regex", "["), ("grammar", "start: nothing"), ("choice", "7")],
)
def test_engine_refuses_a_structure_that_makes_no_sense(engine: Engine, kind: Any, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        engine.add_request("bad", PROMPT, follow(kind, text))

    assert not engine.has_work()


@pytest.mark.parametrize(
    "fields",
    [{"use_beam_search": True, "n": 2}, {"bad_words": ("a",)}, {"min_tokens": 3}, {"ignore_eos": True}],
)
def test_parameters_refuse_what_could_contradict_a_structure(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be combined"):
        follow("regex", "a", **fields)
