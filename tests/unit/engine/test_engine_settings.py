from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError, InvalidRequestError, ModelLoadError
from engine.sampling import SamplingParams, StructuredOutput

POLICY_MODULES = (
    "admission",
    "beam",
    "beam_progress",
    "block_manager",
    "config",
    "detokenizer",
    "errors",
    "outputs",
    "progress",
    "sampled_progress",
    "sampling",
    "scheduler",
    "sequence",
    "speculation",
    "stats",
    "stop",
    "text",
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("device", "cuda:-1"),
        ("gpu_memory_share", 0),
        ("tensor_parallel_size", 0),
        ("gpu_memory_share", 1.5),
        ("decode_graphs", "yes"),
        ("kernels", "fast"),
        ("block_size", 0),
        ("num_blocks", -1),
        ("kv_cache_bytes", 1.5),
        ("max_num_sequences", True),
        ("max_num_batched_tokens", 255),
        ("max_model_len", 0),
        ("num_threads", 0),
        ("num_speculative_tokens", -1),
    ],
)
def test_engine_config_names_field_value_and_rule_of_a_bad_setting(field: str, value: object) -> None:
    fields: dict[str, Any] = {"model": "folder", field: value}

    with pytest.raises(ConfigError, match=f"^{field}={value!r}: must be") as caught:
        EngineConfig(**fields)

    assert (caught.value.field, caught.value.value) == (field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "8"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 2.0),
        ("seed", 1 << 63),
        ("n", 0),
        ("n", 129),
        ("best_of", 0),
        ("length_penalty", float("inf")),
        ("stop", ("a", "")),
        ("stop", "abc"),
        ("stop_token_ids", (-1,)),
        ("logprobs", 21),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("logit_bias", {1: 101.0}),
    ],
)
def test_sampling_params_refuse_a_value_out_of_range(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]  # wrong types are the point

    assert caught.value.field == field


def test_sampling_params_refuse_best_of_below_n() -> None:
    with pytest.raises(InvalidRequestError, match="best_of=2: must be a whole number of at least 3"):
        SamplingParams(n=3, best_of=2)


# Nothing that any field takes, but for the one number that a length penalty may be.
_NONSENSE: tuple[Any, ...] = (object(), "nonsense", float("nan"), [object()], -7.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field.name, value)
        for field in fields(SamplingParams)
        for value in _NONSENSE
        if (field.name, value) != ("length_penalty", -7.5)
    ],
)
def test_sampling_params_refuse_nonsense_by_the_name_of_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]  # wrong types are the point

    assert caught.value.field == field


@pytest.mark.parametrize("value", [1, 0, "yes", None])
@pytest.mark.parametrize(
    "field",
    [field.name for field in fields(SamplingParams) if isinstance(field.default, bool)],
)
def test_sampling_params_take_only_true_and_false_for_a_switch(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match="must be true or false") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]  # as above

    assert caught.value.field == field


@pytest.mark.parametrize(
    "structure",
    [StructuredOutput("regex", ""), StructuredOutput("xml", "a"), StructuredOutput("regex", 3)],  # type: ignore[arg-type]  # as above
)
def test_sampling_params_refuse_a_structure_of_no_kind_or_text(structure: StructuredOutput) -> None:
    with pytest.raises(InvalidRequestError, match="must be a text of one of the kinds"):
        SamplingParams(structured_outputs=structure)


@pytest.mark.parametrize(
    "error", [ConfigError("f", 1, "r"), InvalidRequestError("f", "v", "r"), ModelLoadError("s", "p")]
)
def test_engine_error_survives_pickling(error: EngineError) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


def test_policy_modules_import_no_torch() -> None:
    imports = "; ".join(f"import engine.{name}" for name in POLICY_MODULES)
    code = f"{imports}; import sys; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
