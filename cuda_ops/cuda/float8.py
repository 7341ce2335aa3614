"""Products in e4m3: rows are rounded by a kernel of ours and multiplied by torch's scaled product."""

from __future__ import annotations

from ctypes import c_int, c_longlong
from typing import Final

import torch
from torch import Tensor

from cuda_ops import float8
from cuda_ops.cuda.elements import ELEMENTS, run_length
from cuda_ops.cuda.launcher import Launcher, LaunchShape, Variant

_THREADS: Final = 256
# What tensor cores take at once, and torch therefore asks of both sides of the weight.
_MULTIPLE: Final = 16


def float8_linear(
    launcher: Launcher, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    if not serves(x, values, bias):
        return float8.reference(x, values, scales, bias)
    if len(x) == 0:
        return x.new_empty((0, len(values)))
    rows, row_scales = round_rows(launcher, x)
    return torch._scaled_mm(
        rows,
        values.view(float8.FLOAT8).T,
        scale_a=row_scales.unsqueeze(1),
        scale_b=scales.unsqueeze(0),
        bias=bias,
        out_dtype=x.dtype,
    )


def serves(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Whether torch multiplies these: with a scale a row it gives bfloat16 alone."""
    num_outputs, num_inputs = values.shape
    return (
        x.dtype is torch.bfloat16
        and x.stride(1) == 1
        and num_inputs > 0
        and num_outputs % _MULTIPLE == num_inputs % _MULTIPLE == 0
        and values.is_contiguous()
        and (bias is None or bias.dtype is x.dtype)
    )


def round_rows(launcher: Launcher, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `cuda_ops.float8.round_rows`, of rows whose neighbours lie side by side."""
    num_rows, size = x.shape
    values = x.new_empty(x.shape, dtype=float8.FLOAT8)
    scales = x.new_empty(num_rows, dtype=torch.float32)
    variant = Variant.of(
        "float8", "round_rows",
        ELEMENT=ELEMENTS[x.dtype], COUNT=run_length((x,), size, x.stride(0)), THREADS=_THREADS,
    )  # fmt: skip
    shape = LaunchShape((num_rows, 1, 1), _THREADS)
    launcher.launch(variant, shape, (values, scales, x, c_longlong(x.stride(0)), c_int(size)))
    return values, scales
