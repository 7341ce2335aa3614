"""Heads normalised, rotated and stored in one op, against the same in float64."""

from __future__ import annotations

import pytest
import torch

import cuda_ops
from cuda_ops.errors import OpInputError
from tests.support.dense_oracle import ROUNDOFF
from tests.support.rotary_write_case import bound_of, make_case

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (7, 6), (17, 2), (256, 256)])
def test_rotary_write_kv_turns_queries_in_place_and_stores_keys_and_values(
    head_dim: int, rotary_dim: int, has_norms: bool, dtype: torch.dtype
) -> None:
    case = make_case(head_dim, rotary_dim, dtype, has_norms=has_norms)
    query, key_cache, value_cache = case.expected()
    key, value = case.key.clone(), case.value.clone()

    case.run()

    assert (case.query.double() - query).abs().max() <= bound_of(query, ROUNDOFF[dtype])
    assert (case.key_cache.double() - key_cache).abs().max() <= bound_of(key_cache, ROUNDOFF[dtype])
    assert torch.equal(case.value_cache.double(), value_cache)
    assert torch.equal(case.key, key)
    assert torch.equal(case.value, value)


def test_rotary_write_kv_without_norms_equals_rotating_and_writing_one_after_the_other() -> None:
    fused, plain = (make_case(64, 64, torch.bfloat16, has_norms=False) for _ in range(2))

    fused.run()
    cuda_ops.rotary_embedding(plain.query, plain.key, plain.cos_sin)
    cuda_ops.write_kv(plain.key, plain.value, plain.key_cache, plain.value_cache, plain.slots)

    assert torch.equal(fused.query, plain.query)
    assert torch.equal(fused.key_cache, plain.key_cache)
    assert torch.equal(fused.value_cache, plain.value_cache)


def test_rotary_write_kv_takes_elements_that_do_not_lie_side_by_side() -> None:
    case = make_case(16, 8, torch.float32, has_norms=True)
    spread = torch.empty(*case.query.shape, 2)[..., 0]
    spread.copy_(case.query)
    query = case.expected()[0]

    cuda_ops.rotary_write_kv(
        spread, case.key, case.value, case.cos_sin, case.key_cache, case.value_cache, case.slots,
        query_weight=case.weights[0], eps=1e-5,
    )  # fmt: skip

    assert (spread.double() - query).abs().max() <= bound_of(query, ROUNDOFF[torch.float32])


def test_rotary_write_kv_refuses_heads_and_tables_that_do_not_fit() -> None:
    case = make_case(16, 8, torch.float32, has_norms=False)
    caches = case.key_cache, case.value_cache, case.slots

    with pytest.raises(OpInputError, match="at most head_dim"):
        cuda_ops.rotary_write_kv(case.query, case.key, case.value, torch.zeros(5, 18), *caches)
    with pytest.raises(OpInputError, match="tokens, head_dim and dtype must be equal"):
        cuda_ops.rotary_write_kv(case.query[:4], case.key, case.value, case.cos_sin, *caches)
    with pytest.raises(OpInputError, match="heads and head_dim must be equal"):
        cuda_ops.rotary_write_kv(case.query, case.key[:, :1], case.value, case.cos_sin, *caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (7, 6)])
def test_rotary_write_kv_rounds_once_into_a_cache_of_float8(
    head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    case = make_case(head_dim, rotary_dim, dtype, has_norms=True).in_float8((0.05, 2.0))
    query, *caches = case.expected()

    case.run()

    assert (case.query.double() - query).abs().max() <= bound_of(query, ROUNDOFF[dtype])
    for cache, exact, scale in zip((case.key_cache, case.value_cache), caches, case.scales, strict=True):
        stored = cache.double() * scale
        # Half a place: a sixteenth of the number, or of the smallest normal one, and sums in float32 before.
        half = (stored.abs().clamp(min=2.0**-6 * scale)) / 16
        assert ((stored - exact).abs() <= half + bound_of(exact, 0.0)).all()
