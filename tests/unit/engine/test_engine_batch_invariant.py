"""With the switch on, a request's numbers are the same to the last bit in any company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_ops import native
from cuda_ops.native import use_kernels
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_cache import KVCacheShape
from engine.outputs import RequestOutput
from engine.placement import check_invariant_attention
from engine.sampling import SamplingParams
from tests.support.kernels import built_levels
from tests.support.model_folders import make_model_folder
from tests.unit.engine.engine_factory import generate, make_engine, random_prompt

PROMPT = random_prompt(45, 1)
PARAMS = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True, logprobs=20)
OTHERS = replace(PARAMS, seed=6, max_tokens=40, logprobs=None)


@pytest.fixture(scope="module", autouse=True)
def _native() -> Iterator[None]:
    built_levels()
    yield
    use_kernels("auto")


@pytest.fixture(scope="module", params=["opt", "gpt2", "gemma3", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(request.param, tmp_path_factory.mktemp(request.param))


def _numbers(output: RequestOutput) -> tuple[object, ...]:
    """All that is told of the logits; equal only where every bit is."""
    return tuple((completion.token_ids, completion.logprobs) for completion in output.completions)


def _run(folder: Path, dtype: str, num_others: int, params: SamplingParams = PARAMS, **config: Any) -> Any:
    engine = make_engine(
        folder,
        **{"dtype": dtype, "is_batch_invariant": True, "max_num_sequences": 64, "num_blocks": 2000} | config,
    )
    others = {f"other {n}": (random_prompt(3 + n % 20, n), OTHERS) for n in range(num_others)}
    return generate(engine, {**others, "own": (PROMPT, params)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_bitwise_the_same_alone_in_any_batch_and_however_the_prompt_is_cut(
    folder: Path, dtype: str
) -> None:
    alone = _numbers(_run(folder, dtype, 0).outputs["own"])

    for num_others in (1, 6, 63):
        assert _numbers(_run(folder, dtype, num_others).outputs["own"]) == alone, num_others
    chunked = {"max_num_sequences": 7, "max_num_batched_tokens": 7}
    assert _numbers(_run(folder, dtype, 6, **chunked).outputs["own"]) == alone


@pytest.mark.parametrize("folder", ["opt"], indirect=True)
def test_logits_are_bitwise_the_same_after_a_preemption_from_the_cache_and_ahead_of_their_turn(
    folder: Path,
) -> None:
    params = replace(PARAMS, logit_bias={5: 100.0, 6: 100.0}, max_tokens=40, n=2)
    alone = _numbers(_run(folder, "bfloat16", 0, params, num_blocks=64).outputs["own"])

    crowded = _run(folder, "bfloat16", 6, params, num_blocks=64)
    ahead = _run(folder, "bfloat16", 3, params, num_speculative_tokens=5)
    engine = make_engine(folder, dtype="bfloat16", is_batch_invariant=True)
    generate(engine, {"before": (PROMPT, OTHERS)})
    cached = generate(engine, {"own": (PROMPT, params)})

    assert crowded.outputs["own"].phases.num_preemptions > 0
    assert ahead.outputs["own"].phases.num_accepted_tokens > 0
    assert cached.outputs["own"].usage.cached_tokens > 0
    for run in (crowded, ahead, cached):
        assert _numbers(run.outputs["own"]) == alone


def test_tokens_are_those_of_the_engine_without_the_switch(folder: Path) -> None:
    with_switch = _run(folder, "float32", 3)
    without = _run(folder, "float32", 3, is_batch_invariant=False)

    assert with_switch.tokens("own") == without.tokens("own")


@pytest.mark.parametrize("folder", ["opt"], indirect=True)
def test_beams_are_ranked_the_same_in_any_company(folder: Path) -> None:
    beams = SamplingParams(max_tokens=8, use_beam_search=True, n=3, logprobs=3, ignore_eos=True)
    alone = _numbers(_run(folder, "bfloat16", 0, beams).outputs["own"])

    assert _numbers(_run(folder, "bfloat16", 6, beams).outputs["own"]) == alone


def test_switch_is_refused_where_it_cannot_hold(
    opt_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^is_batch_invariant=True: must be off with decode_graphs"):
        EngineConfig(model="folder", device="cuda", decode_graphs="on", is_batch_invariant=True)
    with pytest.raises(ConfigError, match=r"^is_batch_invariant=True: needs native"):
        make_engine(opt_folder, kernels="reference", is_batch_invariant=True)
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "nothing.so")
    with pytest.raises(ConfigError, match="not built"):
        make_engine(opt_folder, is_batch_invariant=True)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"),
    [(64, 16, torch.float32), (72, 16, torch.bfloat16), (64, 8, torch.bfloat16)],
)
def test_switch_is_refused_on_a_gpu_where_attention_has_no_kernel(
    head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    served = KVCacheShape(2, 4, 128, 16, torch.bfloat16)
    shape = replace(served, head_dim=head_dim, block_size=block_size, dtype=dtype)

    check_invariant_attention(served, torch.bfloat16)
    check_invariant_attention(replace(served, dtype=torch.float8_e4m3fn), torch.bfloat16)
    with pytest.raises(ConfigError, match=rf"paged_attention_decode .* {dtype}, heads of {head_dim} and"):
        check_invariant_attention(shape, dtype)
