"""Two processes that share a model, over gloo on the CPU, give what one gives."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.core import Engine
from engine.errors import ConfigError, ModelLoadError, RankError, StepError
from engine.loading import load_for
from engine.sampling import SamplingParams
from engine.shard import Shard
from tests.support.model_folders import ModelKind, make_model_folder
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt, run_to_end

# As many heads and columns as two ranks need, and an odd vocabulary, which does not come out even.
SHAPES: dict[ModelKind, dict[str, Any]] = {
    "opt": {"num_attention_heads": 4, "vocab_size": 385},
    "gpt2": {"n_head": 4, "vocab_size": 385},
    "qwen3": {"vocab_size": 385},
    "gemma3": {},
}
SCORED = replace(GREEDY, max_tokens=4, logprobs=5, prompt_logprobs=0)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=3, n=2, ignore_eos=True)
REQUESTS = {
    **{f"greedy {n}": (random_prompt(4 + 9 * n, n), GREEDY) for n in range(5)},
    "scored": (random_prompt(20, 9), SCORED),
    "sampled": (random_prompt(12, 10), SAMPLED),
}


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Iterator[list[Engine]]:
    """Engines put here are closed, whatever becomes of the test."""
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("kind", SHAPES)
def test_two_ranks_give_the_tokens_and_numbers_of_one(
    kind: ModelKind, tmp_path: Path, shared: list[Engine]
) -> None:
    folder = make_model_folder(kind, tmp_path / kind, **SHAPES[kind])
    whole = make_engine(folder, num_threads=1)
    config = {"async_steps": "on", "decode_graphs": "on"} if kind in ("opt", "qwen3") else {}
    shared.append(make_engine(folder, num_threads=1, tensor_parallel_size=2, **config))

    alone, together = generate(whole, REQUESTS), generate(shared[0], REQUESTS)

    for id in REQUESTS:
        assert together.tokens(id) == alone.tokens(id), id
    ours, theirs = (run.outputs["scored"].completions[0].logprobs for run in (together, alone))
    assert ours is not None
    assert theirs is not None
    assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-3)
    assert shared[0].model_info.num_parameters == whole.model_info.num_parameters


def test_a_rank_that_dies_ends_the_engine_and_is_named(tmp_path: Path, shared: list[Engine]) -> None:
    folder = make_model_folder("qwen3", tmp_path / "qwen3")
    shared.append(make_engine(folder, num_threads=1, tensor_parallel_size=2))
    engine = shared[0]
    engine.add_request("r", random_prompt(5), GREEDY)
    engine.step()
    assert engine._ranks is not None
    other = engine._ranks._others[0].process

    os.kill(other.pid, signal.SIGKILL)

    with pytest.raises(RankError, match="rank 1 of 2 ended with signal 9"):
        run_to_end(engine)
    with pytest.raises(StepError, match="earlier step"):
        engine.step()


def test_ranks_end_with_their_engine(tmp_path: Path, shared: list[Engine]) -> None:
    folder = make_model_folder("qwen3", tmp_path / "qwen3")
    shared.append(make_engine(folder, num_threads=1, tensor_parallel_size=2))
    ranks = shared[0]._ranks
    assert ranks is not None

    shared[0].close()

    assert ranks._others[0].process.poll() is not None


@pytest.mark.parametrize(
    ("kind", "size", "rule"),
    [
        ("llama", 4, "num_heads, 6"),
        ("llama", 3, "num_kv_heads, 2"),
        ("opt", 2, "num_heads, 3"),
    ],
)
def test_a_model_whose_heads_do_not_divide_is_refused(
    kind: ModelKind, size: int, rule: str, opt_folder: Path, llama_folder: Path
) -> None:
    folder = {"llama": llama_folder, "opt": opt_folder}[kind]

    with pytest.raises(ConfigError, match=f"^tensor_parallel_size={size}: .*{rule}"):
        load_for(EngineConfig(model=str(folder), tensor_parallel_size=size), shard=Shard(0, size))


def _open(folder: Path, shard: Shard) -> Checkpoint:
    return Checkpoint.open(
        folder, name_prefix="model.", dtype=torch.float32, device=torch.device("cpu"), shard=shard
    )


def test_shares_of_a_tensor_are_all_of_it_and_only_they_are_read(llama_folder: Path) -> None:
    name = "layers.0.mlp.down_proj.weight"
    whole = _open(llama_folder, Shard()).take(name, 48, 80)
    num_bytes: list[int] = []
    shares: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for axis in (0, 1):
        for rank in range(2):
            checkpoint = _open(llama_folder, Shard(rank, 2))
            checkpoint.on_read = num_bytes.append
            shares[axis].append(checkpoint.take_split(name, 48, 80, axis=axis))

    for axis in (0, 1):
        assert torch.equal(torch.cat(shares[axis], dim=axis), whole)
    assert num_bytes == [whole.nbytes // 2] * 4
    with pytest.raises(ModelLoadError, match=r"has shape \[48, 80\], the config asks for \[48, 82\]"):
        _open(llama_folder, Shard(0, 2)).take_split(name, 48, 82, axis=1)


def test_shares_of_a_vocabulary_are_its_rows_in_order_and_zeros_behind(llama_folder: Path) -> None:
    name = "embed_tokens.weight"
    whole = _open(llama_folder, Shard()).take(name, 384, 48)
    shares = [_open(llama_folder, Shard(rank, 5)).take_vocabulary(name, 384, 48) for rank in range(5)]

    rows = torch.cat(shares)
    assert torch.equal(rows[:384], whole)
    assert not rows[384:].any()
