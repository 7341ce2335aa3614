"""Norms in eight bits, emulated and on a GPU, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import reference
from cuda_ops.errors import OpInputError

DTYPES = [torch.float32, torch.bfloat16]
QUANTISED = [torch.float8_e4m3fn, torch.int8]
END = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# One element, odd rows, whole runs, more than a block's threads have in one round.
CASES = [
    *((size, torch.bfloat16) for size in (1, 7, 48, 769, 4104)),
    (769, torch.float32),
    (48, torch.float16),
]
EPS = 1e-5

pytestmark = pytest.mark.usefixtures("launcher")


def make_rows(num_rows: int, size: int, dtype: torch.dtype, *, gap: int = 8) -> Tensor:
    """Rows that are a strided slice, with an offset from zero."""
    torch.manual_seed(size)
    return (torch.randn(num_rows, size + gap) * 3 + 1).to(dtype)[:, gap:]


def assert_quantises(values: Tensor, scales: Tensor, exact: Tensor, quantised: torch.dtype) -> None:
    """Each number is the nearest that the scale can say, but for sums in float32 that may cross a middle."""
    assert values.dtype is quantised
    assert values.is_contiguous()
    largest = exact.abs().amax(1, keepdim=True)
    slack = (exact.shape[1] + 64) * 2.0**-24 * (largest + 1)
    assert ((scales.double() * END[quantised] - largest).abs() <= slack).all()
    # Half the distance to the next number: of whole ones 1, of float8 an eighth of the power of two below.
    wide = values.double()
    power = torch.floor(torch.log2(wide.abs().clamp(min=2.0**-6)))
    half = 0.5 if quantised is torch.int8 else 2.0 ** (power - 4)
    assert ((wide * scales.double() - exact).abs() <= half * scales.double() + slack).all()
    assert (wide.abs().amax(1) >= END[quantised] * (1 - 2**-4)).all()


@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_norms_in_eight_bits_are_the_nearest_to_the_formula(
    size: int, dtype: torch.dtype, quantised: torch.dtype
) -> None:
    x, weight, bias = make_rows(3, size, dtype), torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    wide = x.double()
    exact = wide / torch.sqrt(wide.square().mean(1, keepdim=True) + EPS) * weight.double()

    assert_quantises(*cuda_ops.rms_norm_quantised(x, weight, EPS, quantised), exact, quantised)
    exact = reference.layer_norm(wide, weight.double(), bias.double(), EPS)
    if size > 1:  # of one element the variance is rounding alone
        assert_quantises(*cuda_ops.layer_norm_quantised(x, weight, bias, EPS, quantised), exact, quantised)


@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_norms_in_eight_bits_round_the_sum_into_the_residual(
    dtype: torch.dtype, quantised: torch.dtype
) -> None:
    x, residual = make_rows(3, 96, dtype), make_rows(3, 96, dtype, gap=16)
    weight, total, other = torch.randn(96).to(dtype), residual + x, residual.clone()

    by_rms = cuda_ops.add_rms_norm_quantised(x, residual, weight, EPS, quantised)
    by_layer = cuda_ops.add_layer_norm_quantised(x, other, weight, None, EPS, quantised)

    assert torch.equal(residual, total)
    assert torch.equal(other, total)
    for actual, alone in (
        (by_rms, cuda_ops.rms_norm_quantised(total, weight, EPS, quantised)),
        (by_layer, cuda_ops.layer_norm_quantised(total, weight, None, EPS, quantised)),
    ):
        assert torch.equal(actual[0].view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(actual[1], alone[1])


@pytest.mark.parametrize("quantised", QUANTISED)
def test_norms_in_eight_bits_give_zeros_a_scale_of_zero_and_tell_of_a_nan(quantised: torch.dtype) -> None:
    x, weight = make_rows(4, 48, torch.float32).clone(), torch.ones(48)
    x[1] = 0.0
    x[2, 47] = torch.nan

    values, scales = cuda_ops.rms_norm_quantised(x, weight, EPS, quantised)

    assert not values[1].float().any()
    assert scales[1] == 0.0
    assert scales[2].isnan()
    assert scales[[0, 3]].isfinite().all()


def test_norms_in_eight_bits_launch_nothing_for_no_rows_and_refuse_what_they_do_not_know() -> None:
    values, scales = cuda_ops.rms_norm_quantised(torch.zeros(0, 8), torch.ones(8), EPS, torch.int8)

    assert (values.shape, scales.shape) == ((0, 8), (0, 1))
    with pytest.raises(OpInputError, match="float8_e4m3fn or int8"):
        cuda_ops.rms_norm_quantised(torch.zeros(2, 8), torch.ones(8), EPS, torch.uint8)
    with pytest.raises(OpInputError, match=r"x is \[8\]"):
        cuda_ops.rms_norm_quantised(torch.zeros(8), torch.ones(8), EPS, torch.int8)
