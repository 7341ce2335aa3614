"""Normalisation over the last axis, alone or after adding to the residual stream."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from cuda_ops import reference, reference_eight_bits
from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op

_QUANTISED: Final = (torch.float8_e4m3fn, torch.int8)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, the mean in float32 (Zhang and Sennrich 2019, eq. 4).

    Args:
        x: `[..., size]`, any strides.
        weight: `[size]`.
        eps: added under the root.

    Returns:
        Contiguous, shape and dtype of `x`.
    """
    result: Tensor = _rms_norm(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual` in place, rounded to its dtype, and return `rms_norm` of the sum.

    Args:
        x: `[num_tokens, size]`.
        residual: `[num_tokens, size]`, mutated.
        weight: `[size]`.
        eps: added under the root.
    """
    result: Tensor = _add_rms_norm(x, residual, weight, eps)
    return result


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return `(x - mean) / sqrt(variance + eps) * weight + bias`, moments in float32 (Ba et al. 2016).

    Args:
        x: `[num_tokens, size]`.
        weight: `[size]`, or None for 1.
        bias: `[size]`, or None for 0.
        eps: added to the biased variance.
    """
    result: Tensor = _layer_norm(x, weight, bias, eps)
    return result


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Add `x` to `residual` in place, rounded to its dtype, and return `layer_norm` of the sum.

    Args:
        x: `[num_tokens, size]`.
        residual: `[num_tokens, size]`, mutated.
        weight: `[size]`, or None for 1.
        bias: `[size]`, or None for 0.
        eps: added to the biased variance.
    """
    result: Tensor = _add_layer_norm(x, residual, weight, bias, eps)
    return result


def rms_norm_quantised(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `rms_norm` in eight bits: values, and what one of them stands for in each row.

    A row's largest number by size becomes the dtype's largest, 448 or 127; the norm is not rounded before.
    For a product of eight bits with a scale a row, of which a row of zeros has 0, one with a NaN a NaN.

    Args:
        x: `[num_tokens, size]`.
        weight: `[size]`.
        eps: added under the root.
        dtype: `float8_e4m3fn` or `int8`.

    Returns:
        `[num_tokens, size]` of that dtype, rounded to the nearest, of two to the even one, and
        `[num_tokens, 1]` float32.

    Raises:
        OpInputError: another dtype, or x of another shape.
    """
    _check_quantised("rms_norm_quantised", x, dtype)
    values, scales = _rms_norm_quantised(x, weight, eps, dtype)
    return values, scales


def add_rms_norm_quantised(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual` in place, as `add_rms_norm` does, and return `rms_norm_quantised` of the sum.

    Raises:
        OpInputError: as `rms_norm_quantised`.
    """
    _check_quantised("add_rms_norm_quantised", x, dtype)
    values, scales = _add_rms_norm_quantised(x, residual, weight, eps, dtype)
    return values, scales


def layer_norm_quantised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return `layer_norm` in eight bits, as `rms_norm_quantised` does with the other norm.

    Raises:
        OpInputError: as `rms_norm_quantised`.
    """
    _check_quantised("layer_norm_quantised", x, dtype)
    values, scales = _layer_norm_quantised(x, weight, bias, eps, dtype)
    return values, scales


def add_layer_norm_quantised(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual` in place, as `add_layer_norm` does, and return `layer_norm_quantised` of the sum.

    Raises:
        OpInputError: as `rms_norm_quantised`.
    """
    _check_quantised("add_layer_norm_quantised", x, dtype)
    values, scales = _add_layer_norm_quantised(x, residual, weight, bias, eps, dtype)
    return values, scales


def _check_quantised(op: str, x: Tensor, dtype: torch.dtype) -> None:
    if dtype not in _QUANTISED:
        raise OpInputError(op, f"dtype is {dtype}: must be float8_e4m3fn or int8")
    if x.dim() != 2 or x.shape[1] == 0:
        raise OpInputError(op, f"x is {list(x.shape)}: [num_tokens, size]")


def _fake_like_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_rms_norm = define_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference.rms_norm,
    fake=_fake_like_first,
)
_add_rms_norm = define_op(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    reference=reference.add_rms_norm,
    fake=_fake_like_first,
)
_layer_norm = define_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=reference.layer_norm,
    fake=_fake_like_first,
)
_add_layer_norm = define_op(
    "add_layer_norm(Tensor x, Tensor(a!) residual, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=reference.add_layer_norm,
    fake=_fake_like_first,
)


def _fake_quantised(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype: torch.dtype = arguments[-1]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], 1), dtype=torch.float32)


_rms_norm_quantised = define_op(
    "rms_norm_quantised(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    reference=reference_eight_bits.rms_norm_quantised,
    fake=_fake_quantised,
)
_add_rms_norm_quantised = define_op(
    "add_rms_norm_quantised(Tensor x, Tensor(a!) residual, Tensor weight, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    reference=reference_eight_bits.add_rms_norm_quantised,
    fake=_fake_quantised,
)
_layer_norm_quantised = define_op(
    "layer_norm_quantised(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    reference=reference_eight_bits.layer_norm_quantised,
    fake=_fake_quantised,
)
_add_layer_norm_quantised = define_op(
    "add_layer_norm_quantised(Tensor x, Tensor(a!) residual, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor)",
    reference=reference_eight_bits.add_layer_norm_quantised,
    fake=_fake_quantised,
)
