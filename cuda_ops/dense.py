"""Dense layers over weights that were laid out once, at load, the way the kernels read them.

A packed weight is panels of 32 outputs, `[num_panels, num_groups, 32, n]`: the n inputs of an output that
fill 32 bits stand together (1 in float32, 2 in bfloat16, 4 in int8), and zeros fill up the last panel and
group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ops import reference
from cuda_ops.errors import OpInputError
from cuda_ops.memory import LargePages
from cuda_ops.registry import define_op

PANEL: Final = 32
_GROUP_BYTES: Final = 4
_LARGEST_INT8: Final = 127
_INT8_OFFSET: Final = 128
_ROWS_AT_ONCE: Final = 64 * PANEL
"""Of a weight that is rounded: the float32 copy of a whole head would be the most that loading holds."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A `[num_outputs, num_inputs]` weight in panels.

    Attributes:
        panels: `[num_panels, num_groups, 32, n]`, contiguous.
        num_outputs: rows of the weight.
        num_inputs: its columns.
        scales: `[num_outputs]` float32: what 1 of an int8 weight's row stands for; None for other dtypes.
        sums: `[num_outputs]` int32: 128 times the sum of an int8 weight's row, which the kernels subtract
            because they take the rows of x as unsigned bytes around 128; None for other dtypes.
    """

    panels: Tensor
    num_outputs: int
    num_inputs: int
    scales: Tensor | None = None
    sums: Tensor | None = None


def pack_weight(weight: Tensor, pages: LargePages | None = None) -> PackedWeight:
    """Lay out a `[num_outputs, num_inputs]` weight in float32 or bfloat16; the copy is in `pages`."""
    num_outputs, num_inputs = weight.shape
    panels = _empty_panels(num_outputs, num_inputs, weight.dtype, pages)
    _fill_panels(panels, weight)
    return PackedWeight(panels, num_outputs, num_inputs)


def quantise_weight(weight: Tensor, pages: LargePages | None = None) -> PackedWeight:
    """Round each row to int8 in steps of 1/127 of its largest magnitude, and lay the rows out in `pages`."""
    num_outputs, num_inputs = weight.shape
    panels = _empty_panels(num_outputs, num_inputs, torch.int8, pages)
    scales, sums = torch.zeros(num_outputs), torch.zeros(num_outputs, dtype=torch.int32)
    for first in range(0, num_outputs if num_inputs else 0, _ROWS_AT_ONCE):
        part = slice(first, min(first + _ROWS_AT_ONCE, num_outputs))
        rows = weight[part].float()
        scales[part] = rows.abs().amax(dim=1) / _LARGEST_INT8
        values = (rows / scales[part].clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round_()
        sums[part] = values.sum(dim=1).to(torch.int32) * _INT8_OFFSET
        _fill_panels(panels[first // PANEL :], values.to(torch.int8))
    return PackedWeight(panels, num_outputs, num_inputs, scales, sums)


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    has_relu: bool = False,
    gives_float32: bool = False,
) -> Tensor:
    """Return `x @ weight.T + bias`, summed in float32 and rounded once.

    With an int8 weight each row of x is rounded to int8 too, in steps of 1/127 of its largest magnitude, and
    the products are summed as whole numbers. A row with a NaN or an infinity then gives NaN throughout.

    Args:
        x: `[num_rows, num_inputs]`, any strides, float32 or bfloat16, the dtype of a weight that is not int8.
        weight: of `pack_weight` or `quantise_weight`.
        bias: `[num_outputs]`, dtype of x.
        has_relu: what is below 0 becomes 0.
        gives_float32: do not round the sums to the dtype of x.

    Returns:
        `[num_rows, num_outputs]`, contiguous.

    Raises:
        OpInputError: shapes do not fit together.
    """
    if x.dim() != 2 or x.shape[1] != weight.num_inputs:
        raise OpInputError(
            "linear",
            f"x is {list(x.shape)}, the weight [{weight.num_outputs}, {weight.num_inputs}]:"
            " x must have two axes and as many inputs as the weight",
        )
    product: Tensor = _linear(
        x, weight.panels, weight.scales, weight.sums, bias, weight.num_outputs, has_relu, gives_float32
    )
    return product


def _empty_panels(num_outputs: int, num_inputs: int, dtype: torch.dtype, pages: LargePages | None) -> Tensor:
    """Zeros, which is what fills up the last panel and group."""
    inputs_a_group = _GROUP_BYTES // dtype.itemsize
    shape = (-(-num_outputs // PANEL), -(-num_inputs // inputs_a_group), PANEL, inputs_a_group)
    return torch.zeros(shape, dtype=dtype) if pages is None else pages.zeros(shape, dtype)


def _fill_panels(panels: Tensor, rows: Tensor) -> None:
    """Put rows into the first panels, as many as they fill."""
    num_groups, inputs_a_group = panels.shape[1], panels.shape[3]
    padding = (0, num_groups * inputs_a_group - rows.shape[1], 0, -rows.shape[0] % PANEL)
    padded = F.pad(rows, padding) if any(padding) else rows
    num_panels = padded.shape[0] // PANEL
    panels[:num_panels] = padded.view(num_panels, PANEL, num_groups, inputs_a_group).transpose(1, 2)


def _fake(
    x: Tensor,
    panels: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    num_outputs: int,
    has_relu: bool,
    gives_float32: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], num_outputs), dtype=torch.float32 if gives_float32 else x.dtype)


_linear = define_op(
    "linear(Tensor x, Tensor panels, Tensor? scales, Tensor? sums, Tensor? bias, int num_outputs,"
    " bool has_relu, bool gives_float32) -> Tensor",
    reference=reference.linear,
    fake=_fake,
)
