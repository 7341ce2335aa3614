"""Gated activations. Plain ones (ReLU, GELU) are already single kernels in torch and stay there."""

from __future__ import annotations

from torch import Tensor

from cuda_ops import reference
from cuda_ops.errors import OpInputError
from cuda_ops.registry import define_op


def silu_and_mul(x: Tensor) -> Tensor:
    """Return `silu(gate) * up` of `x = [gate | up]`, in float32, rounded once (Shazeer 2020, SwiGLU).

    Args:
        x: `[num_tokens, 2 * size]`.

    Returns:
        `[num_tokens, size]`, contiguous, dtype of `x`.

    Raises:
        OpInputError: the last axis is odd.
    """
    _check_halves("silu_and_mul", x)
    result: Tensor = _silu_and_mul(x)
    return result


def gelu_and_mul(x: Tensor) -> Tensor:
    """Return `gelu(gate) * up` of `x = [gate | up]`, as `silu_and_mul` in all else (Shazeer 2020, GeGLU).

    GELU is the approximation by tanh, which is what Gemma was trained with.
    """
    _check_halves("gelu_and_mul", x)
    result: Tensor = _gelu_and_mul(x)
    return result


def _check_halves(op: str, x: Tensor) -> None:
    if x.shape[-1] % 2:
        raise OpInputError(op, f"x is {list(x.shape)}: the last axis must be even")


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_gelu_and_mul = define_op("gelu_and_mul(Tensor x) -> Tensor", reference=reference.gelu_and_mul, fake=_fake)
_silu_and_mul = define_op("silu_and_mul(Tensor x) -> Tensor", reference=reference.silu_and_mul, fake=_fake)
