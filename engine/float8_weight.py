"""Weights of checkpoints in e4m3: `weight`, and `weight_scale`, one number or one for each output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cuda_ops.float8 import FLOAT8, Float8Weight
from engine.coded_weight import StoredTensor
from engine.errors import ModelLoadError
from engine.quantisation import Quantisation

_ALL: Final = slice(None)


@dataclass(frozen=True, slots=True)
class Float8Part:
    """A part of a weight, or several stacked by their outputs.

    Attributes:
        stored: `[num_outputs, num_inputs]` e4m3.
        scales: `[num_outputs]` float32.
    """

    stored: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """What they stand for, float32."""
        return self.stored.float().mul_(self.scales.unsqueeze(1))


class StoredFloat8:
    """One layer's weight in a checkpoint.

    A scale for activations, `input_scale`, is not used: each row gets one of its own when it is multiplied.

    Attributes:
        path: of the file that holds the weight.
        shape: `(num_outputs, num_inputs)`.
    """

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor], quantisation: Quantisation) -> None:
        """Look at the shapes; `tensors` are by what follows the layer's name.

        Raises:
            ModelLoadError: they do not fit together.
        """
        if "weight" not in tensors:
            raise ModelLoadError(str(tensors["weight_scale"].path), f"tensor {name}.weight is missing")
        self._name = name
        self._tensors = tensors
        self.quantisation = quantisation
        self.path = tensors["weight"].path
        num_outputs, num_inputs = tensors["weight"].shape()
        self.shape = (num_outputs, num_inputs)
        found = tensors["weight_scale"].shape()
        if found not in ((), (1,), (1, 1), (num_outputs,), (num_outputs, 1)):
            raise ModelLoadError(
                str(tensors["weight_scale"].path),
                f"tensor {name}.weight_scale has shape {list(found)}: must be one number, or one an output",
            )

    def read(self, rows: slice = _ALL, columns: slice = _ALL) -> Float8Part:
        """Read some outputs and inputs.

        Raises:
            ModelLoadError: the weight is no e4m3.
        """
        region = tuple(
            slice(*one.indices(length)[:2]) for one, length in zip((rows, columns), self.shape, strict=True)
        )
        stored = self._tensors["weight"].read(region)
        if stored.dtype is not FLOAT8:
            raise ModelLoadError(
                str(self.path), f"tensor {self._name}.weight is {stored.dtype}, must be {FLOAT8}"
            )
        axes = len(self._tensors["weight_scale"].shape())
        scales = self._tensors["weight_scale"].read((_ALL,) * axes).float().reshape(-1)
        return Float8Part(stored, scales.expand(self.shape[0])[region[0]].contiguous())


def stack_float8(parts: Sequence[Float8Part], device: torch.device) -> Float8Weight:
    """Put weights of the same inputs one under the other."""
    stored = torch.cat([part.stored.contiguous().view(torch.uint8) for part in parts]).to(device)
    return Float8Weight(stored.view(FLOAT8), torch.cat([part.scales for part in parts]).to(device))
