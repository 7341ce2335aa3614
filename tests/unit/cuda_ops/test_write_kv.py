from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from cuda_ops.errors import OpInputError

torch.set_num_threads(1)


@settings(max_examples=40)
@given(
    num_tokens=st.integers(0, 9),
    num_kv_heads=st.integers(1, 3),
    block_size=st.sampled_from([1, 3, 16]),
    head_dim=st.sampled_from([1, 5, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_write_kv_fills_the_named_slots_and_no_others(
    num_tokens: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    num_blocks = -(-num_tokens // block_size) + 2
    before = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim).to(dtype)
    key_cache, value_cache = before.clone()
    # Keys and values as models pass them: strided slices of one projection.
    projected = torch.randn(num_tokens, 3 * num_kv_heads, head_dim).to(dtype)
    key, value = projected[:, :num_kv_heads], projected[:, -num_kv_heads:]
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]

    cuda_ops.write_kv(key, value, key_cache, value_cache, slots)

    expected = before.clone()
    for token, slot in enumerate(slots.tolist()):
        expected[0, slot // block_size, :, slot % block_size] = key[token]
        expected[1, slot // block_size, :, slot % block_size] = value[token]
    assert torch.equal(key_cache, expected[0])
    assert torch.equal(value_cache, expected[1])


def test_write_kv_refuses_another_dtype_than_the_cache_has() -> None:
    cache = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    key = torch.zeros(1, 1, 8)

    with pytest.raises(OpInputError, match="must be equal"):
        cuda_ops.write_kv(key, key, cache, cache, torch.zeros(1, dtype=torch.int64))
