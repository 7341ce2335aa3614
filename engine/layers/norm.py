"""Norms with their weights, each alone or after adding to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import cuda_ops
from engine.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Weight and bias are None where the model has no affine part."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, size: int, eps: float, *, has_affine: bool = True
    ) -> LayerNorm:
        if not has_affine:
            return cls(None, None, eps)
        return cls(checkpoint.take(f"{name}.weight", size), checkpoint.take(f"{name}.bias", size), eps)

    def __call__(self, x: Tensor) -> Tensor:
        return cuda_ops.layer_norm(x, self.weight, self.bias, self.eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add `x` to `residual` in place and return the norm of the sum."""
        return cuda_ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    weight: Tensor
    eps: float

    @classmethod
    def load(cls, checkpoint: Checkpoint, name: str, size: int, eps: float) -> RMSNorm:
        return cls(checkpoint.take(f"{name}.weight", size), eps)

    def __call__(self, x: Tensor) -> Tensor:
        return cuda_ops.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add `x` to `residual` in place and return the norm of the sum."""
        return cuda_ops.add_rms_norm(x, residual, self.weight, self.eps)
