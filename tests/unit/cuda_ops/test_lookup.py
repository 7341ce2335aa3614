"""Rows of packed weights and of tables, against the rows themselves."""

from __future__ import annotations

import pytest
import torch

import cuda_ops
from cuda_ops.dense import pack_weight, quantise_weight
from cuda_ops.errors import OpInputError

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (7, 3), (48, 33), (130, 64)]
"""Inputs and outputs."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_packed_weight_are_its_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape[1], shape[0]).to(dtype)
    indices = torch.tensor([shape[1] - 1, 0, shape[1] // 2])

    assert torch.equal(cuda_ops.panel_rows(pack_weight(weight), indices, dtype), weight[indices])
    assert cuda_ops.panel_rows(pack_weight(weight), indices[:0], dtype).shape == (0, shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_an_int8_weight_are_whole_numbers_of_its_scales(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape[1], shape[0])
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    indices = torch.tensor([shape[1] - 1, 0, shape[1] // 2])
    exact = ((weight / scales).round() * scales)[indices]

    rows = cuda_ops.panel_rows(quantise_weight(weight), indices, dtype)

    assert rows.dtype is dtype
    assert torch.equal(rows, exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 77])
def test_rows_of_a_table_are_added_to_strided_rows(size: int, dtype: torch.dtype) -> None:
    table, x = torch.randn(9, size + 2).to(dtype)[:, 2:], torch.randn(3, size + 5).to(dtype)
    rows, indices = x[:, :size], torch.tensor([6, 0, 6])
    expected, rest = rows + table[indices + 2], x[:, size:].clone()

    cuda_ops.add_rows(rows, table, indices, 2)

    assert torch.equal(rows, expected)
    assert torch.equal(x[:, size:], rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_adds_to_strided_rows_and_rounds_once(dtype: torch.dtype) -> None:
    x, delta = torch.randn(4, 40).to(dtype)[:, 3:], torch.randn(4, 40).to(dtype)[:, :37]
    expected = x + delta

    cuda_ops.add(x, delta)

    assert torch.equal(x, expected)


def test_lookups_refuse_what_does_not_fit() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(OpInputError, match=r"^add: x is "):
        cuda_ops.add(x, torch.zeros(2, 4))
    with pytest.raises(OpInputError, match=r"^add: x is "):
        cuda_ops.add(x, torch.zeros(3, 3))
    with pytest.raises(OpInputError, match=r"^add_rows: indices are "):
        cuda_ops.add_rows(x, torch.zeros(5, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(OpInputError, match=r"^panel_rows: the weight is "):
        cuda_ops.panel_rows(pack_weight(torch.zeros(2, 3)), torch.zeros(1, dtype=torch.int64), torch.bfloat16)
