"""Keys and values in float8: rounded and nothing else, in half the memory, refused by name elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cuda_ops
from cuda_ops.native import use_kernels
from engine.attention import AttentionMetadata
from engine.cache_scales import take_cache_scales
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelLoadError
from engine.kv_cache import KVCache, KVCacheShape
from engine.weights import load_model
from tests.unit.engine.engine_factory import GREEDY, generate, make_engine, random_prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(llama_folder: Path) -> Path:
    return llama_folder


def with_scales(folder: Path, target: Path, scales: dict[str, torch.Tensor]) -> Path:
    """A copy of the model whose attention layers' caches have scales."""
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | scales, target / "model.safetensors")
    return target


def logits_of(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Of a prompt of 37 tokens in chunks of 20 and 16, then one token, `[37, vocab_size]`."""
    use_kernels("auto")
    model = load_model(str(folder), dtype=torch.float32, device=CPU).model
    config = model.config
    cache = KVCache(KVCacheShape(config.num_layers, config.num_kv_heads, config.head_dim, 8, dtype), 6, CPU)
    text = torch.tensor(random_prompt(37))
    table = torch.tensor([[4, 1, 5, 0, 2]], dtype=torch.int32)
    parts = []
    for start, end in ((0, 20), (20, 36), (36, 37)):
        positions = torch.arange(start, end)
        metadata = AttentionMetadata(
            query_start=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=table,
            slot_mapping=table[0, positions // 8].long() * 8 + positions % 8,
            max_query_len=end - start,
            max_context_len=end,
            num_decode_sequences=int(end - start == 1),
        )
        with torch.inference_mode():
            hidden = model.forward(text[start:end], positions, cache.layers, metadata)
            parts.append(model.compute_logits(hidden))
    return torch.cat(parts)


class RoundingCache:
    """Takes the place of the op that writes: float32 caches get what float8 numbers by these scales are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scales: tuple[float, float]) -> None:
        self._write, self._scales = cuda_ops.rotary_write_kv, scales
        monkeypatch.setattr(cuda_ops, "rotary_write_kv", self)

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        *heads, key_cache, value_cache, slots = arguments
        own = [torch.zeros_like(cache, dtype=torch.float8_e4m3fn) for cache in (key_cache, value_cache)]
        self._write(*heads, *own, slots, **keywords | {"scales": self._scales})
        places = slots // key_cache.shape[2], slots % key_cache.shape[2]
        for cache, rounded, scale in zip((key_cache, value_cache), own, self._scales, strict=True):
            cache[places[0], :, places[1]] = rounded.float()[places[0], :, places[1]] * scale


def test_logits_over_a_float8_cache_are_those_of_rounded_keys_and_values(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = logits_of(folder, torch.float8_e4m3fn)
    exact = logits_of(folder, torch.float32)

    RoundingCache(monkeypatch, (1.0, 1.0))
    expected = logits_of(folder, torch.float32)

    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert (actual - exact).abs().max() > 0.01, "nothing was rounded"


def test_scales_of_the_checkpoint_say_what_a_number_of_the_cache_stands_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    scales = {
        f"model.layers.{layer}.self_attn.{name}": torch.tensor(value)
        for layer in range(num_layers)
        for name, value in (("k_scale", 0.07), ("v_proj.v_scale", 0.3))
    }
    scaled = with_scales(folder, tmp_path, scales)
    exact = logits_of(folder, torch.float32)

    actual = logits_of(scaled, torch.float8_e4m3fn)

    assert torch.equal(logits_of(scaled, torch.float32), exact), "they are of a float8 cache alone"
    RoundingCache(monkeypatch, (0.07, 0.3))
    torch.testing.assert_close(actual, logits_of(folder, torch.float32), rtol=1e-3, atol=1e-3)


def test_engine_serves_from_a_float8_cache_of_half_the_memory(folder: Path) -> None:
    requests = {str(length): (random_prompt(length), GREEDY) for length in (3, 20, 41)}
    bfloat16, float8 = (
        make_engine(folder, dtype="bfloat16", kv_cache_dtype=dtype, num_blocks=None, kv_cache_bytes=1 << 16)
        for dtype in ("auto", "fp8")
    )

    run = generate(float8, requests)

    assert all(run.tokens(name) for name in requests)
    assert float8._blocks.num_blocks // 2 == bfloat16._blocks.num_blocks
    again = generate(make_engine(folder, dtype="bfloat16", kv_cache_dtype="fp8"), requests)
    assert [again.tokens(name) for name in requests] == [run.tokens(name) for name in requests]


def test_engine_copies_blocks_of_float8_when_sequences_part(folder: Path) -> None:
    under_test = make_engine(folder, kv_cache_dtype="fp8")
    params = replace(GREEDY, n=3, temperature=1.0, seed=5)

    run = generate(under_test, {"a": (random_prompt(9), params)})

    assert len(run.outputs["a"].completions) == 3
    assert under_test._blocks.num_used == 0


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor([1.0, 2.0]), r"k_scale is \[2\]: must be one finite number above 0"),
        (torch.tensor(0.0), r"k_scale is 0.0: must be one finite number above 0"),
        (torch.tensor(float("nan")), "k_scale is nan: must be one"),
    ],
)
def test_a_scale_that_is_no_single_number_above_0_is_refused_by_name(
    scale: torch.Tensor, message: str, folder: Path, tmp_path: Path
) -> None:
    broken = with_scales(folder, tmp_path, {"model.layers.1.self_attn.k_scale": scale})

    with pytest.raises(ModelLoadError, match=message):
        load_model(str(broken), dtype=torch.float32, device=CPU)


def test_old_checkpoints_have_one_scale_for_keys_and_values(tmp_path: Path) -> None:
    save_file(
        {"a.kv_scale": torch.tensor([0.5]), "b.attn.v_scale": torch.tensor(3.0)},
        tmp_path / "model.safetensors",
    )
    checkpoint = Checkpoint.open(tmp_path, name_prefix="", dtype=torch.float32, device=CPU)

    assert take_cache_scales(checkpoint, "a") == (0.5, 0.5)
    assert take_cache_scales(checkpoint, "b") == (1.0, 3.0)
    assert take_cache_scales(checkpoint, "c") == (1.0, 1.0)


def test_float8_cache_is_refused_by_name_where_bits_must_not_depend_on_the_batch_of_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"^kv_cache_dtype='fp8': must be auto with is_batch_invariant"):
        EngineConfig(model="folder", kv_cache_dtype="fp8", is_batch_invariant=True)
    with pytest.raises(ConfigError, match=r"^kv_cache_dtype='e5m2': must be one of auto, fp8"):
        EngineConfig(model="folder", kv_cache_dtype="e5m2")  # type: ignore[arg-type]
    EngineConfig(model="folder", device="cuda", kv_cache_dtype="fp8", is_batch_invariant=True)
