"""Rows rounded to e4m3 and torch's scaled product, emulated and on a GPU, against the plain meaning."""

from __future__ import annotations

import pytest
import torch

import cuda_ops
from cuda_ops import float8
from cuda_ops.cuda import float8 as native
from tests.support.dense_oracle import ROUNDOFF
from tests.support.emulated_kernels import EmulatedLauncher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_the_same_numbers_as_torch_does(
    dtype: torch.dtype, launcher: EmulatedLauncher
) -> None:
    x = (torch.randn(9, 1063) * torch.logspace(-4, 4, 9).unsqueeze(1)).to(dtype)[:, 3:]
    x[3], x[4, 5], x[5, 6] = 0.0, torch.nan, -torch.inf
    # Every step of the smallest numbers, and ties between them.
    x[6, :600] = torch.arange(600) * 2.0**-11 * 448.0 / 448.0
    x[6, 600] = 448.0

    values, scales = native.round_rows(launcher, x)

    expected, expected_scales = float8.round_rows(x)
    finite = [row for row in range(9) if row not in (4, 5)]
    assert torch.equal(scales[finite], expected_scales[finite])
    assert torch.equal(values.view(torch.uint8)[finite], expected.view(torch.uint8)[finite])
    for row in (4, 5):
        assert (values[row].float() * scales[row]).isnan().all() or scales[row].isnan()


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), [(1, 16, 16), (5, 528, 48), (0, 32, 16)])
def test_product_is_the_plain_meanings(num_rows: int, num_inputs: int, num_outputs: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_rows, num_inputs + 8).bfloat16()[:, 8:]
    weight = float8.round_to_float8(torch.randn(num_outputs, num_inputs))
    bias = torch.randn(num_outputs).bfloat16()
    assert native.serves(x, weight.values, bias)

    product = cuda_ops.float8_linear(x, weight, bias)

    exact = float8.reference(x.float(), weight.values, weight.scales, bias).double()
    # Sums in another order, and torch's product may round before it adds the bias.
    bound = (exact.abs() + bias.double().abs() + 1) * ROUNDOFF[torch.bfloat16] * 3
    assert product.is_contiguous()
    assert ((product.double() - exact).abs() <= bound).all()


def test_shapes_that_torch_does_not_take_are_left_to_the_meaning() -> None:
    x, weight = torch.randn(2, 24).bfloat16(), float8.round_to_float8(torch.randn(16, 24))

    assert not native.serves(x, weight.values, None)
    assert not native.serves(torch.randn(2, 16), float8.round_to_float8(torch.randn(16, 16)).values, None)
