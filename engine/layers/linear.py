"""Dense layers. The products stay with torch: cuBLAS on the GPU, oneDNN on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias`.

    Attributes:
        weight: `[num_outputs, num_inputs]`.
        bias: `[num_outputs]`, or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, num_outputs: int, num_inputs: int, *, has_bias: bool
    ) -> Linear:
        return cls.load_fused(checkpoint, [(name, num_outputs)], num_inputs, has_bias=has_bias)

    @classmethod
    def load_fused(
        cls,
        checkpoint: Checkpoint,
        parts: Sequence[tuple[str, int]],
        num_inputs: int,
        *,
        has_bias: bool,
    ) -> Linear:
        """Stack layers that read the same input into one product.

        Args:
            checkpoint: holds `<name>.weight` and, with bias, `<name>.bias` of every part.
            parts: name and number of outputs of each, in the order of the outputs.
            num_inputs: of every part.
            has_bias: every part has one, or none.
        """
        weight = checkpoint.take_rows([(f"{name}.weight", rows) for name, rows in parts], num_inputs)
        if not has_bias:
            return cls(weight)
        return cls(weight, checkpoint.take_rows([(f"{name}.bias", rows) for name, rows in parts]))

    def __call__(self, x: Tensor) -> Tensor:
        """Map `[num_rows, num_inputs]` to `[num_rows, num_outputs]`."""
        return F.linear(x, self.weight, self.bias)
