"""Rotary angles: from a model's config to the cosines and sines of a step's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model_config import ConfigFields

_DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RotaryAngles:
    """Turns positions into the table that `cuda_ops.rotary_embedding` reads.

    Computed per step and not kept for every position: 64 tokens cost less than looking them up in each
    layer, and a table for 131,072 positions would take 64 MB.

    Attributes:
        frequencies: `[rotary_dim / 2]` float32, radians per position.
    """

    frequencies: Tensor

    @classmethod
    def from_config(cls, fields: ConfigFields, head_dim: int, device: torch.device) -> RotaryAngles:
        """Read either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`.

        Raises:
            ModelLoadError: a kind of scaling that is not supported.
        """
        is_new = fields.has("rope_parameters")
        rope = fields.nested("rope_parameters" if is_new else "rope_scaling")
        theta = rope.number("rope_theta", fields.number("rope_theta", _DEFAULT_THETA))
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents
        return cls(_scale(frequencies, rope).to(device))

    def __call__(self, positions: Tensor) -> Tensor:
        """Map `[num_tokens]` to `[num_tokens, rotary_dim]` float32, cosines then sines."""
        angles = positions.to(torch.float32).unsqueeze(1) * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _scale(frequencies: Tensor, rope: ConfigFields) -> Tensor:
    kind = rope.text("rope_type", rope.text("type", "default"))
    match kind:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.number("factor")
        case "llama3":
            return _scale_llama3(frequencies, rope)
        case _:
            raise rope.invalid("rope_type", "only default, linear and llama3 are supported")


def _scale_llama3(frequencies: Tensor, rope: ConfigFields) -> Tensor:
    """Slow the long waves by `factor`, keep the short ones, blend in between (Llama 3.1's scheme)."""
    factor = rope.number("factor")
    low = rope.number("low_freq_factor")
    high = rope.number("high_freq_factor")
    # How many times a wave fits into the context that the model was first trained for.
    turns = frequencies * (rope.integer("original_max_position_embeddings") / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)
