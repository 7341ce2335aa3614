"""The API must not import the engine, so their rules are two texts; these tests hold them together."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api import schemas
from api.bodies import validate
from api.errors import ApiError
from api.sampling import FIELDS, to_sampling
from api.schemas import CompletionBody
from engine import sampling as engine_sampling
from engine.admission import ModelInfo, check_request
from engine.sampling import SamplingParams, StructuredOutput
from jobs.model import Prompt
from tests.support.job_factory import model_card
from workers.attempts.attempt import sampling_params

CARD = model_card(name="m", vocab_size=50, max_num_sequences=130)
INFO = ModelInfo(
    architecture="OPTForCausalLM",
    vocab_size=50,
    max_model_len=64,
    eos_token_ids=(2,),
    dtype="float32",
    device="cpu",
    num_parameters=1,
    num_blocks=100_000,
    block_size=16,
    max_num_sequences=130,
    tokenizer=None,  # type: ignore[arg-type]  # not looked at by the checks
)

EDGES = [
    *(sign * (2**power + step) for sign in (1, -1) for power in (31, 63, 64) for step in (-1, 0, 1)),
    *(sign * number for sign in (1, -1) for number in (0, 0.0, 1e-300, 0.5, 1, 1.0, 1.01, 2, 2.01, 1e300)),
    *(sign * number for sign in (1, -1) for number in (3, 19, 20, 21, 48, 49, 50, 63, 64, 100, 101)),
    *(127, 128, 129, 130, 131, float("nan"), float("inf")),
]
around_zero = st.sampled_from(EDGES)
numbers = around_zero | st.integers(-5, 200) | st.floats(allow_nan=True, allow_infinity=True)
loose = numbers | numbers.map(str) | st.booleans() | st.sampled_from(["true", "no", "", "1e3"]) | st.none()
token_lists = st.lists(st.integers(-2, 55) | loose, max_size=3)
values = {
    **{name: loose for name in FIELDS},
    "max_tokens": loose | st.integers(1, 20),
    "n": loose | st.integers(1, 130),
    "best_of": loose | st.integers(1, 130),
    "temperature": loose | st.floats(0, 2),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=3) | st.lists(loose, max_size=17),
    "bad_words": st.text(max_size=3)
    | st.lists(st.text(max_size=2), max_size=3)
    | st.lists(loose, max_size=3),
    "stop_token_ids": token_lists,
    "structured_outputs": st.dictionaries(
        st.sampled_from(["json", "regex", "choice", "grammar", "json_object"]),
        loose | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2),
        max_size=2,
    ),
    "logit_bias": st.dictionaries(st.integers(-2, 55).map(str) | st.text(max_size=2), loose, max_size=3),
}
# Few fields at a time, so that most documents are accepted and get as far as the engine.
bodies = st.lists(st.sampled_from(sorted(values)), max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values[name] for name in names})
)
prompts = st.lists(st.integers(1, 63).map(lambda n: Prompt(token_ids=(1,) * n)), min_size=1, max_size=3)


def check_agreement(document: dict[str, Any], stored: list[Prompt]) -> None:
    """Refused by the API, or taken by the engine."""
    try:
        sampling = to_sampling(_validated({"model": "m", "prompt": "unused", **document}), CARD, stored)
    except ApiError:
        return
    params = sampling_params(json.loads(json.dumps(sampling, allow_nan=False)))
    for prompt in stored:
        check_request(INFO, prompt.token_ids, params)


@given(document=bodies, stored=prompts)
@settings(max_examples=500)
def test_whatever_the_api_accepts_the_engine_accepts(document: dict[str, Any], stored: list[Prompt]) -> None:
    check_agreement(document, stored)


@pytest.mark.parametrize("name", sorted(values))
def test_no_edge_of_a_range_is_wider_than_the_engines(name: str) -> None:
    for edge in EDGES:
        for value in (edge, str(edge), [edge], {str(edge): 1}, {"1": edge}):
            check_agreement({name: value}, [Prompt(token_ids=(1, 1))])
            check_agreement({name: value, "echo": True}, [Prompt(token_ids=(1,) * 63)])


def test_every_parameter_of_the_engine_can_be_asked_for_and_no_other() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} == {*FIELDS, "max_tokens"}


def test_defaults_and_limits_are_the_engines() -> None:
    assert SamplingParams().max_tokens == schemas.DEFAULT_MAX_TOKENS
    assert schemas.MAX_COMPLETIONS == engine_sampling.MAX_SEQUENCES_PER_REQUEST
    assert CARD.max_logprobs == engine_sampling.MAX_TOP_LOGPROBS


def test_what_the_client_gave_reaches_the_engine_by_its_name() -> None:
    given_fields: dict[str, Any] = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "n": 2,
        "best_of": 4,
        "use_beam_search": True,
        "length_penalty": 0.8,
        "early_stopping": True,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "logprobs": 3,
        "echo": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "bad_words": ["c", "d"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {"9": -5.0},
    }

    sampling = to_sampling(
        _validated({"model": "m", "prompt": "x", **given_fields}), CARD, [Prompt(token_ids=(1,))]
    )

    assert sampling == given_fields
    params = sampling_params(sampling)
    assert params.bad_words == ("c", "d")
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a", "b"), (4,), {9: -5.0})


def test_what_the_output_must_follow_reaches_the_engine() -> None:
    body = _validated({"model": "m", "prompt": "x", "structured_outputs": {"choice": ["a", "b"]}})

    params = sampling_params(to_sampling(body, CARD, [Prompt(token_ids=(1,))]))

    assert params.structured_outputs == StructuredOutput("choice", '["a", "b"]')


def _validated(document: dict[str, Any]) -> CompletionBody:
    return validate(CompletionBody, document)
