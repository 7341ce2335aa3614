"""Dense layers against the product in float64, over every implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops.dense import pack_weight, quantise_weight
from cuda_ops.errors import OpInputError
from tests.support.dense_oracle import ROUNDOFF

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16]
# Inputs and outputs: one, odd ones that fill no group and no panel, whole panels, more than one.
SHAPES = [(1, 1), (7, 33), (770, 50), (96, 64), (33, 129)]
# None, one, fewer than a tile, tiles of two heights.
NUM_ROWS = [0, 1, 3, 14, 31]


def make_layer(
    num_inputs: int, num_outputs: int, num_rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are a strided slice, a weight whose rows differ in size, and a bias."""
    torch.manual_seed(num_inputs + num_rows)
    x = (torch.randn(num_rows, num_inputs + 3) * 2).to(dtype)[:, 3:]
    weight = (torch.randn(num_outputs, num_inputs) * torch.rand(num_outputs, 1) * 3).to(dtype)
    return x, weight, torch.randn(num_outputs).to(dtype)


def summing_error(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """At worst one float32 rounding of the sum of magnitudes for each term, for each element."""
    magnitude = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    return magnitude * (x.shape[1] + 2) * ROUNDOFF[torch.float32]


def apply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    exact = x.double() @ weight.double().T
    return exact if bias is None else exact + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_equals_the_product_rounded_once(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    x, weight, some_bias = make_layer(*shape, num_rows, dtype)
    bias = some_bias if has_bias else None
    exact, packed = apply(weight, bias, x), pack_weight(weight)

    rounded = cuda_ops.linear(x, packed, bias)
    summed = cuda_ops.linear(x, packed, bias, gives_float32=True)
    above = cuda_ops.linear(x, packed, bias, has_relu=True)

    bound = summing_error(x, weight, bias)
    assert (rounded.dtype, summed.dtype) == (dtype, torch.float32)
    assert rounded.is_contiguous()
    assert torch.equal(above, rounded.relu())
    assert ((summed.double() - exact).abs() <= bound).all()
    assert ((rounded.double() - exact).abs() <= bound + exact.abs() * ROUNDOFF[dtype] * (1 + 2**-7)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_with_an_int8_weight_equals_the_product_of_what_was_rounded(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    x, weight, some_bias = make_layer(*shape, num_rows, dtype)
    bias = some_bias if has_bias else None

    product = cuda_ops.linear(x, quantise_weight(weight), bias, gives_float32=True)

    # Half a step of each side of each term, a little more where float32 rounds to another step than float64.
    step = 0.5 * (1 + 2**-12)
    x_step = x.double().abs().amax(1, keepdim=True) / 127 * step
    weight_step = weight.double().abs().amax(1) / 127 * step
    bound = (
        x_step * weight.double().abs().sum(1)
        + x.double().abs().sum(1, keepdim=True) * weight_step
        + x_step * weight_step * shape[0]
    )
    assert ((product.double() - apply(weight, bias, x)).abs() <= bound + summing_error(x, weight, bias)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_with_an_int8_weight_is_exact_when_nothing_is_rounded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (5, 1001), generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (40, 1001), generator=generator)
    # Extremes of one sign: the largest sums there are, and the rows' scales are 1.
    x[:, 0], weight[:, 0], x[0], weight[0] = 127, 127, 127, -127

    product = cuda_ops.linear(x, quantise_weight(weight.float()), gives_float32=True)

    exact = x.double() @ weight.double().T
    assert ((product.double() - exact).abs() <= exact.abs() * 4 * ROUNDOFF[torch.float32]).all()


def test_linear_is_the_same_for_rows_alone_and_among_others_on_two_threads() -> None:
    x, weight, bias = make_layer(512, 2000, 40, torch.bfloat16)
    for packed in (pack_weight(weight), quantise_weight(weight)):
        alone = cuda_ops.linear(x[7:8], packed, bias)
        torch.set_num_threads(2)
        together = cuda_ops.linear(x, packed, bias)
        torch.set_num_threads(1)

        # The reference leaves its sums to torch, whose order depends on the number of rows.
        assert (together[7:8].double() - alone.double()).abs().max() <= 2 * ROUNDOFF[torch.bfloat16] * (
            alone.double().abs().max()
        )


def test_linear_gives_zero_and_the_bias_for_a_row_of_zeros() -> None:
    _, weight, bias = make_layer(20, 40, 1, torch.float32)
    for packed in (pack_weight(weight), quantise_weight(weight)):
        assert torch.equal(cuda_ops.linear(torch.zeros(2, 20), packed, bias), bias.expand(2, -1))
    assert not cuda_ops.linear(torch.ones(1, 20), quantise_weight(torch.zeros(3, 20))).any()


@pytest.mark.parametrize("invalid", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 30])
def test_linear_with_an_int8_weight_gives_nan_for_a_row_that_is_not_finite_and_for_no_other(
    invalid: float, place: int
) -> None:
    x, weight, _ = make_layer(31, 40, 3, torch.float32)
    x[1, place] = invalid

    product = cuda_ops.linear(x, quantise_weight(weight))

    assert product[1].isnan().all()
    assert product[::2].isfinite().all()


def test_quantising_leaves_the_weight_as_it_was() -> None:
    weight = torch.randn(3, 5)
    before = weight.clone()

    quantise_weight(weight)

    assert torch.equal(weight, before)


def test_linear_refuses_rows_of_another_length() -> None:
    with pytest.raises(OpInputError) as caught:
        cuda_ops.linear(torch.zeros(2, 3), pack_weight(torch.zeros(5, 4)))

    assert caught.value.op == "linear"
    assert caught.value.problem.startswith("x is [2, 3], the weight [5, 4]")
