"""Dense layers. The products stay with torch: cuBLAS on the GPU, oneDNN on the CPU.

On the CPU a weight is laid out once, at load, the way oneDNN's kernels read it; torch would do that again at
every call. For OPT-125M's layers in bfloat16 that is 2 to 3 times faster at 4 rows and 1.2 times at 64, with
equal results. The ops for it are private to torch, so they are met here only, and any build without them
takes the plain path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias`.

    Attributes:
        weight: `[num_outputs, num_inputs]`; opaque where it is packed.
        bias: `[num_outputs]`, or None.
        is_packed: the weight is in oneDNN's own layout.
    """

    weight: Tensor
    bias: Tensor | None = None
    is_packed: bool = False

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Make a layer of a dense weight, in the fastest layout that its device and dtype have."""
        if not _can_pack(weight):
            return cls(weight, bias)
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight), bias, is_packed=True)

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
            return cls.pack(weight)
        return cls.pack(weight, checkpoint.take_rows([(f"{name}.bias", rows) for name, rows in parts]))

    def __call__(self, x: Tensor) -> Tensor:
        """Map `[num_rows, num_inputs]` to `[num_rows, num_outputs]`."""
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32
