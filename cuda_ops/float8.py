"""Dense layers in 8-bit floats (e4m3): each output of the weight on a scale, each row of x on one of its own.

Rounding x costs a pass over it; the product then reads half of what bfloat16 does, and takes half the time on
tensor cores that know e4m3 (sm_89 and newer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op

FLOAT8: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0
"""Of the numbers of e4m3."""

_ROWS_AT_ONCE: Final = 2048


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """A `[num_outputs, num_inputs]` weight.

    Attributes:
        values: e4m3, contiguous.
        scales: `[num_outputs]` float32, what 1 of a row stands for.
    """

    values: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def round_to_float8(weight: Tensor) -> Float8Weight:
    """Round each row of a weight to e4m3, its largest magnitude to the largest number there is."""
    values = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        values[part], scales[part] = round_rows(weight[part])
    return Float8Weight(values, scales)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `[num_rows, size]` in e4m3, and `[num_rows]` float32: what 1 of it stands for."""
    wide = x.float()
    largest = wide.abs().amax(dim=1) if x.shape[1] else wide.new_zeros(len(x))
    scales = largest / LARGEST
    # A row of zeros, or of numbers too small to divide by.
    divisors = scales.clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / divisors.unsqueeze(1)).clamp(-LARGEST, LARGEST).to(FLOAT8), divisors


def float8_linear(x: Tensor, weight: Float8Weight, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, each row of x rounded to e4m3, summed in float32 and rounded once.

    A row with a NaN or an infinity gives NaN in all that it is multiplied with there.

    Args:
        x: `[num_rows, num_inputs]`, any strides.
        weight: of `round_to_float8`, or a checkpoint's.
        bias: `[num_outputs]`, dtype of x.

    Returns:
        `[num_rows, num_outputs]`, contiguous, dtype of x.

    Raises:
        OpInputError: shapes do not fit together.
    """
    if x.dim() != 2 or x.shape[1] != weight.values.shape[1]:
        raise OpInputError(
            "float8_linear",
            f"x is {list(x.shape)}, the weight {list(weight.values.shape)}:"
            " x must have two axes and as many inputs as the weight",
        )
    product: Tensor = _float8_linear(x, weight.values.view(torch.uint8), weight.scales, bias)
    return product


def reference(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The op's meaning; it takes e4m3 as bytes, because torch's checks of ops cannot add such numbers up."""
    rows, row_scales = round_rows(x)
    product = (rows.float() @ values.view(FLOAT8).float().T) * row_scales.unsqueeze(1) * scales
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _fake(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


_float8_linear = define_op(
    "float8_linear(Tensor x, Tensor values, Tensor scales, Tensor? bias) -> Tensor",
    reference=reference,
    fake=_fake,
)
