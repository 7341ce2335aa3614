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
from cuda_ops.registry import define_op

_PANEL: Final = 32
_GROUP_BYTES: Final = 4
_LARGEST_INT8: Final = 127
_INT8_OFFSET: Final = 128
# To be rounded: a large vocabulary in float32 would take several times the room of the whole model.
_ROWS_AT_ONCE: Final = 4096


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


def pack_weight(weight: Tensor) -> PackedWeight:
    """Lay out a `[num_outputs, num_inputs]` weight in float32 or bfloat16; the result is a copy."""
    return PackedWeight(_to_panels(weight), *weight.shape)


def quantise_weight(weight: Tensor) -> PackedWeight:
    """Round each row to int8 in steps of 1/127 of its largest magnitude, and lay the rows out."""
    num_outputs, num_inputs = weight.shape
    scales = weight.new_zeros(num_outputs, dtype=torch.float32)
    values = torch.empty_like(weight, dtype=torch.int8)
    for first in range(0, num_outputs if num_inputs else 0, _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        rows = weight[part].float()
        scales[part] = rows.abs().amax(dim=1) / _LARGEST_INT8
        steps = scales[part].clamp(min=torch.finfo(torch.float32).tiny)
        values[part] = (rows / steps.unsqueeze(1)).round_().to(torch.int8)
    sums = values.sum(dim=1, dtype=torch.int32) * _INT8_OFFSET
    return PackedWeight(_to_panels(values), num_outputs, num_inputs, scales, sums)


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, gives_float32: bool = False
) -> Tensor:
    """Return `x @ weight.T + bias`, summed in float32 and rounded once.

    With an int8 weight each row of x is rounded to int8 too, in steps of 1/127 of its largest magnitude, and
    the products are summed as whole numbers. A row with a NaN or an infinity then gives NaN throughout.

    Args:
        x: `[num_rows, num_inputs]`, any strides, float32 or bfloat16, the dtype of a weight that is not int8.
        weight: of `pack_weight` or `quantise_weight`.
        bias: `[num_outputs]`, dtype of x.
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
        x, weight.panels, weight.scales, weight.sums, bias, weight.num_outputs, gives_float32
    )
    return product


def rows_of(weight: PackedWeight, indices: Tensor) -> Tensor:
    """Return rows of a weight that is not int8, as an embedding does: `[num_indices, num_inputs]`."""
    # Whole groups are gathered: a fourth of the elements to look up, or half, and never a row's neighbours.
    words = weight.panels.view(torch.int32)[indices // _PANEL, :, indices % _PANEL]
    return words.flatten(1).view(weight.panels.dtype)[:, : weight.num_inputs]


def _to_panels(weight: Tensor) -> Tensor:
    inputs_a_group = _GROUP_BYTES // weight.element_size()
    padding = (0, -weight.shape[1] % inputs_a_group, 0, -weight.shape[0] % _PANEL)
    padded = F.pad(weight, padding) if any(padding) else weight
    num_panels, num_groups = padded.shape[0] // _PANEL, padded.shape[1] // inputs_a_group
    panels = padded.view(num_panels, _PANEL, num_groups, inputs_a_group).transpose(1, 2)
    return panels.contiguous()


def _fake(
    x: Tensor,
    panels: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    num_outputs: int,
    gives_float32: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], num_outputs), dtype=torch.float32 if gives_float32 else x.dtype)


_linear = define_op(
    "linear(Tensor x, Tensor panels, Tensor? scales, Tensor? sums, Tensor? bias, int num_outputs,"
    " bool gives_float32) -> Tensor",
    reference=reference.linear,
    fake=_fake,
)
