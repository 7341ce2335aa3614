"""Rows of tables: embeddings, kept in the panels that the head multiplies by, and rows added up."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ops import reference
from cuda_ops.dense import PackedWeight
from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op


def panel_rows(weight: PackedWeight, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of a packed weight, as an embedding does: `[num_indices, num_inputs]` in `dtype`.

    Args:
        weight: in int8, or in `dtype`.
        indices: `[num_indices]` int64, none out of range.
        dtype: float32 or bfloat16.

    Raises:
        OpInputError: the weight has another dtype.
    """
    if weight.scales is None and weight.panels.dtype != dtype:
        raise OpInputError(
            "panel_rows", f"the weight is {weight.panels.dtype}, asked for is {dtype}: must be equal"
        )
    rows: Tensor = _panel_rows(
        weight.panels, weight.scales, indices, weight.num_outputs, weight.num_inputs, dtype is torch.float32
    )
    return rows


def add_rows(x: Tensor, table: Tensor, indices: Tensor, offset: int = 0) -> None:
    """Add row `indices[i] + offset` of a table to row i of x, rounded once.

    Args:
        x: `[num_rows, size]` with contiguous rows, mutated.
        table: `[any, size]` with contiguous rows, dtype of x.
        indices: `[num_rows]` int64; with the offset none is out of range.
        offset: of the table's first row that an index of 0 means.

    Raises:
        OpInputError: shapes or dtypes do not fit together.
    """
    _check_rows("add_rows", x, table)
    if indices.shape != x.shape[:1]:
        raise OpInputError(
            "add_rows", f"indices are {list(indices.shape)}, x {list(x.shape)}: one for each row"
        )
    _add_rows(x, table, indices, offset)


def add(x: Tensor, delta: Tensor) -> None:
    """Add to x, rounded once.

    Args:
        x: `[num_rows, size]` with contiguous rows, mutated.
        delta: the same shape and dtype, with contiguous rows.

    Raises:
        OpInputError: shapes or dtypes do not fit together.
    """
    _check_rows("add", x, delta)
    if x.shape != delta.shape:
        raise OpInputError("add", f"x is {list(x.shape)}, delta {list(delta.shape)}: must be equal")
    _add(x, delta)


def _check_rows(op: str, x: Tensor, other: Tensor) -> None:
    if x.dim() != 2 or other.dim() != 2 or x.shape[1] != other.shape[1] or x.dtype != other.dtype:
        raise OpInputError(
            op,
            f"x is {list(x.shape)} {x.dtype}, the other {list(other.shape)} {other.dtype}:"
            " both must have two axes, rows of one size and one dtype",
        )


def _fake_panel_rows(
    panels: Tensor,
    scales: Tensor | None,
    indices: Tensor,
    num_outputs: int,
    num_inputs: int,
    gives_float32: bool,
) -> Tensor:
    dtype = torch.float32 if gives_float32 else torch.bfloat16
    return panels.new_empty((indices.shape[0], num_inputs), dtype=dtype)


def _fake_add_rows(x: Tensor, table: Tensor, indices: Tensor, offset: int) -> None:
    return None


def _fake_add(x: Tensor, delta: Tensor) -> None:
    return None


_panel_rows = define_op(
    "panel_rows(Tensor panels, Tensor? scales, Tensor indices, int num_outputs, int num_inputs,"
    " bool gives_float32) -> Tensor",
    reference=reference.panel_rows,
    fake=_fake_panel_rows,
)
_add_rows = define_op(
    "add_rows(Tensor(a!) x, Tensor table, Tensor indices, int offset) -> ()",
    reference=reference.add_rows,
    fake=_fake_add_rows,
)
_add = define_op("add(Tensor(a!) x, Tensor delta) -> ()", reference=reference.add, fake=_fake_add)
