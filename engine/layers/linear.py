"""Dense layers, each in the layout that its checkpoint asks for.

Where our kernels do not run, products stay with torch: cuBLAS on the GPU, oneDNN on the CPU. oneDNN's own
layout is made once too, which torch would do again at every call. The ops for that are private to torch, so
they are met here only, and any build without them takes the plain path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import cuda_ops
from cuda_ops.dense import PackedWeight, pack_weight, quantise_weight
from cuda_ops.float8 import Float8Weight, round_to_float8
from cuda_ops.memory import LargePages
from cuda_ops.quantised import QuantisedWeight, quantise_to_int8
from engine.checkpoint import Checkpoint, WeightLayout
from engine.shard import Shard


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias`.

    Attributes:
        weight: `[num_outputs, num_inputs]`; opaque where oneDNN has laid it out, codes or e4m3.
        bias: `[num_outputs]`, or None.
        sums_over: The ranks whose products are parts of a sum; None where each has outputs of its own.
    """

    weight: Tensor | PackedWeight | QuantisedWeight | Float8Weight
    bias: Tensor | None = None
    sums_over: Shard | None = None

    @classmethod
    def lay_out(
        cls,
        weight: Tensor | QuantisedWeight | Float8Weight,
        bias: Tensor | None,
        layout: WeightLayout,
        pages: LargePages | None = None,
    ) -> Linear:
        """Make a layer of a dense weight, which need not be contiguous; panels are in `pages`.

        Codes stay codes, whatever the layout, and so does e4m3.
        """
        if isinstance(weight, QuantisedWeight | Float8Weight):
            return cls(weight, bias)
        match layout:
            case "dense":
                reorder = torch.ops.mkldnn._reorder_linear_weight
                return cls(reorder(weight.contiguous()) if _can_reorder(weight) else weight, bias)
            case "packed":
                return cls(pack_weight(weight, pages), bias)
            case "int8":
                return cls(quantise_weight(weight, pages), bias)
            case "w8a16":
                return cls(quantise_to_int8(weight), bias)
            case "fp8":
                return cls(round_to_float8(weight), bias)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        name: str,
        num_outputs: int,
        num_inputs: int,
        *,
        has_bias: bool,
        layout: WeightLayout | None = None,
    ) -> Linear:
        """A layer that every rank has whole; `layout` is another than the checkpoint's."""
        weight = checkpoint.take_coded([(f"{name}.weight", num_outputs)], num_inputs) or checkpoint.take(
            f"{name}.weight", num_outputs, num_inputs
        )
        bias = checkpoint.take(f"{name}.bias", num_outputs) if has_bias else None
        return cls.lay_out(weight, bias, layout or checkpoint.layout, checkpoint.pages)

    @classmethod
    def load_summed(
        cls, checkpoint: Checkpoint, name: str, num_outputs: int, num_inputs: int, *, has_bias: bool
    ) -> Linear:
        """A layer that is split by its inputs, those being another layer's outputs."""
        weight = checkpoint.take_coded(
            [(f"{name}.weight", num_outputs)], num_inputs, split_axis=1
        ) or checkpoint.take_split(f"{name}.weight", num_outputs, num_inputs, axis=1)
        bias = checkpoint.take(f"{name}.bias", num_outputs) if has_bias else None
        return cls.lay_out(weight, bias, checkpoint.layout, checkpoint.pages).summed_over(checkpoint.shard)

    @classmethod
    def load_fused(
        cls,
        checkpoint: Checkpoint,
        parts: Sequence[tuple[str, int]],
        num_inputs: int,
        *,
        has_bias: bool,
    ) -> Linear:
        """Stack layers that read the same input into one product, split by the outputs of each.

        Args:
            checkpoint: holds `<name>.weight` and, with bias, `<name>.bias` of every part.
            parts: name and number of outputs of each, in the order of the outputs.
            num_inputs: of every part.
            has_bias: every part has one, or none.
        """
        take = checkpoint.take_rows if checkpoint.shard.is_whole else checkpoint.take_split_rows
        weights = [(f"{name}.weight", rows) for name, rows in parts]
        weight = checkpoint.take_coded(weights, num_inputs, split_axis=0) or take(weights, num_inputs)
        bias = take([(f"{name}.bias", rows) for name, rows in parts]) if has_bias else None
        return cls.lay_out(weight, bias, checkpoint.layout, checkpoint.pages)

    def summed_over(self, shard: Shard) -> Linear:
        """The same layer, of which this rank computes a part; the bias belongs to the first rank's."""
        if shard.is_whole:
            return self
        return replace(self, bias=self.bias if shard.rank == 0 else None, sums_over=shard)

    def __call__(self, x: Tensor, *, has_relu: bool = False, gives_float32: bool = False) -> Tensor:
        """Map `[num_rows, num_inputs]` to `[num_rows, num_outputs]`, in the dtype of x or in float32.

        `has_relu`: what is below 0 becomes 0.
        """
        if self.sums_over is None:
            return self._multiply(x, has_relu=has_relu, gives_float32=gives_float32)
        summed = self.sums_over.sum(self._multiply(x, has_relu=False, gives_float32=gives_float32))
        return summed.relu_() if has_relu else summed

    def _multiply(self, x: Tensor, *, has_relu: bool, gives_float32: bool) -> Tensor:
        if isinstance(self.weight, PackedWeight):
            return cuda_ops.linear(x, self.weight, self.bias, has_relu=has_relu, gives_float32=gives_float32)
        product: Tensor
        if isinstance(self.weight, QuantisedWeight):
            product = cuda_ops.quantised_linear(x, self.weight, self.bias)
        elif isinstance(self.weight, Float8Weight):
            product = cuda_ops.float8_linear(x, self.weight, self.bias)
        elif self.weight.is_mkldnn:
            product = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            product = F.linear(x, self.weight, self.bias)
        if has_relu:
            product = product.relu_()
        return product.float() if gives_float32 else product


def _can_reorder(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32
