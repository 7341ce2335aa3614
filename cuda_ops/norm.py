"""Normalisation over the last axis, alone or after adding to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ops import reference
from cuda_ops.registry import define_op


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
