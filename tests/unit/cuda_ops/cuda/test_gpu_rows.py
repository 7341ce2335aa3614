"""Row kernels, emulated and on a GPU, against their meaning in float32 or wider."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import reference, reference_eight_bits
from cuda_ops.cuda.launcher import Launcher
from tests.support.dense_oracle import ROUNDOFF

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, odd rows, whole runs (48 and 1024 alone), more than a block's threads have in one round.
SIZES = [1, 7, 48, 769, 1024]
EPS = 1e-5

pytestmark = pytest.mark.usefixtures("launcher")


def make_rows(num_rows: int, size: int, dtype: torch.dtype, *, gap: int = 8) -> Tensor:
    """Rows that are a strided slice, with an offset from zero."""
    torch.manual_seed(size)
    return (torch.randn(num_rows, size + gap) * 3 + 1).to(dtype)[:, gap:]


def exact_gelu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)) * up


def assert_rounded_once(actual: Tensor, exact: Tensor, num_terms: int = 8, slack: float = 0.0) -> None:
    """Each element is the exact one, but for one rounding and float32 sums of `num_terms`."""
    exact = exact.double()
    relative = ROUNDOFF[actual.dtype] * (1 + 2**-7) + num_terms * ROUNDOFF[torch.float32]
    # Results below the normal numbers of float16 are rounded to its smallest step.
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    assert actual.is_contiguous()
    assert ((actual.double() - exact).abs() <= exact.abs() * relative + smallest + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gated_activations_equal_their_meaning(size: int, dtype: torch.dtype) -> None:
    x = make_rows(3, 2 * size, dtype)

    # A GPU's fast exponential is off by 2 + 1.16 |x| units in the last place, a unit being two roundoffs; x
    # is below 16. GELU's exponent is a cubic of up to 88, where results end at float32's smallest numbers; a
    # few roundings of it are magnified by as much as it is large.
    assert_rounded_once(cuda_ops.silu_and_mul(x), reference.silu_and_mul(x.double()), 48)
    assert_rounded_once(cuda_ops.gelu_and_mul(x), exact_gelu_and_mul(x.double()), 4 * 88, slack=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norms_equal_their_meaning(size: int, dtype: torch.dtype) -> None:
    x, weight, bias = make_rows(3, size, dtype), torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    # With one element the variance is rounding alone, which 1 / sqrt(eps) magnifies.
    slack = float(weight.abs().max()) * 32 * ROUNDOFF[torch.float32] * (EPS**-0.5 + size)

    assert_rounded_once(
        cuda_ops.rms_norm(x, weight, EPS), reference.rms_norm(x.float(), weight.float(), EPS), size + 16
    )
    for some_weight, some_bias in ((weight, bias), (weight, None), (None, None)):
        wide = [None if part is None else part.double() for part in (some_weight, some_bias)]
        assert_rounded_once(
            cuda_ops.layer_norm(x, some_weight, some_bias, EPS),
            reference.layer_norm(x.double(), *wide, EPS),
            size + 16,
            slack,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_adding_norms_round_the_sum_into_the_residual_and_normalise_it(norm: str, dtype: torch.dtype) -> None:
    x, residual = make_rows(3, 96, dtype), make_rows(3, 96, dtype, gap=16)
    weight, total = torch.randn(96).to(dtype), residual + x

    if norm == "rms":
        normed, alone = cuda_ops.add_rms_norm(x, residual, weight, EPS), cuda_ops.rms_norm(total, weight, EPS)
    else:
        normed = cuda_ops.add_layer_norm(x, residual, weight, None, EPS)
        alone = cuda_ops.layer_norm(total, weight, None, EPS)

    assert torch.equal(residual, total)
    assert torch.equal(normed, alone)


@pytest.mark.parametrize("head_dim", [16, 33])
def test_rms_norm_of_heads_takes_them_where_they_lie(head_dim: int) -> None:
    projected = torch.randn(4, 7, head_dim).bfloat16()
    heads, weight = projected[:, 2:5], torch.randn(head_dim).bfloat16()

    normed = cuda_ops.rms_norm(heads, weight, EPS)

    assert_rounded_once(normed, reference.rms_norm(heads.float(), weight.float(), EPS), head_dim + 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (80, 32), (7, 6), (64, 64)])
def test_rotary_embedding_equals_its_meaning_on_slices_of_a_projection(
    head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    projected = torch.randn(5, 9, head_dim).to(dtype)
    angles = torch.randn(5, rotary_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    expected = projected.clone()
    reference.rotary_embedding(expected[:, :4], expected[:, 4:6], cos_sin)

    cuda_ops.rotary_embedding(projected[:, :4], projected[:, 4:6], cos_sin)

    # Two products and a sum in float32 on both sides, which may fall to either side of a rounding.
    bound = 4 * float(projected.abs().max()) * (ROUNDOFF[dtype] + 4 * ROUNDOFF[torch.float32])
    assert (projected.double() - expected.double()).abs().max() <= bound
    assert torch.equal(projected[:, 6:], expected[:, 6:])
    assert torch.equal(projected[:, :6, rotary_dim:], expected[:, :6, rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (5, 3), (80, 1)])
def test_write_kv_fills_the_named_slots_and_skips_rows_that_only_fill_up(
    head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    projected = torch.randn(6, 6, head_dim).to(dtype)
    key, value = projected[:, :2], projected[:, 4:]
    caches = [torch.randn(7, 2, block_size, head_dim).to(dtype) for _ in range(2)]
    slots = torch.randperm(7 * block_size)[:6]
    expected = [cache.clone() for cache in caches]
    kept = [0, 1, 3, 4]
    reference.write_kv(key[kept], value[kept], expected[0], expected[1], slots[kept])
    slots[2] = slots[5] = -1

    cuda_ops.write_kv(key, value, caches[0], caches[1], slots)

    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (5, 3)])
def test_write_kv_rounds_to_float8_by_the_scales_of_the_cache(
    head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    projected = torch.randn(6, 6, head_dim).to(dtype) * 100
    key, value = projected[:, :2], projected[:, 4:]
    caches = torch.randn(2, 7, 2, block_size, head_dim).to(torch.float8_e4m3fn).unbind()
    expected = [cache.clone() for cache in caches]
    slots = torch.randperm(7 * block_size)[:6]
    scales = (0.3, 7.0)
    reference_eight_bits.write_kv_float8(key[1:], value[1:], *expected, slots[1:], *scales)
    slots[0] = -1

    cuda_ops.write_kv(key, value, *caches, slots, scales=scales)

    assert (expected[0].float().abs() == 448).any(), "something is too large for a float8"
    for cache, meant in zip(caches, expected, strict=True):
        assert torch.equal(cache.view(torch.uint8), meant.view(torch.uint8))


@pytest.mark.parametrize(
    "call",
    [
        lambda: cuda_ops.silu_and_mul(torch.zeros(0, 8)),
        lambda: cuda_ops.rms_norm(torch.zeros(0, 8), torch.ones(8), EPS),
        lambda: cuda_ops.rms_norm(torch.ones(1, 40_000), torch.ones(40_000), EPS),
        lambda: cuda_ops.silu_and_mul(torch.ones(2, 8, dtype=torch.float64)),
        lambda: cuda_ops.rotary_embedding(torch.zeros(0, 2, 8), torch.zeros(0, 2, 8), torch.zeros(0, 8)),
    ],
)
def test_calls_with_nothing_to_do_or_nothing_compiled_launch_nothing(
    call: Callable[[], object], launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(launcher), "launch", lambda *_: pytest.fail("launched"))

    call()
