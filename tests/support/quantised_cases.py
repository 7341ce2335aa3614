"""Quantised weights with odd shapes, and products with them in float64 from the codes themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ops.quantised import QuantisedWeight, lay_out_codes
from tests.support.dense_oracle import ROUNDOFF


@dataclass(frozen=True, slots=True)
class QuantisedCase:
    """Attributes:
    values: what the weight stands for, `[num_outputs, num_inputs]` float64, in the order of x.
    """

    x: Tensor
    weight: QuantisedWeight
    bias: Tensor
    values: Tensor

    def product(self) -> Tensor:
        return self.x.double() @ self.values.T + self.bias.double()

    def tolerance(self, *, rounds_weights: bool = False) -> Tensor:
        """Of each element: a rounding of the sum of magnitudes for each term, and the result's own.

        `rounds_weights`: and one of each weight.
        """
        roundoff = ROUNDOFF[self.x.dtype]
        magnitude = self.x.double().abs() @ self.values.abs().T + self.bias.double().abs()
        wide = ROUNDOFF[torch.float32] * (self.x.shape[1] + 4)
        result = roundoff * (1 + 2**-7) * self.product().abs()
        return magnitude * (wide + (roundoff if rounds_weights else 0.0)) * (1 + roundoff) + result + 1e-30


def make_quantised_case(
    num_rows: int,
    num_inputs: int,
    num_outputs: int,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    has_zeros: bool = True,
    has_order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    padding: int = 0,
) -> QuantisedCase:
    """Codes and zeros of the whole range, scales that differ; x is a slice of rows `padding` longer."""
    generator = torch.Generator().manual_seed(num_inputs + num_outputs + bits)
    num_groups = -(-num_inputs // group_size) if group_size else 1
    shape = (num_groups, num_outputs)
    codes = torch.randint(0, 1 << bits, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(scale_dtype)
    order = torch.randperm(num_inputs, generator=generator) if has_order else None
    x = (torch.randn(num_rows, num_inputs + padding, generator=generator) * 2).to(dtype)[:, padding:]
    bias = torch.randn(num_outputs, generator=generator).to(dtype)
    group = torch.arange(num_inputs) // (group_size or num_inputs)
    zero = zeros.double() if has_zeros else torch.full(shape, float(1 << (bits - 1)), dtype=torch.float64)
    values = (codes.double() - zero.T[:, group]) * scales.double().T[:, group]
    if order is not None:
        values = torch.empty_like(values).index_copy_(1, order, values)
    weight = lay_out_codes(
        codes, scales, zeros if has_zeros else None, bits=bits, group_size=group_size, order=order
    )
    return QuantisedCase(x, weight, bias, values)
