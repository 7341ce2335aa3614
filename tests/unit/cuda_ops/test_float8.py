"""Dense layers in e4m3, in plain torch: bounds that follow from the format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops.errors import OpInputError
from cuda_ops.float8 import LARGEST, round_rows, round_to_float8
from tests.support.dense_oracle import ROUNDOFF

torch.set_num_threads(1)

# Half of the last place: three bits of fraction; below 2^-6 steps are 2^-9.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10


def values_of(rows: Tensor, scales: Tensor) -> Tensor:
    return rows.double() * scales.double().unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_row_is_as_near_as_the_format_allows(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 300) * torch.logspace(-3, 3, 40).unsqueeze(1)).to(dtype)
    x[5] = 0.0

    rows, scales = round_rows(x)

    error = (values_of(rows, scales) - x.double()).abs()
    assert (
        error <= x.double().abs() * RELATIVE * (1 + 2**-20) + scales.double().unsqueeze(1) * ABSOLUTE
    ).all()
    assert (rows.float().abs().amax(1)[x.abs().amax(1) > 0] == LARGEST).all()
    assert not rows[5].float().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "num_outputs"), [(0, 8, 3), (1, 1, 1), (5, 37, 19), (3, 64, 48)]
)
def test_product_is_that_of_the_rounded_rows(
    num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_rows, num_inputs + 3).to(dtype)[:, 3:]
    weight = round_to_float8(torch.randn(num_outputs, num_inputs))
    bias = torch.randn(num_outputs).to(dtype)

    product = cuda_ops.float8_linear(x, weight, bias)

    sides = values_of(*round_rows(x)), values_of(weight.values, weight.scales)
    exact = sides[0] @ sides[1].T + bias.double()
    magnitude = sides[0].abs() @ sides[1].abs().T + bias.double().abs()
    bound = magnitude * (num_inputs + 6) * ROUNDOFF[torch.float32] + exact.abs() * ROUNDOFF[dtype] * (
        1 + 2**-7
    )
    assert product.dtype is dtype
    assert ((product.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("invalid", [torch.nan, torch.inf])
def test_row_that_is_not_finite_gives_nan_and_no_other_does(invalid: float) -> None:
    x = torch.randn(3, 32)
    x[1, 7] = invalid

    product = cuda_ops.float8_linear(x, round_to_float8(torch.randn(16, 32)))

    assert product[1].isnan().all()
    assert product[::2].isfinite().all()


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(OpInputError, match=r"x is \[2, 3\], the weight \[5, 4\]"):
        cuda_ops.float8_linear(torch.zeros(2, 3), round_to_float8(torch.zeros(5, 4)))
