"""Norms, rotary embedding and gated activation, each against the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops.errors import OpInputError
from tests.support.dense_oracle import ROUNDOFF

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 7, 48, 769]
EPS = 1e-5


def make_rows(size: int, dtype: torch.dtype) -> Tensor:
    """Rows that are a strided slice, with an offset from zero."""
    torch.manual_seed(size)
    return (torch.randn(5, size + 3) * 3 + 1).to(dtype)[:, 3:]


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS) * weight + bias


def exact_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def norm_tolerance(exact: Tensor, dtype: torch.dtype, size: int) -> float:
    """One rounding of the result, and float32 sums of `size` terms before it."""
    return float(exact.abs().max() + 1) * (ROUNDOFF[dtype] + 4 * size * ROUNDOFF[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_equals_its_formula_on_strided_rows(size: int, dtype: torch.dtype) -> None:
    x, weight = make_rows(size, dtype), torch.randn(size).to(dtype)

    exact = exact_rms_norm(x.double(), weight.double())

    error = (cuda_ops.rms_norm(x, weight, EPS).double() - exact).abs().max()
    assert error <= norm_tolerance(exact, dtype, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_layer_norm_equals_its_formula_on_strided_rows(size: int, dtype: torch.dtype) -> None:
    x, weight, bias = make_rows(size, dtype), torch.randn(size).to(dtype), torch.randn(size).to(dtype)

    exact = exact_layer_norm(x.double(), weight.double(), bias.double())

    # With one element the variance is rounding alone, which 1 / sqrt(eps) magnifies.
    slack = 8 * ROUNDOFF[torch.float32] / math.sqrt(EPS)
    error = (cuda_ops.layer_norm(x, weight, bias, EPS).double() - exact).abs().max()
    assert error <= norm_tolerance(exact, dtype, size) + slack


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_norms_update_the_residual_and_normalise_the_sum(dtype: torch.dtype) -> None:
    x, weight, bias = make_rows(48, dtype), torch.randn(48).to(dtype), torch.randn(48).to(dtype)
    residual = torch.randn(5, 48).to(dtype)
    total = residual + x

    for_rms, for_layer = residual.clone(), residual.clone()
    by_rms = cuda_ops.add_rms_norm(x, for_rms, weight, EPS)
    by_layer = cuda_ops.add_layer_norm(x, for_layer, weight, bias, EPS)

    assert torch.equal(for_rms, total)
    assert torch.equal(for_layer, total)
    assert torch.equal(by_rms, cuda_ops.rms_norm(total, weight, EPS))
    assert torch.equal(by_layer, cuda_ops.layer_norm(total, weight, bias, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [2, 8, 16])
def test_rotary_embedding_turns_pairs_as_complex_numbers(rotary_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rotary_dim)
    heads = torch.randn(6, 5, 16).to(dtype)
    angles = torch.randn(6, rotary_dim // 2) * 50
    exact = heads.double()
    half = rotary_dim // 2
    pairs = torch.complex(exact[..., :half], exact[..., half:rotary_dim])
    turned = pairs * torch.polar(torch.ones_like(angles), angles).to(torch.complex128).unsqueeze(1)
    exact = torch.cat((turned.real, turned.imag, exact[..., rotary_dim:]), dim=-1)

    actual = heads.clone()
    cuda_ops.rotary_embedding(actual[:, :3], actual[:, 3:], torch.cat((angles.cos(), angles.sin()), -1))

    # The table is float32: two products and a sum of it, and one rounding.
    bound = float(heads.abs().max()) * (2 * ROUNDOFF[dtype] + 8 * ROUNDOFF[torch.float32])
    assert (actual.double() - exact).abs().max() <= bound


def test_rotary_embedding_refuses_a_table_wider_than_a_head() -> None:
    heads = torch.zeros(2, 1, 4)

    with pytest.raises(OpInputError, match="at most head_dim"):
        cuda_ops.rotary_embedding(heads, heads, torch.zeros(2, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 80])
def test_silu_and_mul_equals_its_formula_on_strided_rows(size: int, dtype: torch.dtype) -> None:
    x = make_rows(2 * size, dtype)
    gate, up = x.double().chunk(2, dim=-1)
    exact = gate / (1 + torch.exp(-gate)) * up

    error = (cuda_ops.silu_and_mul(x).double() - exact).abs()

    assert (error <= exact.abs() * (ROUNDOFF[dtype] + 8 * ROUNDOFF[torch.float32]) + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 80])
def test_gelu_and_mul_equals_its_formula_on_strided_rows(size: int, dtype: torch.dtype) -> None:
    x = 4 * make_rows(2 * size, dtype)
    gate, up = x.double().chunk(2, dim=-1)
    exact = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up

    error = (cuda_ops.gelu_and_mul(x).double() - exact).abs()

    # Far below 0 what is left of 1 + tanh is the rounding of 1.
    rounding = 8 * ROUNDOFF[torch.float32] * (gate * up).abs()
    assert (error <= exact.abs() * ROUNDOFF[dtype] + rounding + 1e-30).all()


@pytest.mark.parametrize("value", [-1e30, -100.0, 0.0, 100.0, 1e30])
def test_gelu_and_mul_is_nothing_or_all_far_from_zero(value: float) -> None:
    result = cuda_ops.gelu_and_mul(torch.tensor([[value, 1.0]]))

    assert result.item() == pytest.approx(max(0.0, value), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("op", [cuda_ops.silu_and_mul, cuda_ops.gelu_and_mul], ids=["silu", "gelu"])
def test_gate_refuses_an_odd_width(op: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(OpInputError, match="must be even"):
        op(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 1003])
def test_softmax_at_equals_its_formula_on_strided_rows(size: int, dtype: torch.dtype) -> None:
    logits = make_rows(size, dtype)
    logits[1, 0] = -torch.inf if size > 1 else 0.0
    temperatures = torch.tensor([1.0, 0.3, 2.0, 0.7, 1.7])
    exact = torch.softmax(logits.double() / temperatures.double().unsqueeze(1), dim=-1)

    actual = cuda_ops.softmax_at(logits, temperatures)

    # The exponent carries the rounding of the difference, which may be as large as the row is wide.
    width = float((logits[0].max() - logits[0].min()).abs() + 20) / 0.3
    assert actual.dtype is torch.float32
    assert actual.is_contiguous()
    assert ((actual.double() - exact).abs() <= exact * 8 * width * ROUNDOFF[torch.float32] + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 50, 512, 1700])
def test_argmax_is_the_first_of_the_largest_or_of_a_nan(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    # Few values, so that nearly every row has several largest; strided rows.
    logits = torch.randint(-3, 3, (40, size + 1)).to(dtype)[:, 1:]
    logits[10] = -torch.inf
    logits[20, size // 2] = torch.inf
    logits[30, size // 3 :] = torch.nan

    expected = [min(range(size), key=lambda i: (row[i] == row[i], -row[i], i)) for row in logits.tolist()]

    assert cuda_ops.argmax(logits).tolist() == expected
    assert cuda_ops.argmax(logits[:0]).tolist() == []


def test_softmax_at_puts_all_on_the_maximum_when_the_temperature_is_tiny() -> None:
    logits = torch.randn(3, 100)

    probabilities = cuda_ops.softmax_at(logits, torch.full((3,), 1e-30))

    assert torch.equal(probabilities.argmax(dim=-1), logits.argmax(dim=-1))
    assert torch.equal(probabilities.amax(dim=-1), torch.ones(3))


def test_softmax_at_refuses_another_number_of_temperatures_than_rows() -> None:
    with pytest.raises(OpInputError, match="one for each row"):
        cuda_ops.softmax_at(torch.zeros(2, 3), torch.ones(3))
